"""Plans within a limit of time, where second runs of layers take time as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rankpilot.common.arrays import IntArray
from rankpilot.common.errors import BudgetError
from rankpilot.cost.cost import ByteCost, plan_cost, unit_cost
from rankpilot.cost.step_time import StepTime
from rankpilot.decide.plan.plan import CHECKS, SETTLED, TimeLimit, check_budget, project, uniform_ranks
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.lora.spec import RankLadder

LAYERS, EACH = 6, 3
MODULES = LAYERS * EACH
BLOCKS = np.repeat(np.arange(LAYERS), EACH)
NAMES = tuple(f"layer{layer}" for layer in range(LAYERS))


def step_time() -> StepTime:
    """The backward pass of a layer takes 2 s, its second run 1 s, and the forward pass 6 s."""
    needs = BLOCKS[None] <= np.arange(LAYERS)[:, None]
    return StepTime(
        constant=6.0, per_rank=np.full(MODULES, 0.005), adapters=np.full(MODULES, 0.1), groups=np.full(LAYERS, 2.0),
        needs=needs, layers=NAMES, running_again=(), layer_seconds=np.ones(LAYERS), layer_needs=needs, layer_of=BLOCKS,
        again=np.zeros(MODULES), again_per_rank=np.zeros(MODULES),
    )  # fmt: skip


def byte_cost() -> ByteCost:
    """Bytes with all layers running again: ranks alone."""
    return ByteCost(("loss",), np.array([1000.0]), np.full((1, MODULES), 10.0), np.zeros((1, 0)), np.zeros((0, 18)) > 0)


def problem_of(limit: TimeLimit | None, most: float = 20_000.0) -> AllocationProblem:
    cost: Any = limit.added_to(byte_cost(), most) if limit else byte_cost()
    sizes = np.full(MODULES, 64)
    return AllocationProblem(0 * sizes, sizes, BLOCKS, cost, most, RankLadder())


def fewest(ranks: np.ndarray) -> tuple[str, ...]:
    """Each adapted layer holds 4,000 bytes if it does not run again."""
    lowest = int(BLOCKS[ranks > 0].min(initial=LAYERS))
    held = [name for index, name in enumerate(NAMES) if index >= lowest]
    spare = 20_000 - unit_cost(byte_cost(), ranks)
    return tuple(held[: max(0, len(held) - int(spare // 4000))])


@pytest.mark.parametrize("seconds", [9.0, 12.0, 15.0, 18.5, 22.0, 26.0])
@pytest.mark.parametrize("seed", range(3))
def test_second_runs_count_against_the_time(seconds: float, seed: int) -> None:
    limit = TimeLimit(step_time(), seconds, fewest)
    problem = problem_of(limit)
    scores = np.random.default_rng(seed).normal(size=MODULES)
    wanted = np.random.default_rng(seed).choice(RankLadder().array, size=MODULES)

    def plan(other: AllocationProblem) -> np.ndarray:
        return project(other, wanted, scores).ranks

    chosen = limit.choose(problem, plan)
    ranks = plan(chosen)
    assert ranks.any()
    assert limit.fits(ranks)
    assert unit_cost(problem.cost, ranks) <= problem.limit
    first = plan(problem)
    if limit.fits(first):
        assert chosen is problem, "nothing changes where second runs leave time"
    else:
        assert plan_cost(problem.cost, ranks) < plan_cost(problem.cost, first)
        assert len(fewest(ranks)) <= len(fewest(first))


def test_the_plan_is_hardly_smaller_than_it_must_be() -> None:
    limit = TimeLimit(step_time(), 15.0, fewest)
    ranks = uniform_ranks(limit.choose(problem_of(limit), uniform_ranks))
    assert limit.fits(ranks)
    lowest = int(BLOCKS[ranks > 0].min())
    one_lower = np.where(lowest - 1 <= BLOCKS, 1, 0)
    assert not limit.fits(one_lower), "a layer more would not fit at any rank"


def test_layers_that_are_not_chosen_need_no_search() -> None:
    limit = TimeLimit(step_time(), 9.0)
    problem = problem_of(limit)
    assert limit.choose(problem, lambda other: pytest.fail("no plan is needed")) is problem


def test_a_time_that_fits_nothing_tells_the_smallest() -> None:
    limit = TimeLimit(step_time(), 5.0)
    with pytest.raises(BudgetError) as error:
        check_budget(problem_of(limit), [f"module{index}" for index in range(MODULES)])
    text = str(error.value)
    assert "The time of 5 s per step is too small for any adapter. The smallest that works is 8.11 s" in text
    assert "(only rank 1 on 'module15')" in text
    assert "Every plan takes 6 s of it" in text
    enough = TimeLimit(step_time(), 8.11)
    check_budget(problem_of(enough), ["name"] * MODULES)


def test_bytes_that_fit_nothing_are_told_in_bytes() -> None:
    limit = TimeLimit(step_time(), 100.0)
    with pytest.raises(
        BudgetError, match=r"The budget of 1005 B per step is too small for any adapter.*1010 B.*peak is at loss"
    ):
        check_budget(problem_of(limit, 1005.0), ["name"] * MODULES)


def test_second_runs_that_fit_no_plan() -> None:
    def everything(ranks: np.ndarray) -> tuple[str, ...]:
        return NAMES

    limit = TimeLimit(step_time(), 9.0, everything)
    with pytest.raises(BudgetError, match=r"9 s per step is too short for any plan .* takes 9.11 s, with the gradient"):
        limit.choose(problem_of(limit), uniform_ranks)
    with pytest.raises(BudgetError, match=r"The fastest takes 9\.11 s"):
        limit.check(problem_of(limit))
    TimeLimit(step_time(), 9.2, everything).check(problem_of(limit))


def with_high_ranks(limit: TimeLimit) -> IntArray:
    """A plan that spends the time on ranks of few modules."""
    problem = problem_of(limit)
    limit.check(problem)
    return project(problem, np.where(BLOCKS >= LAYERS - 2, 64, 0), np.zeros(MODULES)).ranks


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_a_plan_is_timed_until_its_prediction_holds(factor: float) -> None:
    """Ranks take more or less than predicted: a share of what exceeds the forward pass."""
    given, timed = TimeLimit(step_time(), 12.0), []

    def real(ranks: IntArray) -> float:
        return 6.0 + factor * (given.of(ranks) - 6.0)

    def measured(ranks: IntArray) -> float:
        timed.append(ranks)
        return real(ranks) / 20.0

    limit = given.agreed(with_high_ranks, measured, 20.0)
    ranks = with_high_ranks(limit)
    assert limit.seconds == 12.0
    assert real(ranks) == pytest.approx(limit.of(ranks), rel=SETTLED)
    assert limit.of(ranks) <= 12.0 < limit.of(ranks) * 1.03 if factor == 1.0 else real(ranks) <= 12.0 * (1 + SETTLED)
    assert len(timed) == 1 if factor == 1.0 else 1 < len(timed) <= CHECKS


def test_a_plan_that_is_too_slow_where_no_smaller_one_is_left() -> None:
    given = TimeLimit(step_time(), 8.2)
    limit = given.agreed(with_high_ranks, lambda ranks: 1.0, 20.0)
    assert limit is given, "more than twice the time fits no plan, so the prediction stands"


def test_the_nearest_prediction_is_kept_where_none_holds() -> None:
    shares, timed = iter([1.3, 0.7, 1.1, 0.8]), []
    given = TimeLimit(step_time(), 12.0)

    def measured(ranks: IntArray) -> float:
        timed.append(ranks.tolist())
        return next(shares) * predicted[-1].of(ranks) / 20.0

    predicted: list[TimeLimit] = []

    def plan(limit: TimeLimit) -> IntArray:
        predicted.append(limit)
        return with_high_ranks(limit)

    limit = given.agreed(plan, measured, 20.0)
    assert len(timed) == CHECKS
    assert limit is predicted[2], "10 % off"
    assert with_high_ranks(limit).tolist() == timed[2]


def test_it_is_saved_and_read_and_without_a_limit_plans_are_told_beside_plain_lora() -> None:
    limit, ranks = TimeLimit(step_time(), 15.0), np.full(MODULES, 8)
    seconds, again = limit.of(ranks), TimeLimit.from_state(limit.state())
    assert (again.seconds, again.of(ranks)) == (15.0, seconds)
    assert again.text(ranks) == f"a step takes {seconds:.3g} s of 15 s"
    again = TimeLimit.from_state(TimeLimit(step_time(), 64 * seconds, beside=2 * seconds).state())
    assert again.text(ranks) == f"a step takes {seconds:.3g} s, 50% of the time with rank 8 on all modules"
