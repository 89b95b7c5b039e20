"""The rule for the learning rate, and what a plan makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rankpilot.decide.plan.rate import RULE, WIDE, InitialLoss, RateRange

PLAIN = np.full(4, 2.0)


def test_plain_lora_keeps_its_rate() -> None:
    assert RULE.factor(np.full(4, 8), PLAIN, PLAIN) == 1.0
    assert RULE.factor(np.zeros(4, dtype=np.int64), PLAIN, PLAIN) == 1.0


def test_factors_multiply() -> None:
    ranks, scales = np.array([32, 32, 0, 0]), np.array([0.5, 0.5, 2.0, 2.0])
    expected = 4**RULE.of_rank * 0.25**RULE.of_scale * 0.5**RULE.of_share
    assert RULE.factor(ranks, scales, PLAIN) == pytest.approx(expected, rel=1e-12)


def test_rank_alone_changes_no_rate_at_one_alpha() -> None:
    assert RULE.factor(np.full(4, 64), PLAIN / 8, PLAIN) == pytest.approx(1)


def test_the_rate_falls_with_width_and_length() -> None:
    rates = [RULE.plain(width, 500) for width in (64, 576, WIDE)]
    assert rates == sorted(set(rates), reverse=True)
    assert RULE.plain(8192, 500) == RULE.plain(WIDE, 500), "a constant is as good there"
    assert RULE.plain(2048, 100) >= RULE.plain(2048, 5000)
    published = RULE.plain(4096, 780, 4.0, InitialLoss(0.9, 2000))
    assert published == pytest.approx(3e-4, rel=0.02), "of an alpha of 32"
    far, near = (RULE.plain(576, 100, initial=InitialLoss(loss, 192)) for loss in (4.0, 1.5))
    assert far > 1.5 * near, "a text that the model hardly knows has farther to go"
    assert RULE.plain(576, 100, initial=InitialLoss(1.0, 1e6)) == RULE.plain(576, 100), (
        "large batches have little noise left"
    )
    assert RULE.plain(2048, 500, 8.0) == pytest.approx(RULE.plain(2048, 500) * 4**RULE.of_scale, rel=0.01)
    frozen = RULE.plain(576, 100, initial=InitialLoss(0.0, 0.0))
    assert all(math.isfinite(rate) and rate > 0 for rate in (*rates, frozen)), "a loss of 0 has a rate, too"


def test_an_interval_has_both_ends_and_begins_below_the_rule() -> None:
    found = RateRange.around(1e-3)
    assert found.low < 1e-3 < found.middle < found.high
    assert found.middle == pytest.approx(math.sqrt(found.low * found.high))
