"""The plan with the most utility: against a search of everything, and what it keeps to."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from rankpilot.common.errors import ConfigError
from rankpilot.cost.cost import ParameterCost, plan_cost
from rankpilot.decide.plan.plan import pack
from rankpilot.decide.plan.problem import GAP, AllocationProblem, best_plan
from rankpilot.lora.spec import RankLadder

from ...cases import first_cases
from .synthetic_costs import reordered, transformer_cost


def utility_problem(generator, ladder, count):
    """Some modules of a small model."""
    layers = int(generator.integers(2, 5))
    cost, blocks, max_ranks = transformer_cost(generator, layers, checkpointing=generator.random() < 0.4)
    by = np.sort(generator.choice(len(blocks), size=count, replace=False))
    blocks = np.unique(blocks[by], return_inverse=True)[1]
    problem = AllocationProblem(np.zeros(count, int), max_ranks[by], blocks, reordered(cost, by), 0.0, ladder)
    return replace(problem, limit=some_limit(generator, problem))


def some_limit(generator, problem):
    """20 to 90 % of what everything adds to nothing."""
    nothing, everything = (
        plan_cost(problem.cost, problem.ladder.array[rungs]) for rungs in (problem.rungs, problem.tops)
    )
    return float(int(nothing + (everything - nothing) * generator.uniform(0.2, 0.9)))


def random_utility(generator, problem):
    """exp(score) times log(1 + rank / c), also with most modules worth nothing, saturating, or any falling returns."""
    count, ranks = len(problem.ranks), problem.ladder.array
    scores = np.exp(generator.normal(scale=generator.choice([0.3, 1, 2]), size=(count, 1)))
    unit = generator.choice([1, 4, 16, 64])
    steps = np.sort(generator.exponential(size=(count, len(ranks) - 1)), axis=1)[:, ::-1]
    kinds = (
        scores * np.log1p(ranks / unit),
        scores * np.log1p(ranks / unit) * (generator.random((count, 1)) < 0.4),
        scores * (1 - np.exp(-ranks / unit)),
        scores * np.concatenate([np.zeros((count, 1)), np.cumsum(steps, axis=1)], axis=1),
    )
    return kinds[generator.integers(4)]


def worth(problem, utility, ranks):
    """Utility of a plan."""
    return utility[np.arange(len(ranks)), problem.ladder.rung(ranks)].sum()


def full_search(problem, utility):
    """The highest utility of any plan that fits; the plans of two halves of the modules are combined as a table."""
    count, cost = len(problem.ranks), problem.cost
    halves = []
    for modules in np.array_split(np.arange(count), 2):
        plans = np.array(list(product(range(len(problem.ladder.ranks)), repeat=len(modules))))
        plans = plans[(plans <= problem.tops[modules]).all(axis=1)]
        sets, which = np.unique(plans > 0, axis=0, return_inverse=True)
        covered = (sets @ cost.needs[:, modules].T.astype(float)) > 0
        price = cost.per_rank[:, modules] @ problem.ladder.array[plans].T
        halves.append((utility[modules, plans].sum(axis=1), price, covered, which.ravel()))
    (worth_a, price_a, covered_a, which_a), (worth_b, price_b, covered_b, which_b) = halves
    fits = np.ones((len(worth_a), len(worth_b)), dtype=bool)
    for moment, held in enumerate(cost.group_bytes):
        both = (covered_a * held) @ covered_b.T
        fixed = (covered_a @ held)[:, None] + covered_b @ held - both
        ranks = price_a[moment][:, None] + price_b[moment]
        fits &= fixed[which_a][:, which_b] + ranks <= problem.limit - cost.constant[moment]
    return np.where(fits, worth_a[:, None] + worth_b, 0.0).max()


@pytest.mark.slow
@pytest.mark.parametrize("cases", first_cases(1, [30, 160]))
def test_the_utility_is_that_of_a_full_search(cases):
    generator = np.random.default_rng(0)
    shares = []
    for case in range(cases):
        ladder, count = ((RankLadder((0, 4, 16)), 12), (RankLadder((0, 2, 8, 32)), 10))[case % 2]
        problem = utility_problem(generator, ladder, count)
        utility = random_utility(generator, problem)
        best = full_search(problem, utility)
        reached = worth(problem, utility, best_plan(problem, utility))
        assert reached <= best * (1 + 1e-9)
        shares.append(reached / best if best > 0 else 1.0)
    assert min(shares) >= 1 - GAP
    assert np.mean(np.array(shares) > 1 - 1e-9) >= 0.9


@pytest.mark.parametrize("seed", first_cases(2, [0, 3, 1, 2, *range(4, 12)]))
def test_larger_models_get_at_least_what_scores_would_get(seed):
    """Utility exp(score) log(1 + rank / c) is what `pack` serves too, if the floor is the best of many."""
    generator = np.random.default_rng(seed)
    cost, blocks, max_ranks = transformer_cost(generator, 8, checkpointing=seed % 2 == 0)
    problem = AllocationProblem(np.zeros_like(blocks), max_ranks, blocks, cost, 0.0, RankLadder())
    problem = replace(problem, limit=some_limit(generator, problem))
    scores = generator.normal(size=len(blocks))
    utility = np.exp(scores)[:, None] * np.log1p(problem.ladder.array / 8)
    ranks = best_plan(problem, utility)
    packed = max(worth(problem, utility, pack(problem, scores, rank_floor)) for rank_floor in (1, 2, 4, 8, 16, 32))
    assert problem.fits(ranks)
    assert worth(problem, utility, ranks) >= packed * (1 - GAP)


@pytest.mark.parametrize("seed", first_cases(9, range(30)))
def test_the_best_plan_keeps_to_the_bounds_and_spends_the_budget(seed):
    generator = np.random.default_rng(seed)
    problem = utility_problem(generator, RankLadder(), 14)
    low, high = np.zeros(14, dtype=int), np.full(14, 64)
    low[3], high[3], low[9], high[5] = 8, 8, 2, 4
    problem = replace(problem, low=low, high=high, max_ranks=np.full(14, 64))
    utility = random_utility(generator, problem)
    ranks = best_plan(problem, utility)
    assert (ranks == best_plan(replace(problem, ranks=np.full(14, 8), max_step=1), utility)).all()
    if not problem.fits(problem.ladder.array[problem.bottoms]):
        assert (ranks == problem.ladder.array[problem.bottoms]).all()
        return
    assert problem.fits(ranks)
    assert (ranks >= low).all()
    assert (ranks <= high).all()
    rungs = problem.ladder.rung(ranks)
    for module in np.flatnonzero(rungs < problem.tops):
        further = ranks.copy()
        further[module] = problem.ladder.ranks[rungs[module] + 1]
        assert not problem.fits(further)


PARAMETERS = ParameterCost(np.array([[10.0, 20.0, 10.0]]))
THREE = AllocationProblem(np.zeros(3, int), np.full(3, 64), np.arange(3), PARAMETERS, 160.0, RankLadder((0, 4, 8)))


@pytest.mark.parametrize(("limit", "rank"), [(160.0, 4), (1000.0, 8), (39.0, 0)])
def test_parameters_are_bytes_without_groups(limit, rank):
    utility = np.array([[0.0, 1, 1.5], [0, 3, 3.1], [0, 2, 2.2]])
    assert best_plan(replace(THREE, limit=limit), utility).tolist() == [rank] * 3


@pytest.mark.parametrize(
    ("utility", "message"),
    [
        (np.zeros((2, 3)), "a number for each module and rung"),
        (np.ones((3, 3)), "0 at rank 0, finite, and non-decreasing"),
        (np.array([[0.0, 1, np.inf]] * 3), "0 at rank 0, finite, and non-decreasing"),
        (np.array([[0.0, 2, 1]] * 3), "0 at rank 0, finite, and non-decreasing"),
    ],
)
def test_utilities_that_make_no_sense(utility, message):
    with pytest.raises(ConfigError, match=message):
        best_plan(THREE, utility)
