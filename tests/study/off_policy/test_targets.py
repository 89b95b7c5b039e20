"""Target policies: the plan that a greedy one takes, and targets that fit no log."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.errors import DataError
from rankpilot.study.off_policy.targets import TargetPolicy

from .small_logs import pairs, target


def test_a_greedy_policy_takes_the_best_plan_and_the_first_of_several() -> None:
    choices = pairs(2)
    scores = np.array([1.0, 2.0, 5.0, 5.0, 4.0, -1.0, -3.0, 0.0, 0.0, 0.5])
    greedy = TargetPolicy.greedy("greedy", choices, scores)
    assert greedy.probabilities.tolist() == [0, 1, 1, 0, 0, 1, 0, 0, 0, 1]
    greedy.check(choices)
    assert greedy.ranking is scores


def test_a_policy_without_scores_ranks_by_probability() -> None:
    policy = target()
    assert policy.ranking is policy.probabilities


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (TargetPolicy("short", np.ones(3)), r"'short': probabilities has one value for each plan .*got \(3,\)"),
        (TargetPolicy("wrong", np.full(5, 0.5)), "'wrong': probabilities of a decision .* decision 1 .* sum to 1.5"),
        (TargetPolicy("nan", np.array([np.nan, 1, 0, 0, 1])), "'nan': probabilities of a decision .* decision 0"),
        (TargetPolicy("s", np.array([1.0, 0, 0, 0, 1]), np.ones(4)), r"'s': scores has one value .*got \(4,\)"),
    ],
)
def test_targets_that_do_not_fit(policy: TargetPolicy, message: str) -> None:
    with pytest.raises(DataError, match=message):
        policy.check(pairs(1))


def test_scores_of_another_log() -> None:
    with pytest.raises(DataError, match="scores has one value"):
        TargetPolicy.greedy("greedy", pairs(1), np.zeros(6))
