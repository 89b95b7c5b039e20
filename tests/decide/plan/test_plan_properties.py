"""What every plan keeps to, on hundreds of random problems; and plans are those of the slow planner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.cost.cost import ParameterCost, plan_cost
from rankpilot.decide.plan.plan import pack, project
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.lora.spec import ModuleSpec, RankLadder

from . import slow_plan
from .synthetic_costs import LAYER, random_cost, reordered, transformer_cost

LADDERS = (RankLadder(), *(RankLadder(ranks) for ranks in ((0, 1, 2, 3), (0, 4, 8, 16), (0, 5, 8, 9), (0, 2))))


def random_blocks(generator, count):
    """Layers of modules that stand in the forward order, 0 at the bottom."""
    numbers = np.sort(generator.integers(0, generator.integers(1, count + 1), size=count))
    return np.unique(numbers, return_inverse=True)[1]


def random_problem(generator, make_cost, largest=12):
    """A random problem: ranks anywhere, some pinned or bounded, a budget from nothing to more than everything."""
    count = int(generator.integers(1, largest + 1))
    blocks = random_blocks(generator, count)
    by = generator.permutation(count) if generator.random() < 0.5 else np.arange(count)
    max_ranks = generator.integers(1, 80, size=count)
    if make_cost is ParameterCost:
        cost = ParameterCost(generator.integers(2, 100, size=(1, count)).astype(np.float64))
    elif make_cost is transformer_cost:
        layers = max(1, largest // len(LAYER))
        cost, blocks, max_ranks = transformer_cost(generator, layers, checkpointing=generator.random() < 0.5)
        count = len(blocks)
        by = np.arange(count)
    else:
        cost = reordered(make_cost(generator, blocks), by)
    ladder = LADDERS[generator.integers(len(LADDERS))]
    ranks = generator.integers(0, np.minimum(max_ranks, ladder.ranks[-1]) + 1)
    if generator.random() < 0.8:  # else off the ladder, as after a uniform run
        ranks = ladder.array[ladder.rung(ranks)]
    pinned = generator.random(count) < generator.choice([0.1, 0.5]) if generator.random() < 0.3 else None
    max_step = (None, 1, 2, 3)[generator.integers(4)]
    problem = AllocationProblem(ranks, max_ranks, blocks[by], cost, 0.0, ladder, max_step, pinned)
    hysteresis = float(generator.choice([0.0, 0.2]))
    problem = replace(problem, hysteresis=hysteresis, **random_bounds(generator, ladder, count))
    return replace(problem, limit=random_limit(generator, problem))


def random_bounds(generator, ladder, count):
    """Bounds of a few modules, or none; some of them pins."""
    if generator.random() < 0.6:
        return {}
    two = np.sort(generator.integers(0, len(ladder.ranks), size=(2, count)), axis=0)
    free = generator.random((2, count)) < generator.choice([0.5, 0.9])
    low, high = ladder.array[np.where(free, [[0], [ladder.top]], two)]
    return ({"low": low}, {"high": high}, {"low": low, "high": high})[generator.integers(3)]


def random_limit(generator, problem):
    """Any share of the price of everything, or just what some plan costs."""
    if generator.random() < 0.2:
        return plan_cost(problem.cost, problem.ladder.array[generator.integers(0, problem.tops + 1)])
    return plan_cost(problem.cost, problem.ladder.array[problem.tops]) * generator.uniform(0, 1.1)


def random_wish(generator, problem):
    """Wanted ranks and scores; scores with ties, far apart, all equal, or in single precision."""
    count = len(problem.ranks)
    deltas = generator.integers(-12, 13, size=count)
    kinds = (
        lambda: generator.normal(size=count),
        lambda: generator.normal(scale=5, size=count).astype(np.float32),
        lambda: generator.integers(-1, 2, size=count).astype(np.float64),
        lambda: np.zeros(count),
    )
    return problem.ladder.step(problem.ranks, deltas), kinds[generator.integers(len(kinds))]()


def least_of(problem):
    """The ranks that the lower bounds leave no way below, (modules,)."""
    return problem.ladder.array[slow_plan.lowest_rungs(problem)]


def check_kept(problem, plan):
    """Inside the budget, unless not even the lower bounds are."""
    assert plan.cost == plan_cost(problem.cost, plan.ranks)
    assert np.isin(plan.ranks, problem.ladder.array).all()
    if problem.pinned is None and plan_cost(problem.cost, least_of(problem)) > problem.limit:
        assert (plan.ranks == least_of(problem)).all()
    elif not problem.fits(plan.ranks):  # for a module that must neither change nor go
        bound = problem.pinned & (least_of(problem) > 0)
        assert not problem.fits(np.where(bound, np.maximum(least_of(problem), plan.ranks), least_of(problem)))


def check_spent(problem, plan):
    """No module that is free to rise can go one rung further."""
    _, upper = slow_plan.bounds_of(problem)
    rungs = problem.ladder.rung(plan.ranks)
    free = (rungs < upper) & ~(problem.pinned if problem.pinned is not None else np.zeros(len(rungs), dtype=bool))
    for module in np.flatnonzero(free):
        further = plan.ranks.copy()
        further[module] = problem.ladder.ranks[rungs[module] + 1]
        assert not problem.fits(further), f"module {module} could still rise"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_cost", "largest", "problems"),
    [(random_cost, 14, 300), (ParameterCost, 14, 300), (transformer_cost, 21, 80), (transformer_cost, 140, 2)],
)
def test_plans_are_those_of_the_slow_planner_keep_to_the_budget_and_spend_it(make_cost, largest, problems):
    generator = np.random.default_rng(3)
    for _ in range(problems):
        problem = random_problem(generator, make_cost, largest)
        wanted, scores = random_wish(generator, problem)
        rank_floor = generator.uniform(0.1, 70)
        assert pack(problem, scores, rank_floor).tolist() == slow_plan.pack(problem, scores, rank_floor).tolist()
        plan, expected = (planner(problem, wanted, scores) for planner in (project, slow_plan.project))
        assert plan.clipped.tolist() == expected.clipped.tolist()
        assert plan.ranks.tolist() == expected.ranks.tolist()
        assert plan.cost == expected.cost
        check_kept(problem, plan)
        check_spent(problem, plan)


@pytest.mark.parametrize(("lead", "first", "later"), [(0.1, [4, 8], [8, 4]), (0.5, [4, 8], [4, 8])])
def test_later_decisions_alone_favour_the_ranks_in_place(lead, first, later):
    """The first one owes nothing to the ranks that the probe has left."""
    modules = [ModuleSpec(name, block=0, d_in=64, d_out=64) for name in ("q_proj", "v_proj")]
    cost, now, scores = ParameterCost.of(modules), np.array([8, 4]), np.array([0.0, lead])
    for max_step, expected in ((None, first), (2, later)):
        problem = AllocationProblem.of(modules, cost, plan_cost(cost, now), ranks=now, max_step=max_step)
        assert project(problem, pack(problem, scores, 1.0), scores).ranks.tolist() == expected
