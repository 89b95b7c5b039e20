"""Placement rules: what they are said to be, inside the budget and the bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.cost.cost import ByteCost, ParameterCost, plan_cost
from rankpilot.decide.plan.plan import pack, top_down, uniform_ranks
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.lora.spec import RankLadder

from .synthetic_costs import transformer_cost


def transformer_problem(seed, layers=5):
    """A model at rank 8 with a budget for any share of everything."""
    generator = np.random.default_rng(seed)
    cost, blocks, max_ranks = transformer_cost(generator, layers, checkpointing=seed % 2 == 1)
    problem = AllocationProblem(np.full(len(blocks), 8), max_ranks, blocks, cost, 0.0, RankLadder(), hysteresis=0.2)
    least, most = (plan_cost(cost, ranks) for ranks in (0 * blocks, problem.ladder.array[problem.tops]))
    return replace(problem, limit=float(int(least + (most - least) * generator.uniform(0, 1))))


def simple_problem(limit, **options):
    """Three layers of two modules at 10 parameters a rank."""
    blocks = np.array([0, 0, 1, 1, 2, 2])
    cost = ParameterCost(np.full((1, 6), 10.0))
    return AllocationProblem(np.zeros(6, int), np.full(6, 64), blocks, cost, float(limit), RankLadder(), **options)


def test_uniform_takes_the_most_layers_that_can_have_a_rank_and_then_the_largest_rank():
    def free(limit):
        problem = simple_problem(limit)
        needs = np.repeat(np.eye(3) > 0, 2, axis=1)  # bytes, and none for a layer with an adapter
        return replace(problem, cost=ByteCost(("peak",), np.zeros(1), problem.cost.per_rank, np.zeros((1, 3)), needs))

    assert uniform_ranks(free(10 * 8 * 4 + 50)).tolist() == [0, 0, 9, 9, 9, 9]
    assert uniform_ranks(free(10 * 8 * 6)).tolist() == [8] * 6
    assert uniform_ranks(free(10 * 8)).tolist() == [0, 0, 0, 0, 4, 4]
    assert uniform_ranks(simple_problem(10 * 16)).tolist() == [2] * 6
    assert uniform_ranks(simple_problem(10 * 5)).tolist() == [0, 0, 1, 1, 1, 1]
    for problem in (free, simple_problem):
        assert uniform_ranks(problem(10)).sum() == 1
        assert uniform_ranks(problem(9)).sum() == 0


def test_top_down_puts_the_rest_on_single_modules_of_the_next_layer():
    assert top_down(simple_problem(10 * 16 * 5)).tolist() == [16, 0, 16, 16, 16, 16]
    assert top_down(simple_problem(10 * (16 * 5 + 2))).tolist() == [16, 2, 16, 16, 16, 16]


@pytest.mark.parametrize("seed", range(20))
def test_rules_keep_to_the_budget_and_the_bounds(seed):
    problem = transformer_problem(seed)
    count = len(problem.ranks)
    low = np.where(np.arange(count) == 3, 2, 0)
    bounded = replace(problem, low=low, high=np.where(np.arange(count) == count - 2, 4, 64))
    for rule in (top_down, uniform_ranks):
        assert problem.fits(rule(problem)) or not rule(problem).any()
        ranks = rule(bounded)
        assert bounded.fits(ranks) or (ranks == low).all()
        assert (ranks >= low).all()
        assert (ranks <= bounded.high).all()


@pytest.mark.parametrize("seed", range(20))
def test_uniform_is_the_one_that_a_full_search_finds(seed):
    problem = transformer_problem(seed)
    fitting_layers = [k for k in range(1, 6) if problem.fits(problem.uniform(8, 5 - k))]
    layers = max(fitting_layers, default=1)
    fitting = [r for r in range(1, problem.ladder.ranks[-1] + 1) if problem.fits(problem.uniform(r, 5 - layers))]
    expected = problem.uniform(fitting[-1], 5 - layers) if fitting else pack(problem, np.zeros(35), 1.0)
    assert uniform_ranks(problem).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_top_down_depends_on_no_current_rank_and_leaves_nothing(seed):
    problem = transformer_problem(seed)
    ranks = top_down(problem)
    assert ranks.tolist() == top_down(replace(problem, ranks=np.zeros_like(ranks), max_step=1)).tolist()
    rungs = problem.ladder.rung(ranks)
    for module in np.flatnonzero(rungs < problem.tops):
        further = ranks.copy()
        further[module] = problem.ladder.ranks[rungs[module] + 1]
        assert not problem.fits(further)
