"""What the package expects of plans is what the stored rows say."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.decide.plan.worth import FEATURES, packaged_worth

from benchmarks import worth


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
