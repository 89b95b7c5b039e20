"""Lower limits of what a step may take: those of the budget leave the one of time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.agents.learned.policy import with_less, with_less_time
from rankpilot.cost.cost import ByteCost, Cost, TimedCost, moment_costs, plan_cost
from rankpilot.cost.step_time import SecondsRow
from rankpilot.lora.spec import RankLadder
from rankpilot.plan.plan import least_ranks
from rankpilot.plan.problem import AllocationProblem

MODULES = 8
BLOCKS = np.arange(MODULES) // 2
BYTES = ByteCost(
    ("backward",), np.array([1000.0]), np.full((1, MODULES), 10.0), np.full((1, 4), 700.0),
    np.arange(4)[:, None] >= BLOCKS[None],
)  # fmt: skip
SECONDS = SecondsRow(1.0, np.full(MODULES, 1e-3), np.full(MODULES, 0.1), np.eye(MODULES, dtype=np.bool_))
LIMIT = plan_cost(BYTES, np.full(MODULES, 8))


def problem_of(cost: Cost) -> AllocationProblem:
    return AllocationProblem(np.ones(MODULES, dtype=np.int64), np.full(MODULES, 64), BLOCKS, cost, LIMIT, RankLadder())


@pytest.mark.parametrize("seconds", [1.5, 64.0])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_less_of_the_budget_leaves_the_limit_of_time(seconds: float, share: float) -> None:
    timed = problem_of(SECONDS.added_to(BYTES, LIMIT, seconds))
    limited = with_less(timed, share)
    least = plan_cost(BYTES, least_ranks(timed))
    assert limited.limit == least + share * (LIMIT - least) < LIMIT
    assert isinstance(limited.cost, TimedCost)
    for ranks in np.random.default_rng(0).choice([0, 1, 8], size=(100, MODULES)):
        time = moment_costs(limited.cost, ranks)[-1] / limited.limit * seconds
        assert time == pytest.approx(SECONDS.seconds(ranks), rel=1e-6)
        assert limited.fits(ranks) == (plan_cost(BYTES, ranks) <= limited.limit and SECONDS.seconds(ranks) <= seconds)


def test_less_time_leaves_the_budget() -> None:
    limited = with_less_time(problem_of(SECONDS.added_to(BYTES, LIMIT, 1.7)), 0.5)
    assert limited.limit == LIMIT
    least, most = SECONDS.seconds(np.arange(MODULES) == 0), 1.7
    ranks = np.where(BLOCKS >= 2, 8, 0)
    time = moment_costs(limited.cost, ranks)[-1] / LIMIT * (least + most) / 2
    assert time == pytest.approx(SECONDS.seconds(ranks), rel=1e-6)


def test_all_of_a_limit_that_plain_lora_leaves_unspent_is_what_plain_lora_takes() -> None:
    plain = np.full(MODULES, 8)
    assert with_less(replace(problem_of(BYTES), limit=3 * LIMIT), 1.0).limit == LIMIT
    limited = with_less_time(problem_of(SECONDS.added_to(BYTES, LIMIT, 64.0)), 1.0)
    assert moment_costs(limited.cost, plain)[-1] == pytest.approx(LIMIT, rel=1e-6)
