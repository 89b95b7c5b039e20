"""What the package expects of plans is what the stored rows say; and runs without a sweep beside sweeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rankpilot.plan.worth import FEATURES, packaged_worth

from benchmarks import no_sweep, worth
from benchmarks.no_sweep import Run


def test_the_packaged_expectations_are_those_of_the_stored_rows() -> None:
    found, packaged = worth.fit([*worth.loss_runs(), *worth.earlier(), *worth.sweeps()]).worth, packaged_worth()
    np.testing.assert_allclose(found.effects, packaged.effects, rtol=0.02, atol=1e-4)
    np.testing.assert_allclose(found.covariance, packaged.covariance, rtol=0.05, atol=1e-5)
    assert found.noise == pytest.approx(packaged.noise, rel=0.02)


def test_effects_that_are_there_are_found() -> None:
    generator, size = np.random.default_rng(0), len(FEATURES)
    effects = generator.normal(0, 0.02, size)
    made = []
    for number in range(40):
        features = generator.uniform(0, 1, (12, size))
        features[0] = 0
        losses = 1.0 + number + features @ (effects + generator.normal(0, 0.002, size))
        made.append(worth.FineTune(f"model {number % 2}", str(number), features, np.zeros(12), np.zeros(12), losses))
    np.testing.assert_allclose(worth.fit(made).worth.effects, effects, atol=0.002)
    judged = worth.judge(worth.fit(made[1:]).worth, made[0])
    assert judged is not None
    assert judged.correlation > 0.95
    assert judged.best <= judged.taken <= 0


def rows(losses: dict[tuple[str, float], float | None]) -> dict[Run, Any]:
    return {Run("french", side, factor): {"loss": loss, "all_s": 1.0} for (side, factor), loss in losses.items()}


def test_a_sweep_goes_on_where_its_edge_is_best() -> None:
    known = rows({("plain", 0.5): 2.0, ("plain", 1.0): 1.9, ("plain", 2.0): 1.8})
    assert Run("french", "plain", 4.0) in no_sweep.next_runs("french", known)
    known |= rows({("plain", 4.0): None})
    assert not [run for run in no_sweep.next_runs("french", known) if run.side == "plain"]


def test_the_best_run_of_a_sweep_counts() -> None:
    sides = {(goal, 1.0): 1.95 for goal in no_sweep.GOALS}
    known = rows({("plain", 0.5): 2.0, ("plain", 1.0): 1.9, ("plain", 2.0): 1.8, **sides})
    best = no_sweep.best_rows(known)["french"]
    assert (best["plain"]["loss"], best["plain, rule"]["loss"], best["bytes"]["loss"]) == (1.8, 1.9, 1.95)
    assert no_sweep.best_rows(rows({("plain", 1.0): 1.9})) == {}, "a text counts when all goals have run"
