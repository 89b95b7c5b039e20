"""The rule for the learning rate, and what a plan makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rankpilot.plan.rate import RULE, InitialLoss

PLAIN = np.full(4, 2.0)


def test_plain_lora_keeps_its_rate() -> None:
    assert RULE.factor(np.full(4, 8), PLAIN, PLAIN) == 1.0
    assert RULE.factor(np.zeros(4, dtype=np.int64), PLAIN, PLAIN) == 1.0


def test_factors_multiply() -> None:
    ranks, scales = np.array([32, 32, 0, 0]), np.array([0.5, 0.5, 2.0, 2.0])
    expected = 4**RULE.of_rank * 0.25**RULE.of_scale * 0.5**RULE.of_share
    assert RULE.factor(ranks, scales, PLAIN) == pytest.approx(expected, rel=1e-12)


def test_the_rate_falls_with_width_and_length() -> None:
    rates = [RULE.plain(width, 500) for width in (64, 576, 2048, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert RULE.plain(2048, 100) >= RULE.plain(2048, 5000)
    assert 2e-4 < RULE.plain(4096, 780, 4.0) < 1e-3, "public sweeps of 8B models are best between 3e-4 and 1e-3"
    far, near = (RULE.plain(576, 100, initial=InitialLoss(loss, 192)) for loss in (4.0, 1.5))
    assert far > 1.5 * near, "a text that the model hardly knows has farther to go"
    assert RULE.plain(576, 100, initial=InitialLoss(1.0, 1e6)) == RULE.plain(576, 100), (
        "large batches have little noise left"
    )
    assert RULE.plain(2048, 500, 8.0) == pytest.approx(RULE.plain(2048, 500) * 4**RULE.of_scale, rel=0.01)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
