"""Goals as people give them, losses as votes, and how concentrated a plan of a goal of cost may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.observation import Observation
from rankpilot.errors import ConfigError
from rankpilot.plan.goal import Goal, broad_plans, goal_of, improvement_of, vote_of
from rankpilot.plan.problem import AllocationProblem


def test_goals_in_words() -> None:
    assert str(goal_of("quality", None)) == "the lowest loss within the budget"
    assert str(goal_of("time", None)).startswith("the least time a step, with a loss that is surely at most 0.01 (log)")
    assert str(goal_of("bytes", 0.02)).startswith("the fewest bytes, with a loss that is surely at most 0.02 (log)")
    assert [goal_of(kind, None).saves for kind in ("quality", "time", "bytes")] == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "speed", "tolerance": None}, "goal is one of quality, time, bytes; got 'speed'"),
        ({"goal": None, "tolerance": None}, "goal is one of quality, time, bytes; got None"),
        ({"goal": "time", "tolerance": -0.1}, r"from 0 to 1, such as 0\.01 for 1 %; got -0\.1"),
        ({"goal": "time", "tolerance": math.nan}, "from 0 to 1"),
        ({"goal": "time", "tolerance": "1%"}, "from 0 to 1, .*; got '1%'"),
        ({"goal": "bytes", "tolerance": True}, "from 0 to 1"),
        ({"goal": "quality", "tolerance": 0.01}, "tolerance counts under goal='time' or goal='bytes' alone"),
        ({"goal": "bytes", "tolerance": None, "budget_unit": "parameters"}, "give a budget of bytes"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        goal_of(**options)


@pytest.mark.parametrize("improvement", [-2.0, -0.01, 0.0, 1e-4, 0.5])
def test_votes_are_losses_and_back(improvement: float) -> None:
    assert improvement_of(vote_of(improvement)) == pytest.approx(improvement)
    assert math.copysign(1, vote_of(improvement)) == math.copysign(1, improvement)


def test_a_tolerance_is_one_vote() -> None:
    assert Goal("time", 0.0).least_vote == 0
    assert Goal("time", 0.01).least_vote == pytest.approx(-math.asinh(1))
    assert vote_of(0.001) == pytest.approx(0.1, rel=0.01), "near 0 it counts per cent"


# Broad plans ----------------------------------------------------------------------------------------------------------


BLOCKS = np.repeat(np.arange(6), 4)
"""Six layers of four modules."""


@pytest.fixture
def problem(make_observation: Callable[..., Observation]) -> AllocationProblem:
    return make_observation(len(BLOCKS), max_ranks=np.full(len(BLOCKS), 64)).problem


def plan(adapted: Any, rank: int = 8) -> np.ndarray:
    return np.where(np.broadcast_to(adapted, len(BLOCKS)), rank, 0).astype(np.int64)


PLANS = {
    "plain LoRA": (plan(True), True),
    "top two thirds": (plan(BLOCKS >= 2), True),
    "top half": (plan(BLOCKS >= 3, 64), False),
    "two modules of each layer": (plan(np.arange(24) % 4 < 2), True),
    "one module of each layer": (plan(np.arange(24) % 4 == 0, 64), False),
    "every other layer": (plan(BLOCKS % 2 == 0), False),
    "all at rank 4": (plan(True, 4), False),
    "half at rank 4": (np.where(np.arange(24) % 2, 8, 4), True),
    "none": (plan(False), False),
}


def test_half_of_the_modules_in_two_thirds_of_the_layers_half_of_them_at_rank_8(problem: AllocationProblem) -> None:
    found = broad_plans(problem, np.stack([ranks for ranks, _ in PLANS.values()]))
    assert dict(zip(PLANS, found.tolist(), strict=True)) == {name: broad for name, (_, broad) in PLANS.items()}


def test_a_module_that_cannot_have_rank_8_has_its_highest(problem: AllocationProblem) -> None:
    small = replace(problem, max_ranks=np.full(len(BLOCKS), 4))
    assert broad_plans(small, plan(True, 4)[None]).tolist() == [True]
    assert broad_plans(small, plan(True, 2)[None]).tolist() == [False]
