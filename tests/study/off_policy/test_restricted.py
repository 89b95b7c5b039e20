"""Restricted choice: the outcome that was observed of the best logged plan."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.errors import DataError
from rankpilot.study.off_policy.logged import LoggedChoices
from rankpilot.study.off_policy.restricted import restricted_choice
from rankpilot.study.off_policy.targets import TargetPolicy

TASKS = 12
OUTCOMES = np.array([1.0, 5.0, 3.0])
"""Of the plans 0, 2 and 3 of each task, which were run; plan 1 never was."""


def log(tasks: int = TASKS) -> LoggedChoices:
    return LoggedChoices(
        tasks=np.repeat(range(tasks), 3).tolist(),
        plans=np.full(3 * tasks, 4),
        chosen=np.tile([0, 2, 3], tasks),
        outcomes=np.concatenate([OUTCOMES + task for task in range(tasks)]),
    )


def ranks(*scores: float, tasks: int = TASKS) -> TargetPolicy:
    return TargetPolicy.greedy("ranks", log(tasks), np.tile(scores, 3 * tasks))


@pytest.mark.parametrize(
    ("scores", "observed"),
    [
        ((4, 3, 2, 1), 1.0),
        ((1, 9, 3, 2), 5.0),  # its favourite was never run: the best of the others
        ((0, 0, 0, 1), 3.0),
        ((0, 0, 7, 7), 4.0),  # both tie
    ],
)
def test_the_best_of_the_logged_plans(scores: tuple[float, ...], observed: float) -> None:
    estimate = restricted_choice(log(), ranks(*scores))
    assert estimate.gain is not None
    assert estimate.gain.value == pytest.approx(observed + (TASKS - 1) / 2)
    assert estimate.gain.low < estimate.gain.value < estimate.gain.high
    assert estimate.effective_size == TASKS
    assert estimate.largest_weight is None


def test_a_plan_that_was_run_twice_counts_with_its_mean() -> None:
    twice = LoggedChoices(
        np.repeat(range(TASKS), 3).tolist(),
        np.full(3 * TASKS, 2),
        np.tile([0, 0, 1], TASKS),
        np.tile([1.0, 2.0, 9.0], TASKS),
    )
    estimate = restricted_choice(twice, TargetPolicy("first", np.tile([0.9, 0.1], 3 * TASKS)))
    assert estimate.gain is not None
    assert estimate.gain.value == 1.5


def test_tasks_with_more_runs_count_once() -> None:
    choices = LoggedChoices(
        [0, *range(1, TASKS), *[0] * 8],
        np.full(TASKS + 8, 2),
        np.array([0] * TASKS + [1] * 8),
        np.array([10.0] + [0.0] * (TASKS - 1) + [-1.0] * 8),
    )
    estimate = restricted_choice(choices, TargetPolicy("first", np.tile([0.9, 0.1], TASKS + 8)))
    assert estimate.gain is not None
    assert estimate.gain.value == pytest.approx(10 / TASKS)


def test_no_choice_is_no_figure() -> None:
    once = LoggedChoices(range(TASKS), np.full(TASKS, 2), np.zeros(TASKS, dtype=np.int64), np.zeros(TASKS))
    for choices, policy in (
        (once, TargetPolicy("first", np.tile([1.0, 0.0], TASKS))),
        (log(), ranks(2, 3, 2, 2)),
    ):
        estimate = restricted_choice(choices, policy)
        assert estimate.gain is None
        assert estimate.refused == "No choice: of no task does the target tell logged plans apart."


def test_few_tasks_are_refused() -> None:
    estimate = restricted_choice(log(9), ranks(4, 3, 2, 1, tasks=9))
    assert estimate.gain is None
    assert estimate.refused == "Not enough tasks: effective sample size 9.0 (at least 10)."
    assert restricted_choice(log(10), ranks(4, 3, 2, 1, tasks=10)).gain is not None


def test_a_target_of_another_log() -> None:
    with pytest.raises(DataError, match="probabilities has one value for each plan"):
        restricted_choice(log(), ranks(4, 3, 2, 1, tasks=3))
