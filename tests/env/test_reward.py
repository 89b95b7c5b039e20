"""The arithmetic of the reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rankpilot.env.episode import CHURN, REWARD_BOUND, UNIFORM, Comparison, churn_cost, rule_to_compare_with
from rankpilot.env.proxy_task import Reference
from rankpilot.errors import UnknownNameError

REFERENCE = Reference(initial=3.0, uniform=2.0, best=1.8)
QUARTER = Reference(initial=3.0, uniform=2.2, best=2.0)
"""Its headroom is a quarter of what uniform gains."""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(2.0, 0.0), (1.8, 1.0), (1.9, 0.5), (2.2, -1.0), (0.0, 3.0), (2.7, -3.0), (1e9, -3.0), (1.39, 3.0)],
)
def test_improvement_is_a_share_of_the_headroom(loss: float, expected: float) -> None:
    assert Comparison.with_uniform(REFERENCE).improvement(loss) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -math.inf])
def test_a_failed_run_is_the_worst(loss: float | None) -> None:
    assert Comparison.with_uniform(REFERENCE).improvement(loss) == -REWARD_BOUND == -3.0


def test_bounds_may_be_narrower() -> None:
    other = Comparison(2.0, 0.2)
    assert [other.improvement(loss, 1.0) for loss in (1.9, 1.0, 2.9)] == pytest.approx([0.5, 1.0, -1.0])
    assert other.improvement(math.nan, 1.0) == -1.0


def test_whoever_is_compared_with_a_failed_run_is_the_best() -> None:
    failed = Comparison(math.nan, 0.2)
    assert [failed.improvement(loss, 1.0) for loss in (1.9, 1e9, math.inf)] == [1.0, 1.0, 0.0]


def test_a_rule_by_hand() -> None:
    """The headroom is the same share of what the rule gains as of what uniform gains."""
    other = Comparison.with_run(2.1, 3.0, QUARTER, [2.0, 2.2])
    assert [other.improvement(loss) for loss in (2.0, 2.2)] == pytest.approx([0.1 / (0.9 / 4), -0.1 / (0.9 / 4)])
    unknown = Comparison.with_run(1.5, 2.5, Reference(2.0, 1.0), [])
    assert [unknown.improvement(loss) for loss in (1.5, 1.45)] == pytest.approx([0.0, 0.05 / 0.1])
    assert [other.improvement(loss) for loss in (0.1, 2.9, math.nan)] == [3.0, -3.0, -3.0]


def test_where_the_rule_failed_the_middle_of_the_others_stands_in() -> None:
    """What it gained sets the scale too."""
    other = Comparison.with_run(math.nan, 3.0, QUARTER, [2.0, 2.1, 2.2])
    expected = [0.1 / (0.9 / 4), 0, -0.1 / (0.9 / 4), -3]
    assert [other.improvement(loss) for loss in (2.0, 2.1, 2.2, math.nan)] == pytest.approx(expected)
    nobody = Comparison.with_run(math.nan, 3.0, QUARTER, [])
    assert (nobody.loss, nobody.improvement(None)) == (3.0, -3.0)


def test_a_rule_that_gains_nothing_leaves_a_scale() -> None:
    """One percent of the initial loss at least."""
    other = Comparison.with_run(3.2, 3.0, QUARTER, [3.2])
    assert [other.improvement(loss) for loss in (3.2, 3.1975)] == pytest.approx([0, 0.0025 / (0.03 / 4)])


def test_churn_is_a_price_a_rung() -> None:
    before = np.array([0, 3, 5, 2])
    assert churn_cost(before, before) == 0.0
    assert churn_cost(before, before + 1) == pytest.approx(CHURN)
    assert churn_cost(before, np.array([1, 2, 5, 2])) == pytest.approx(CHURN / 2)
    assert churn_cost(before, before + 10) == churn_cost(before + 10, before) == pytest.approx(10 * CHURN)


def test_names_of_what_episodes_are_compared_with() -> None:
    assert rule_to_compare_with(UNIFORM) is None
    rule = rule_to_compare_with("signal-mean")
    assert rule is not None
    assert rule.name == "signal-mean"
    with pytest.raises(UnknownNameError, match=r"Unknown comparison 'unifrom'. Did you mean: 'uniform'"):
        rule_to_compare_with("unifrom")
