"""How concentrated a plan of a goal of cost may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.observation import Observation
from rankpilot.plan.goal import broad_plans
from rankpilot.plan.problem import AllocationProblem

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


@pytest.mark.parametrize("name", PLANS)
def test_half_of_the_modules_in_two_thirds_of_the_layers_half_of_them_at_rank_8(
    problem: AllocationProblem, name: str
) -> None:
    ranks, broad = PLANS[name]
    assert broad_plans(problem, ranks[None]).tolist() == [broad]


def test_all_plans_at_once(problem: AllocationProblem) -> None:
    ranks, broad = zip(*PLANS.values(), strict=True)
    assert broad_plans(problem, np.stack(ranks)).tolist() == list(broad)


def test_a_module_that_cannot_have_rank_8_has_its_highest(problem: AllocationProblem) -> None:
    small = replace(problem, max_ranks=np.full(len(BLOCKS), 4))
    assert broad_plans(small, plan(True, 4)[None]).tolist() == [True]
    assert broad_plans(small, plan(True, 2)[None]).tolist() == [False]
