"""The rule for the learning rate, and what a plan makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rankpilot.plan.rate import OF_RANK, OF_SCALE, OF_SHARE, Look, plan_factor, rule_rate

PLAIN = np.full(4, 2.0)


def test_plain_lora_keeps_its_rate() -> None:
    assert plan_factor(np.full(4, 8), PLAIN, PLAIN) == 1.0
    assert plan_factor(np.zeros(4, dtype=np.int64), PLAIN, PLAIN) == 1.0


def test_factors_multiply() -> None:
    ranks, scales = np.array([32, 32, 0, 0]), np.array([0.5, 0.5, 2.0, 2.0])
    expected = 4**OF_RANK * 0.25**OF_SCALE * 0.5**OF_SHARE
    assert plan_factor(ranks, scales, PLAIN) == pytest.approx(expected, rel=1e-12)


def test_the_rate_falls_with_width_and_length() -> None:
    rates = [rule_rate(width, 500) for width in (64, 576, 2048, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert rule_rate(2048, 100) >= rule_rate(2048, 5000)
    assert 2e-4 < rule_rate(4096, 780, 4.0) < 1e-3, "public sweeps of 8B models are best between 3e-4 and 1e-3"
    far, near = (rule_rate(576, 100, look=Look(loss, 192)) for loss in (4.0, 1.5))
    assert far > 1.5 * near, "a text that the model hardly knows has farther to go"
    assert rule_rate(576, 100, look=Look(1.0, 1e6)) == rule_rate(576, 100), "large batches have little noise left"
    assert rule_rate(2048, 500, 8.0) == pytest.approx(rule_rate(2048, 500) * 4**OF_SCALE, rel=0.01)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
