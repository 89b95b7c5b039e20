"""Plans: inside the budget, nothing left over, in the order of the scores."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.common.errors import BudgetError, ConfigError
from rankpilot.cost.budget import Budget
from rankpilot.cost.cost import ByteCost, ParameterCost, plan_cost
from rankpilot.decide.plan.plan import check_budget, pack, project, uniform_ranks
from rankpilot.decide.plan.problem import AllocationProblem, rank_bounds
from rankpilot.lora.spec import ModuleSpec, RankLadder

from .synthetic_costs import random_cost
from .test_plan_properties import random_problem, random_wish

SEEDS = st.integers(0, 2**32 - 1)
TILTS = st.one_of(st.just(0.0), st.floats(-8, 8), st.just(100.0))


@st.composite
def problems(draw):
    """A random problem without bounds, and wanted ranks and scores."""
    generator = np.random.default_rng(draw(SEEDS))
    problem = random_problem(generator, draw(st.sampled_from([random_cost, ParameterCost])))
    able = np.maximum(problem.max_ranks, problem.ladder.ranks[1])
    free = replace(problem, pinned=None, low=None, high=None, max_ranks=able)
    return free, *random_wish(generator, free)


@given(problems(), st.floats(0.1, 100), TILTS)
def test_packed_ranks_fit(drawn, rank_floor, depth_bias):
    problem, _, scores = drawn
    ranks = pack(problem, scores, rank_floor, depth_bias)
    assert problem.fits(ranks) or not ranks.any()
    assert np.isin(ranks, problem.ladder.array).all()
    assert (ranks <= problem.max_ranks).all()


@given(problems(), TILTS)
def test_whatever_budget_passes_the_check_gives_a_plan(drawn, depth_bias):
    problem, wanted, scores = drawn
    try:
        check_budget(problem, [f"module.{i}" for i in range(len(problem.ranks))])
    except BudgetError:
        assert not pack(problem, scores, 4.0, depth_bias).any()
        return
    assert pack(problem, scores, 4.0, depth_bias).any()
    assert uniform_ranks(problem).any()
    assert problem.fits(uniform_ranks(problem))
    assert project(replace(problem, max_step=None), wanted, scores).ranks.any()


@given(problems())
def test_the_budget_that_the_message_names_works(drawn):
    problem, *_ = drawn
    names = [f"module.{i}" for i in range(len(problem.ranks))]
    poor = replace(problem, limit=0.5)
    with pytest.raises(BudgetError, match="is too small for any adapter") as caught:
        check_budget(poor, names)
    match = re.search(r"smallest that works is (.+?) \(only rank (\d+) on '(module\.\d+)'\)", str(caught.value))
    named = Budget.parse(match[1].strip("'").replace("parameters", "params"))
    assert named.kind == ("parameters" if isinstance(problem.cost, ParameterCost) else "bytes")
    check_budget(replace(problem, limit=named.value), names)
    one = np.zeros_like(problem.ranks)
    one[names.index(match[3])] = int(match[2])
    assert plan_cost(problem.cost, one) <= named.value
    # And it is not much more than needed.
    with pytest.raises(BudgetError):
        check_budget(replace(problem, limit=plan_cost(problem.cost, one) - 1), names)


def alike(count, limit, *, blocks=1):
    """Modules of one price."""
    cost, layers = ParameterCost(np.full((1, count), 10.0)), np.arange(count) * blocks // count
    return AllocationProblem(np.zeros(count, int), np.full(count, 64), layers, cost, float(limit), RankLadder())


@given(st.integers(2, 12), st.integers(10, 2000), SEEDS, st.sampled_from([1.0, 8.0, 16.0]))
def test_without_tilt_the_best_scores_are_adapted_wherever_they_are(count, limit, seed, rank_floor):
    scores = np.random.default_rng(seed).normal(scale=2, size=count)
    ranks = pack(alike(count, limit, blocks=min(count, 3)), scores, rank_floor, 0.0)
    adapted = ranks > 0
    assert adapted.any()
    assert scores[adapted].min() > scores[~adapted].max(initial=-np.inf)
    assert (np.diff(ranks[np.argsort(scores)]) >= 0).all()


@given(problems(), st.floats(0.1, 100))
def test_with_a_large_tilt_and_equal_scores_it_is_top_down(drawn, rank_floor):
    fresh, scores = drawn[0].fresh(), np.zeros(len(drawn[0].ranks))
    packed = pack(fresh, scores, rank_floor, 100.0)
    usual = pack(fresh, scores, rank_floor)
    assert (project(fresh, packed, scores).ranks == project(fresh, usual, scores).ranks).all()


@given(problems(), st.floats(0.1, 100))
def test_a_large_tilt_adapts_layers_from_the_top_down(drawn, rank_floor):
    problem, _, scores = drawn
    count, blocks = len(scores), problem.blocks
    same_price = replace(problem, cost=ParameterCost(np.full((1, count), 10.0)), max_ranks=np.full(count, 64))
    adapted = pack(same_price, scores, rank_floor, 100.0) > 0
    for block in np.unique(blocks[adapted]):
        assert adapted[blocks > block].all(), "all above it come first"


def test_equal_scores_without_tilt_go_from_the_top_down_too():
    assert pack(alike(6, 10 * 4, blocks=3), np.zeros(6), 1.0, 0.0).tolist() == [0, 0, 1, 1, 1, 1]


def test_tilt_is_what_a_layer_is_worth_in_score():
    problem = alike(3, 10 * 8, blocks=3)
    for lower, depth_bias, expected in ((1.0, 0.9, 0), (1.0, 1.1, 2), (-1.0, -0.9, 2), (-1.0, -1.1, 0)):
        ranks = pack(problem, np.array([2 * lower, lower, 0.0]), 8.0, depth_bias)
        assert np.flatnonzero(ranks).tolist() == [expected]


def test_the_message_for_bytes_says_what_takes_them():
    per_rank, needs = np.array([[1000.0, 1234.0]] * 2), np.array([[True, False], [True, True]])
    moments, groups = ("the loss", "the backward pass of layer 1"), np.array([[9e6, 1e6], [9e6, 2e6]])
    cost = ByteCost(moments, np.array([5000.0, 8000.0]), per_rank, groups, needs)
    problem = AllocationProblem(np.zeros(2, int), np.array([8, 8]), np.array([0, 1]), cost, 1e6, RankLadder())
    with pytest.raises(BudgetError) as caught:
        check_budget(problem, ["bottom", "top"])
    assert str(caught.value) == (
        "The budget of 1 MB (976.6 KiB) per step is too small for any adapter. The smallest that works is "
        "'1.917 MiB step' (only rank 1 on 'top'). "
        "The peak is at the backward pass of layer 1. 7.812 KiB of it is for tensors unrelated to the adapter "
        "(such as other trainable parameters), 1.907 MiB of it is for tensors saved or computed for backward "
        "(activations, logits), 1.205 KiB of it is for the adapter itself. A smaller per-device batch, shorter "
        "sequences, or gradient checkpointing if it is off would lower it."
    )


def test_a_share_that_fits_nothing_names_the_smallest_that_works():
    """What lowers the bytes of a plan lowers what the share is of as well."""
    none = np.zeros((0, 2), dtype=bool)
    cost = ByteCost(("the loss",), np.array([9e6]), np.array([[1e5, 2e5]]), np.array([[]]), none)
    whole = plan_cost(cost, np.array([8, 8]))
    problem = AllocationProblem(np.zeros(2, int), np.array([8, 8]), np.array([0, 1]), cost, 0.5 * whole, RankLadder())
    with pytest.raises(
        BudgetError, match=r"smallest that works is '8\.679 MiB step', or 80% as a share \(only rank 1 on "
    ) as caught:
        check_budget(problem, ["bottom", "top"], 0.5)
    assert "batch" not in str(caught.value)
    check_budget(replace(problem, limit=0.8 * whole), ["bottom", "top"])
    with pytest.raises(BudgetError, match=r"is 2 parameters, or 34% as a share \("):
        check_budget(replace(alike(3, 1.5), cost=ParameterCost(np.full((1, 3), 2.0))), list("abc"), 0.25)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([1, 2], None, "low must have a rank of at least 0 for each of the 4 modules; got 2"),
        (None, [1, 2, 3, -1], "high must have a rank of at least 0 for each of the 4 modules; got 4 from -1"),
        ([0, 8, 0, 0], [4, 4, 4, 4], "module 1 allow no rank: low 8 is above high 4"),
        ([0, 0, 3, 0], [4, 4, 3, 4], "module 2 allow no rank: no rank of .* is between 3 and 3"),
    ],
)
def test_bounds_that_make_no_sense(low, high, message):
    bounds = {name: None if bound is None else np.array(bound) for name, bound in (("low", low), ("high", high))}
    with pytest.raises(ConfigError, match=message):
        replace(alike(4, 100), **bounds)


def test_lower_bounds_above_the_budget():
    problem = replace(alike(4, 10 * 10, blocks=2), low=np.array([0, 8, 4, 0]))
    with pytest.raises(
        BudgetError, match=r"budget of 100 is too small for the lower bounds.* of 2 modules.*is 120 parameters"
    ):
        check_budget(problem, list("abcd"))
    assert project(problem, np.zeros(4, dtype=np.int64), np.zeros(4)).ranks.tolist() == [0, 8, 4, 0]
    with pytest.raises(
        BudgetError, match=r"lower bound on the rank of 'b'\. The smallest that works is 160 parameters"
    ):
        check_budget(replace(problem, low=np.array([0, 16, 0, 0])), list("abcd"))
    check_budget(replace(problem, limit=120.0), list("abcd"))
    with pytest.raises(BudgetError, match="upper bounds leave no module a rank above 0"):
        check_budget(replace(problem, low=None, high=np.zeros(4, dtype=int)), list("abcd"))


MODULES = [ModuleSpec(f"layers.{layer}.{kind}", layer, 16, 64) for layer in range(2) for kind in ("q_proj", "up_proj")]


def bounds_of(bounds):
    low, high = rank_bounds(MODULES, bounds)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def test_of_several_entries_for_one_module_the_last_counts():
    assert bounds_of({"q_proj": (0, 4), "layers.0.q_proj": (8, 16)}) == [(8, 16), (0, 16), (0, 4), (0, 16)]
    assert bounds_of({"layers.0.q_proj": (8, 16), "q_proj": (0, 4)}) == [(0, 4), (0, 16), (0, 4), (0, 16)]


def test_a_module_that_cannot_have_the_least_rank_has_the_most_that_it_can():
    assert bounds_of({"q_proj": (0, 64), "layers.1.q_proj": (32, 64)})[2] == (16, 64)
