"""Logged choices: how lists of plans are laid out, and arrays that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.errors import DataError
from rankpilot.study.off_policy.logged import LoggedChoices

from .small_logs import pairs

ONE = LoggedChoices(["b", "a", "b"], np.array([3, 1, 2]), np.array([2, 0, 1]), np.array([1.0, 2.0, 3.0]))
EACH = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
"""A value for each plan of `ONE`."""


def test_plans_lie_end_to_end() -> None:
    assert ONE.starts.tolist() == [0, 3, 4]
    assert ONE.decision_of.tolist() == [0, 0, 0, 1, 2, 2]
    assert ONE.of_chosen(EACH).tolist() == [2, 3, 5]
    assert ONE.sums(EACH).tolist() == [3, 3, 9]
    assert ONE.plans_of(np.array([2, 0])).tolist() == [4, 5, 0, 1, 2]


def test_decisions_of_a_task_have_its_number() -> None:
    numbers = ONE.task_numbers
    assert numbers[0] == numbers[2] != numbers[1]
    assert sorted(set(numbers.tolist())) == [0, 1]


def test_the_example_of_the_docstring() -> None:
    choices = LoggedChoices(
        tasks=["a", "b"],
        plans=np.array([3, 2]),
        chosen=np.array([2, 0]),
        outcomes=np.array([-0.7, -1.2]),
        probabilities=np.array([0.1, 0.2, 0.7, 0.5, 0.5]),
    )
    assert choices.probabilities is not None
    assert choices.of_chosen(choices.probabilities).tolist() == [0.7, 0.5]


def test_which_probabilities_are_unknown() -> None:
    assert ONE.unknown.all()
    known = np.array([0.5, 0.25, 0.25, 1.0, 0.5, 0.5])
    assert not replace(ONE, probabilities=known).unknown.any()
    known[:3] = np.nan
    assert replace(ONE, probabilities=known).unknown.tolist() == [True, False, False]


def test_probabilities_of_single_precision_are_taken() -> None:
    thirds = np.full(3, 1 / 3, dtype=np.float32).astype(np.float64) * (1 + 2e-5)
    LoggedChoices(["a"], np.array([3]), np.array([0]), np.zeros(1), thirds)
    LoggedChoices(["a"], np.array([2]), np.array([0]), np.zeros(1), np.array([1 + 2e-5, 0]))


def with_one(values: Any, place: int, value: float) -> Any:
    changed = np.array(values)
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["a", "b"]}, "one value for each decision"),
        ({"outcomes": np.zeros((3, 1))}, "one value for each decision"),
        ({"plans": np.array([3, 0, 3])}, "decision 1 has none"),
        ({"chosen": np.array([2, 1, 1])}, "decision 1 has 1 plans and chose 1"),
        ({"chosen": np.array([-1, 0, 1])}, "decision 0 has 3 plans and chose -1"),
        ({"outcomes": with_one(ONE.outcomes, 2, np.nan)}, "that of decision 2 is nan. Give a failed run"),
        ({"outcomes": with_one(ONE.outcomes, 0, -np.inf)}, "that of decision 0 is -inf"),
        ({"probabilities": EACH[:5]}, r"probabilities has one value for each plan .*\(6,\); got \(5,\)"),
        (
            {"probabilities": np.array([0.5, 0.25, 0.25, 1.0, 0.5, 0.6])},
            "decision 2 are from 0.5 to 0.6 and sum to 1.1",
        ),
        ({"probabilities": np.array([0.5, -0.5, 1.0, 1.0, 0.5, 0.5])}, "decision 0 are from -0.5 to 1 and sum to 1"),
        ({"probabilities": np.array([0.5, np.nan, 0.5, 1.0, 0.5, 0.5])}, "Some probabilities of decision 0 are NaN"),
        ({"probabilities": np.array([0.5, 0.5, 0.0, 1.0, 0.5, 0.5])}, "Decision 0 took a plan whose probability is 0"),
        ({"predictions": EACH[None]}, r"predictions has one value for each plan .*\(6,\); got \(1, 6\)"),
        ({"predictions": with_one(EACH, 4, np.inf)}, "Predictions are finite; 1 are not"),
    ],
)
def test_bad_logs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(ONE, **change)


def test_an_empty_log() -> None:
    empty = np.zeros(0, dtype=np.int64)
    with pytest.raises(DataError, match="at least 1"):
        LoggedChoices([], empty, empty, np.zeros(0))


def test_small_logs_are_sound() -> None:
    assert pairs().plans.sum() == 40
