"""The arithmetic of the reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rankpilot.env.reward import CHURN, REWARD_BOUND, GroupMeans, Reward, churn_cost, terminal_improvement
from rankpilot.env.tasks.finetune import Reference

REFERENCE = Reference(initial=3.0, uniform=2.0, best=1.8)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(2.0, 0.0), (1.8, 1.0), (1.9, 0.5), (2.2, -1.0), (0.0, 3.0), (2.7, -3.0), (1e9, -3.0), (1.39, 3.0)],
)
def test_improvement_is_a_share_of_the_headroom(loss: float, expected: float) -> None:
    assert terminal_improvement(REFERENCE, loss) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -math.inf])
def test_a_failed_run_is_the_worst(loss: float | None) -> None:
    assert terminal_improvement(REFERENCE, loss) == -REWARD_BOUND == -3.0


def test_the_group_mean_goes_before_the_clip() -> None:
    assert Reward(3.0, -3.0).value == 3.0
    assert Reward(-3.0, 3.0).value == -3.0
    assert Reward(1.0, 0.25).value == 0.75
    assert Reward(3.0, -3.0, churn=0.01).value == pytest.approx(2.99), "churn after it"
    assert Reward().value == 0.0


def test_churn_is_a_price_a_rung() -> None:
    before = np.array([0, 3, 5, 2])
    assert churn_cost(before, before) == 0.0
    assert churn_cost(before, before + 1) == pytest.approx(CHURN)
    assert churn_cost(before, np.array([1, 2, 5, 2])) == pytest.approx(CHURN / 2)
    assert churn_cost(before, before + 10) == churn_cost(before + 10, before) == pytest.approx(10 * CHURN)


def test_means_of_groups() -> None:
    means = GroupMeans()
    for group, round_, improvement in ((0, 1, 1.0), (0, 1, 2.0), (1, 1, -3.0), (0, 2, 5.0), (0, 1, 6.0)):
        means.add(group, round_, improvement)
    assert means.mean(0, 1) == 3.0
    assert means.mean(1, 1) == -3.0
    assert means.mean(0, 2) == 5.0
