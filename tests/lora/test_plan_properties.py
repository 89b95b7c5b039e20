"""What every plan keeps to, on thousands of random problems; and that plans are those of the slow planner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.lora.ladder import RankLadder
from rankpilot.lora.memory import ByteCost, ParameterCost, calibrate
from rankpilot.lora.plan import PlanProblem, pack, project
from rankpilot.lora.pricing import fixed_price
from rankpilot.lora.targets import find_target_modules

from . import slow_plan

LADDERS = (RankLadder(), *(RankLadder(ranks) for ranks in ((0, 1, 2, 3), (0, 4, 8, 16), (0, 5, 8, 9), (0, 2))))


def random_blocks(generator, count):
    """Layers of modules that stand in the forward order, 0 at the bottom."""
    numbers = np.sort(generator.integers(0, generator.integers(1, count + 1), size=count))
    return np.unique(numbers, return_inverse=True)[1]


def coherent_cost(generator, blocks):
    """A random cost as calibration finds it, of modules in the forward order: one more module never makes it cheaper.

    Modules side by side in a layer may read one input. An input is saved for the adapter alone, or anyway as soon as
    gradients flow through it; other tensors lie between the modules.
    """
    count = len(blocks)
    apart = np.append(True, (blocks[1:] != blocks[:-1]) | (generator.random(count - 1) < 0.6))
    group, start = np.cumsum(apart) - 1, np.flatnonzero(apart)
    size = generator.integers(0, 200, size=len(start))
    # anyway[e, g]: what module e as the lowest one saves of the input of group g in any case.
    anyway = (start[None, :] > np.arange(count)[:, None]) & (generator.random(len(start)) < 0.5)
    together = generator.integers(0, 50, size=count) * (generator.random(count) < 0.5)
    between = generator.integers(0, 300, size=count) + np.append(together[1:], 0)
    chain = np.cumsum(between[::-1])[::-1] + anyway @ size + size[group]
    extra = np.where(anyway, 0, size)[:, group] * (group[:, None] != group[None, :])
    per_rank = generator.integers(1, generator.choice([2, 400]), size=count)
    return byte_cost(per_rank, int(generator.integers(0, 1000)), chain, extra, together, group, blocks)


def rough_cost(generator, blocks):
    """A random cost in which modules can make each other cheaper, as where a byte model over-estimates."""
    count = len(blocks)
    shared = generator.integers(0, count, size=count)
    extra = generator.integers(0, 300, size=(count, count)) * (generator.random((count, count)) < 0.5)
    chain = np.sort(generator.integers(0, 300 * count, size=count))[::-1]
    together = generator.integers(0, 500, size=count)
    per_rank = generator.integers(1, 100, size=count)
    return byte_cost(per_rank, int(generator.integers(0, 1000)), chain, extra, together, shared, blocks)


def byte_cost(per_rank, constant, chain, extra, together, shared, block):
    floats = [np.asarray(values, dtype=np.float64) for values in (per_rank, chain, extra, together)]
    order = np.arange(len(block))
    return ByteCost(floats[0], float(constant), order, *floats[1:], shared=np.asarray(shared), block=block)


def reordered(cost, by):
    """The same modules listed in another order."""
    columns = {name: getattr(cost, name)[by] for name in ("per_rank", "order", "chain", "together", "shared", "block")}
    return replace(cost, extra=cost.extra[np.ix_(by, by)], **columns)


def random_problem(generator, make_cost, largest=12):
    """A random problem: ranks anywhere, some modules held, a budget from nothing to more than everything."""
    count = int(generator.integers(1, largest + 1))
    blocks = random_blocks(generator, count)
    by = generator.permutation(count) if generator.random() < 0.5 else np.arange(count)
    if make_cost is ParameterCost:
        cost = ParameterCost(generator.integers(2, 100, size=count).astype(np.float64))
    else:
        cost = reordered(make_cost(generator, blocks), by)
    ladder = LADDERS[generator.integers(len(LADDERS))]
    max_ranks = generator.integers(1, 80, size=count)
    ranks = generator.integers(0, np.minimum(max_ranks, ladder.ranks[-1]) + 1)
    if generator.random() < 0.8:  # else off the ladder, as after a uniform run
        ranks = ladder.array[ladder.rung(ranks)]
    held = generator.random(count) < generator.choice([0.1, 0.5]) if generator.random() < 0.3 else None
    max_step = (None, 1, 2, 3)[generator.integers(4)]
    problem = PlanProblem(ranks, max_ranks, blocks[by], cost, 0.0, ladder, max_step, held)
    return replace(problem, limit=random_limit(generator, problem))


def random_limit(generator, problem):
    """Any share of the price of everything, or just what some plan costs."""
    if generator.random() < 0.2:
        return problem.price(problem.ladder.array[generator.integers(0, problem.tops + 1)])
    return problem.price(problem.ladder.array[problem.tops]) * generator.uniform(0, 1.1)


def random_wish(generator, problem):
    """Deltas and scores; scores with ties, far apart, all equal, or in single precision."""
    count = len(problem.ranks)
    deltas = generator.integers(-12, 13, size=count)
    kinds = (
        lambda: generator.normal(size=count),
        lambda: generator.normal(scale=5, size=count).astype(np.float32),
        lambda: generator.integers(-1, 2, size=count).astype(np.float64),
        lambda: np.zeros(count),
    )
    return deltas, kinds[generator.integers(len(kinds))]()


def bounds_of(problem):
    """The lowest and the highest rung of each module that a decision may choose."""
    now = problem.ladder.rung(problem.ranks)
    reach = problem.ladder.top if problem.max_step is None else problem.max_step
    upper = np.minimum(now + reach, problem.tops)
    lower = np.minimum(np.maximum(now - reach, 0), upper)
    held = np.zeros(len(now), dtype=bool) if problem.held is None else problem.held
    return np.where(held, now, lower), np.where(held, now, upper)


def check_kept(problem, plan):
    """Inside the budget, unless not even nothing fits."""
    assert plan.cost == problem.price(plan.ranks)
    assert np.isin(plan.ranks, problem.ladder.array).all()
    if problem.price(np.zeros_like(problem.ranks)) <= problem.limit:
        assert problem.fits(plan.ranks)
    else:
        assert not plan.ranks.any()


def check_bounds(problem, plan):
    """No rung above what a decision may choose, and below it, or a held module dropped, for the budget alone."""
    lower, upper = bounds_of(problem)
    rungs = problem.ladder.rung(plan.ranks)
    assert (rungs <= upper).all()
    if problem.fits(problem.ladder.array[lower]):
        assert (rungs >= lower).all()
    if problem.held is not None and problem.fits(problem.ladder.array[np.where(problem.held, lower, 0)]):
        assert (rungs == lower)[problem.held].all()


def check_spent(problem, plan):
    """No module that is free to rise can go one rung further."""
    _, upper = bounds_of(problem)
    rungs = problem.ladder.rung(plan.ranks)
    free = (rungs < upper) & ~(problem.held if problem.held is not None else np.zeros(len(rungs), dtype=bool))
    for module in np.flatnonzero(free):
        further = plan.ranks.copy()
        further[module] = problem.ladder.ranks[rungs[module] + 1]
        assert not problem.fits(further), f"module {module} could still rise"


def check_way_there(problem, plan):
    """Drops, then shrinks, then grows: at no moment more than the larger of the two plans."""
    ranks = problem.ranks.copy()
    most = max(problem.price(ranks), plan.cost)
    drops = np.flatnonzero((plan.ranks == 0) & (ranks > 0))
    shrinks = np.flatnonzero((plan.ranks > 0) & (plan.ranks < ranks))
    for module in (*drops, *shrinks, *np.flatnonzero(plan.ranks > ranks)):
        ranks[module] = plan.ranks[module]
        assert problem.price(ranks) <= most
    assert (ranks == plan.ranks).all()


@pytest.mark.slow
@pytest.mark.parametrize("make_cost", [coherent_cost, ParameterCost])
def test_five_thousand_plans_keep_to_the_budget_and_spend_it(make_cost):
    generator = np.random.default_rng(1)
    for _ in range(5000):
        problem = random_problem(generator, make_cost)
        plan = project(problem, *random_wish(generator, problem))
        check_kept(problem, plan)
        check_bounds(problem, plan)
        check_spent(problem, plan)
        check_way_there(problem, plan)


@pytest.mark.slow
def test_plans_keep_to_the_budget_and_spend_it_where_modules_make_each_other_cheaper():
    generator = np.random.default_rng(2)
    for _ in range(3000):
        problem = random_problem(generator, rough_cost)
        plan = project(problem, *random_wish(generator, problem))
        check_kept(problem, plan)
        check_spent(problem, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_cost", "largest", "problems"),
    [(coherent_cost, 14, 3000), (ParameterCost, 14, 2000), (coherent_cost, 150, 30)],
)
def test_plans_are_those_of_the_slow_planner(make_cost, largest, problems):
    generator = np.random.default_rng(3)
    for _ in range(problems):
        problem = random_problem(generator, make_cost, largest)
        deltas, scores = random_wish(generator, problem)
        floor = generator.uniform(0.1, 70)
        assert pack(problem, scores, floor).tolist() == slow_plan.pack(problem, scores, floor).tolist()
        plan, expected = (planner(problem, deltas, scores) for planner in (project, slow_plan.project))
        assert plan.asked.tolist() == expected.asked.tolist()
        assert plan.ranks.tolist() == expected.ranks.tolist()
        assert plan.cost == expected.cost


def test_plans_do_not_depend_on_how_inputs_and_layers_are_numbered():
    """Ties, above all, which are broken by the modules' places alone."""
    generator = np.random.default_rng(4)
    for _ in range(300):
        problem = random_problem(generator, coherent_cost)
        deltas, count = random_wish(generator, problem)[0], len(problem.ranks)
        labels = generator.permutation(count) + int(generator.integers(-5, 10**6))
        cost = replace(problem.cost, shared=labels[problem.cost.shared], block=labels[problem.cost.block])
        renumbered = replace(problem, cost=cost)
        scores = np.zeros(count)
        assert (project(problem, deltas, scores).ranks == project(renumbered, deltas, scores).ranks).all()
        assert (pack(problem, scores, 4.0) == pack(renumbered, scores, 4.0)).all()


@pytest.mark.parametrize("make_cost", [coherent_cost, rough_cost])
def test_running_prices_are_those_of_the_whole_set(make_cost):
    generator = np.random.default_rng(5)
    for _ in range(100):
        blocks = random_blocks(generator, int(generator.integers(1, 20)))
        cost = reordered(make_cost(generator, blocks), generator.permutation(len(blocks)))
        active = generator.random(len(blocks)) < generator.random()
        price = fixed_price(cost, active)
        for module in generator.integers(0, len(blocks), size=40).tolist():
            assert price.value == cost.fixed(active)
            after = active.copy()
            after[module] = not active[module]
            if after[module]:
                assert price.having(module) == cost.fixed(after)
                price.add(module)
            else:
                price.remove(module)
            active = after
        assert price.value == cost.fixed(active)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_prices_of_real_models_are_whole_numbers(request, name):
    """So that running sums of them are exact."""
    model = request.getfixturevalue(f"make_{name}")().train()
    cost = calibrate(model, find_target_modules(model), request.getfixturevalue(f"{name}_batch"))
    for values in (cost.per_rank, cost.constant, cost.chain, cost.extra, cost.together):
        assert (np.asarray(values) % 1 == 0).all()
