"""What the package expects of plans is what the stored rows say; and runs without a sweep beside sweeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rankpilot.decide.plan.worth import FEATURES, packaged_worth

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
    side = "rslora-64"
    known = rows({(side, 0.5): 2.0, (side, 1.0): 1.9, (side, 2.0): 1.8})
    assert Run("french", side, 4.0) in no_sweep.next_runs("french", 0, known)
    known |= rows({(side, 4.0): None})
    assert not [run for run in no_sweep.next_runs("french", 0, known) if run.side == side]
    assert Run("french", side, 1.0, 1) in no_sweep.next_runs("french", 1, known), "another seed is another sweep"


def test_the_best_run_of_a_sweep_counts() -> None:
    sides = {(goal, 1.0): 1.95 for goal in no_sweep.GOALS}
    known = rows({("plain", 0.5): 2.0, ("plain", 1.0): 1.9, ("plain", 2.0): 1.8, **sides})
    best = no_sweep.best_rows(known)["french", 0]
    assert (best["plain"]["loss"], best["plain, rule"]["loss"], best["bytes"]["loss"]) == (1.8, 1.9, 1.95)
    assert no_sweep.best_rows(rows({("quality", 1.0): 1.9})) == {}, "a text counts when plain LoRA has run"


@pytest.mark.parametrize(
    ("losses", "reason"),
    [((1.8, 1.82), None), ((1.8, 1.9), "5.4 % between seeds"), ((3.2, 3.21), "loss 3.20, frequencies 3.00")],
)
def test_texts_that_teach_nothing_or_differ_by_luck_are_left_out(losses: Any, reason: str | None) -> None:
    known = {
        Run("french", "plain", factor, seed): {"loss": loss, "frequencies": 3.0}
        for seed, loss in enumerate(losses)
        for factor in no_sweep.SWEPT
    }
    assert no_sweep.reason_to_leave_out("french", no_sweep.best_rows(known)) == reason


def test_the_loss_of_frequencies_is_that_of_a_table() -> None:
    train, judged = ({"input_ids": [rows]} for rows in ([0, 0, 0, 1], [0, 1, 2]))
    shares = np.array([4, 2, 1]) / 7
    assert no_sweep.loss_of_frequencies(train, judged) == pytest.approx(-np.log(shares).mean())  # type: ignore[arg-type]
