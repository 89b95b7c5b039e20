"""Plans: inside the budget, nothing left over, in the order of the scores."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankpilot.errors import BudgetError
from rankpilot.lora.budget import Budget
from rankpilot.lora.ladder import RankLadder
from rankpilot.lora.memory import ByteCost, ParameterCost
from rankpilot.lora.plan import PlanProblem, check_budget, pack, project, uniform_ranks

LADDERS = (RankLadder(), RankLadder((0, 1, 2, 3)), RankLadder((0, 4, 8, 16)))


def byte_cost(generator, blocks):
    """A random cost that hangs together as a real one: adapting a module further down never costs less."""
    count = len(blocks)
    shared = np.arange(count)
    for module in range(1, count):  # q, k and v read one input
        if blocks[module] == blocks[module - 1] and generator.random() < 0.4:
            shared[module] = shared[module - 1]
    inputs = generator.integers(0, 200, size=count)[shared].astype(float)
    free = generator.random(count) < 0.5
    extra = np.where(np.arange(count)[None, :] > np.arange(count)[:, None], np.where(free, 0.0, inputs), 0.0)
    together = generator.integers(0, 50, size=count).astype(float)
    # Going down by one saves at least what was counted for the module above and its company.
    steps = inputs + together.max() + generator.integers(0, 300, size=count)
    return ByteCost(
        per_rank=generator.integers(1, 400, size=count).astype(float),
        constant=float(generator.integers(0, 1000)),
        order=np.arange(count),
        chain=np.cumsum(steps[::-1])[::-1].copy(),
        extra=extra,
        together=together,
        shared=shared,
        block=blocks,
    )


@st.composite
def problems(draw, costs=("bytes", "parameters"), ladders=LADDERS):
    """A random problem, its current ranks anywhere, its budget from hopeless to plenty."""
    count = draw(st.integers(1, 10))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = np.sort(generator.integers(0, draw(st.integers(1, 4)), size=count))
    blocks = np.unique(blocks, return_inverse=True)[1]
    ladder = draw(st.sampled_from(ladders))
    widths = generator.integers(2, 80, size=count)
    if draw(st.sampled_from(costs)) == "bytes":
        cost = byte_cost(generator, blocks)
    else:
        cost = ParameterCost(generator.integers(2, 100, size=count).astype(float))
    max_ranks = np.maximum(widths, ladder.ranks[1])
    ranks = ladder.array[generator.integers(0, ladder.rung(max_ranks) + 1)]
    problem = PlanProblem(ranks, max_ranks, blocks, cost, 0.0, ladder, draw(st.sampled_from([None, 1, 2, 3])))
    everything = problem.price(ladder.array[problem.tops])
    return replace(problem, limit=float(int(everything * draw(st.floats(0, 1.1)))))


def wishes(problem, seed):
    generator = np.random.default_rng(seed)
    count = len(problem.ranks)
    return generator.integers(-12, 13, size=count), generator.normal(size=count)


def check_fully_spent(problem, ranks, upper):
    """No module can go one rung further."""
    rungs = problem.ladder.rung(ranks)
    for module in range(len(ranks)):
        if rungs[module] < upper[module]:
            further = ranks.copy()
            further[module] = problem.ladder.ranks[rungs[module] + 1]
            assert not problem.fits(further), f"module {module} could still rise"


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=300)
@given(problems(), SEEDS)
def test_a_plan_keeps_to_the_budget_and_spends_it(problem, seed):
    deltas, scores = wishes(problem, seed)
    plan = project(problem, deltas, scores)
    nothing = problem.price(np.zeros_like(problem.ranks))
    if nothing <= problem.limit:
        assert problem.fits(plan.ranks)
    else:
        assert not plan.ranks.any()
    assert plan.cost == problem.price(plan.ranks)
    assert plan.ranks.dtype == np.int64
    assert np.isin(plan.ranks, problem.ladder.array).all()
    assert (plan.ranks <= problem.max_ranks).all()

    now = problem.ladder.rung(problem.ranks)
    reach = problem.ladder.top if problem.max_step is None else problem.max_step
    upper = np.minimum(now + reach, problem.tops)
    rungs = problem.ladder.rung(plan.ranks)
    assert (rungs <= upper).all()
    check_fully_spent(problem, plan.ranks, upper)

    lower = np.maximum(now - reach, 0)
    if problem.fits(problem.ladder.array[lower]):
        assert (rungs >= lower).all()
    asked = problem.ladder.rung(plan.asked)
    assert (asked == np.clip(now + deltas, lower, upper)).all()


@given(problems(), SEEDS)
def test_plans_are_deterministic_and_leave_their_input_alone(problem, seed):
    deltas, scores = wishes(problem, seed)
    before = (problem.ranks.copy(), deltas.copy(), scores.copy())
    first, second = (project(problem, deltas, scores) for _ in range(2))
    assert (first.ranks == second.ranks).all()
    assert all((a == b).all() for a, b in zip(before, (problem.ranks, deltas, scores), strict=True))


@given(problems(), SEEDS)
def test_a_wish_that_fits_is_granted_and_only_added_to(problem, seed):
    deltas, scores = wishes(problem, seed)
    plan = project(problem, deltas, scores)
    if problem.fits(plan.asked):
        assert (plan.ranks >= plan.asked).all()


@given(problems(), SEEDS, st.floats(0.1, 100))
def test_packed_ranks_fit(problem, seed, floor):
    _, scores = wishes(problem, seed)
    ranks = pack(problem, scores, floor)
    assert problem.fits(ranks) or not ranks.any()
    assert np.isin(ranks, problem.ladder.array).all()
    assert (ranks <= problem.max_ranks).all()


@given(problems(), SEEDS)
def test_whatever_budget_passes_the_check_gives_a_plan(problem, seed):
    deltas, scores = wishes(problem, seed)
    try:
        check_budget(problem, [f"module.{i}" for i in range(len(problem.ranks))])
    except BudgetError:
        assert not pack(problem, scores, 4.0).any()
        return
    assert pack(problem, scores, 4.0).any()
    assert uniform_ranks(problem).any()
    assert problem.fits(uniform_ranks(problem))
    assert project(problem.unbounded(), deltas, scores).ranks.any()


@given(problems(), SEEDS)
def test_the_budget_that_the_message_names_works(problem, seed):
    names = [f"module.{i}" for i in range(len(problem.ranks))]
    poor = replace(problem, limit=0.5)
    with pytest.raises(BudgetError, match="fits no adapter at all") as caught:
        check_budget(poor, names)
    found = re.search(r"smallest that works is (.+?) \(rank (\d+) on '(module\.\d+)' alone", str(caught.value))
    named = Budget.parse(found[1].replace("parameters", "params"))
    assert named.kind == ("parameters" if isinstance(problem.cost, ParameterCost) else "bytes")
    check_budget(replace(problem, limit=named.value), names)
    one = np.zeros_like(problem.ranks)
    one[names.index(found[3])] = int(found[2])
    assert problem.price(one) <= named.value
    # And it is not much more than needed.
    with pytest.raises(BudgetError):
        check_budget(replace(problem, limit=problem.price(one) - 1), names)


def alike(count, limit, *, blocks=1, ladder=LADDERS[0], ranks=None, max_step=None):
    """Modules of one price."""
    return PlanProblem(
        ranks=np.zeros(count, dtype=np.int64) if ranks is None else np.asarray(ranks),
        max_ranks=np.full(count, 64),
        blocks=np.arange(count) * blocks // count,
        cost=ParameterCost(np.full(count, 10.0)),
        limit=float(limit),
        ladder=ladder,
        max_step=max_step,
    )


@given(st.integers(1, 12), st.integers(10, 8000), st.sampled_from(LADDERS))
def test_equal_scores_give_equal_ranks_within_a_rung(count, limit, ladder):
    problem = alike(count, limit, ladder=ladder)
    for ranks in (
        project(problem, np.zeros(count, dtype=np.int64), np.zeros(count)).ranks,
        pack(problem, np.zeros(count), 1.0),
    ):
        rungs = problem.ladder.rung(ranks)
        assert rungs.max() - rungs.min() <= 1


@given(st.integers(2, 12), st.integers(10, 8000), SEEDS)
def test_a_higher_score_never_gets_fewer_ranks(count, limit, seed):
    scores = np.random.default_rng(seed).normal(scale=2, size=count)
    problem = alike(count, limit)
    order = np.argsort(scores)
    for ranks in (
        project(problem, np.zeros(count, dtype=np.int64), scores).ranks,
        project(problem, np.full(count, 12), scores).ranks,
        pack(problem, scores, 1.0),
        pack(problem, scores, 8.0),
    ):
        assert (np.diff(ranks[order]) >= 0).all()


def test_scores_are_log_ranks():
    """Twice the score ratio means about twice the rank."""
    ranks = pack(alike(4, 10 * (4 + 8 + 16 + 32)), np.log([4.0, 8, 16, 32]), 1.0)
    assert ranks.tolist() == [4, 8, 16, 32]


def test_the_top_layers_come_first_when_depth_costs():
    problem = alike(6, 10 * 8 * 4, blocks=3)
    assert pack(problem, np.zeros(6), 8.0).tolist() == [0, 0, 8, 8, 8, 8]
    assert (pack(problem, np.zeros(6), 1.0) > 0).all()


def test_a_lower_layer_is_adapted_in_part_by_score():
    problem = alike(6, 10 * 8 * 5, blocks=3)
    ranks = pack(problem, np.array([0.0, 0.1, 0, 0, 0, 0]), 8.0)
    assert (ranks > 0).tolist() == [False, True, True, True, True, True]


def test_an_expensive_top_layer_does_not_hide_a_cheap_one_below():
    problem = PlanProblem(
        ranks=np.zeros(2, dtype=np.int64),
        max_ranks=np.array([64, 64]),
        blocks=np.array([0, 1]),
        cost=ParameterCost(np.array([10.0, 5000.0])),
        limit=100.0,
        ladder=RankLadder(),
    )
    check_budget(problem, ["small", "head"])
    assert pack(problem, np.zeros(2), 4.0).tolist() == [8, 0]


def test_over_budget_the_lowest_score_gives_way_first():
    problem = alike(3, 10 * 18, ranks=[8, 8, 8], max_step=2)
    plan = project(problem, np.zeros(3, dtype=np.int64), np.array([2.0, 2.0, -2.0]))
    assert plan.asked.tolist() == [8, 8, 8]
    assert plan.ranks.tolist() == [8, 8, 2]


def test_max_step_gives_way_to_the_budget_alone():
    problem = alike(2, 10 * 2, ranks=[64, 64], max_step=1)
    assert project(problem, np.zeros(2, dtype=np.int64), np.zeros(2)).ranks.sum() == 2


def test_a_zero_wish_leaves_a_full_plan_alone():
    problem = alike(4, 10 * 32, ranks=[8, 8, 8, 8], max_step=2)
    plan = project(problem, np.zeros(4, dtype=np.int64), np.array([3.0, 0, 0, -3]))
    assert plan.ranks.tolist() == [8, 8, 8, 8]


def test_a_swap_moves_rank_from_one_module_to_another():
    problem = alike(2, 10 * 16, ranks=[8, 8], max_step=2)
    plan = project(problem, np.array([-2, 1]), np.array([-1.0, 1.0]))
    assert plan.ranks.tolist() == [4, 12]


def test_a_module_that_makes_others_cheaper_leaves_nothing_unspent():
    """Once module 0 is the lowest one, the top layer's interaction is no longer charged: 80 bytes for the others."""
    cost = ByteCost(
        per_rank=np.ones(3),
        constant=0.0,
        order=np.arange(3),
        chain=np.array([100.0, 100, 50]),
        extra=np.zeros((3, 3)),
        together=np.array([0.0, 80, 0]),
        shared=np.arange(3),
        block=np.array([0, 1, 1]),
    )
    problem = PlanProblem(np.array([0, 4, 4]), np.array([4, 64, 64]), cost.block, cost, 190.0, RankLadder())
    assert problem.fits(problem.ranks)
    plan = project(problem, np.zeros(3, dtype=np.int64), np.zeros(3))
    assert plan.ranks.tolist() == [4, 48, 32]
    check_fully_spent(problem, plan.ranks, problem.tops)


@given(problems(costs=("parameters",)))
def test_uniform_is_the_largest_whole_rank_that_fits(problem):
    ranks = uniform_ranks(problem)
    everywhere = [
        rank for rank in range(1, problem.ladder.ranks[-1] + 1) if problem.fits(np.minimum(rank, problem.max_ranks))
    ]
    if everywhere:
        assert (ranks == np.minimum(everywhere[-1], problem.max_ranks)).all()
    assert problem.fits(ranks)


def test_uniform_takes_the_top_layers_when_not_all_fit():
    problem = alike(6, 10 * 5, blocks=3)
    assert uniform_ranks(problem).tolist() == [0, 0, 1, 1, 1, 1]
    assert uniform_ranks(replace(problem, limit=10.0 * 13)).tolist() == [2, 2, 2, 2, 2, 2]
    assert uniform_ranks(replace(problem, limit=10.0)).sum() == 1
    assert uniform_ranks(replace(problem, limit=9.0)).sum() == 0


def test_the_message_for_bytes_says_what_takes_them():
    cost = ByteCost(
        per_rank=np.array([1000.0, 1234.0]),
        constant=5000.0,
        order=np.array([0, 1]),
        chain=np.array([9_000_000.0, 2_000_000.0]),
        extra=np.zeros((2, 2)),
        together=np.zeros(2),
        shared=np.array([0, 1]),
        block=np.array([0, 1]),
    )
    problem = PlanProblem(np.zeros(2, int), np.array([8, 8]), np.array([0, 1]), cost, 1e6, RankLadder())
    with pytest.raises(
        BudgetError,
        match=r"budget of 976.6 KiB fits no adapter.*is 1\.914 MiB \(rank 1 on 'top' alone\).*4.883 KiB of it"
        r" goes to what trains outside.*gradient checkpointing",
    ):
        check_budget(problem, ["bottom", "top"])


@pytest.mark.parametrize(("limit", "ranks"), [(400, [8, 4, 24, 4]), (90, [8, 0, 0, 1]), (70, [0, 2, 2, 2])])
def test_held_modules_keep_their_rank_or_are_dropped(limit, ranks):
    """The first module is held: others give way for it, and it goes only if it cannot fit at all."""
    problem = PlanProblem(
        ranks=np.array([8, 4, 4, 4]),
        max_ranks=np.array([32, 8, 32, 8]),
        blocks=np.array([0, 0, 1, 1]),
        cost=ParameterCost(np.array([10.0, 10.0, 10.0, 10.0])),
        limit=limit,
        ladder=RankLadder(),
        held=np.array([True, False, False, False]),
    )
    plan = project(problem, np.array([2, 0, 5, 0]), np.zeros(4))
    assert plan.asked[0] == 8
    assert problem.fits(plan.ranks)
    assert plan.ranks.tolist() == ranks
