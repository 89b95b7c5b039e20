"""Every rule gives a plan that fits, whatever the budget counts; and what each of them prefers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.errors import UnknownNameError
from rankpilot.cost.budget import reference_cost
from rankpilot.cost.cost import Cost, ParameterCost
from rankpilot.cost.record.calibration import calibrate
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.plan.plan import project
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.decide.rules import RULES, RandomScores, Window, find_rule
from rankpilot.env.bases import adapted_base

MakeObservation = Callable[..., Observation]
BUDGETS = {"bytes": 0.6, "few bytes": 0.3, "parameters": 0.25}


@pytest.fixture(scope="module")
def problems() -> dict[str, AllocationProblem]:
    """On a small Llama, under shares of what rank 8 on all modules takes."""
    torch.set_num_threads(1)
    model, targets = adapted_base("llama-4x32")
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    of_bytes = calibrate(model, targets, {"input_ids": tokens, "labels": tokens}).cost()
    ranks, found = np.ones(len(targets), dtype=np.int64), {}
    for name, share in BUDGETS.items():
        cost: Cost = ParameterCost.of(targets) if name == "parameters" else of_bytes
        limit = share * reference_cost(cost, np.array([target.max_rank for target in targets]))
        found[name] = AllocationProblem.of(targets, cost, limit, ranks=ranks)
    return found


def seen(problem: AllocationProblem, seed: int = 0) -> Observation:
    """An observation with random signals and the features of places and prices that they go with."""
    generator = np.random.default_rng(seed)
    modules = generator.normal(size=(len(problem.ranks), len(MODULE_FEATURES)))
    modules[:, MODULE_FEATURES.index("relative_depth")] = problem.blocks / problem.blocks.max()
    price = np.log(problem.cost.per_rank.max(axis=0))
    modules[:, MODULE_FEATURES.index("rank_cost")] = price - price.mean()
    names, run = tuple(map(str, range(len(modules)))), generator.uniform(size=len(RUN_FEATURES))
    return Observation(modules.clip(-3, 3).astype(np.float32), run.astype(np.float32), problem, names)


def first_ranks(name: str, observation: Observation) -> Any:
    decision = RULES[name].decide(observation)
    return project(observation.problem, decision.ranks, decision.scores).ranks


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", RULES)
def test_plans_keep_to_the_budget_and_spend_it(problems: dict[str, AllocationProblem], name: str, budget: str) -> None:
    problem = problems[budget]
    for seed in range(3):
        observation = seen(problem, seed)
        ranks = first_ranks(name, observation)
        assert problem.fits(ranks)
        assert ranks.any()
        assert np.isin(ranks, problem.ladder.array).all()
        again = first_ranks(name, observation)
        np.testing.assert_array_equal(ranks, again)
        later = replace(observation, problem=replace(problem, ranks=ranks, max_step=2, hysteresis=0.2))
        decision = RULES[name].decide(later)
        assert problem.fits(project(later.problem, decision.ranks, decision.scores).ranks)


@pytest.mark.parametrize("name", ["uniform", "top-half", "random"])
def test_plans_are_kept(problems: dict[str, AllocationProblem], name: str) -> None:
    problem = problems["bytes"]
    ranks = first_ranks(name, seen(problem))
    later = replace(problem, ranks=ranks, max_step=2, hysteresis=0.2)
    decision = RULES[name].decide(seen(later, seed=9))
    np.testing.assert_array_equal(decision.ranks, ranks)
    np.testing.assert_array_equal(project(later, decision.ranks, decision.scores).ranks, ranks)


def test_gradient_norm_follows_its_signal_and_no_other(problems: dict[str, AllocationProblem]) -> None:
    observation = seen(problems["parameters"])
    scores = RULES["gradient-norm"].decide(observation).scores
    column = observation.modules[:, MODULE_FEATURES.index("gradient_norm")]
    np.testing.assert_allclose(scores, 0.5 * column, atol=1e-6)


def test_where_rules_put_rank(problems: dict[str, AllocationProblem]) -> None:
    few, many = seen(problems["parameters"]), seen(problems["bytes"])
    blocks = few.problem.blocks
    assert set(blocks[first_ranks("top-half", many) > 0]) == {2, 3}
    uniform = first_ranks("uniform", few)
    assert uniform.min() >= 2, "a quarter of rank 8"
    top_down = RULES["top-down"].decide(many)
    assert top_down.rank_floor == 16
    assert not top_down.scores.any()
    assert blocks[first_ranks("top-down", many) > 0].min() > 0, "not all layers fit at rank 16"


def test_random_plans_differ_by_what_is_seen_and_by_draw(problems: dict[str, AllocationProblem]) -> None:
    problem = problems["bytes"]
    scores = [RandomScores(draw=draw).decide(seen(problem, seed)).scores for draw, seed in ((0, 0), (0, 1), (1, 0))]
    assert len({values.tobytes() for values in scores}) == 3
    many = np.concatenate([RandomScores(draw=draw).decide(seen(problem)).scores for draw in range(60)])
    assert many.mean() == pytest.approx(0, abs=0.1)
    assert many.std() == pytest.approx(1, abs=0.05)
    near = seen(problem)
    near = replace(near, modules=(near.modules.round(2) + np.float32(1e-6)).astype(np.float32))
    far = replace(near, modules=(near.modules - np.float32(2e-6)).astype(np.float32))
    np.testing.assert_array_equal(RandomScores().decide(near).scores, RandomScores().decide(far).scores)


@pytest.mark.parametrize("budget", BUDGETS)
def test_windows(problems: dict[str, AllocationProblem], budget: str) -> None:
    problem = problems[budget]
    for start, end, layers in ((0, 0.25, {0}), (0.5, 1, {2, 3}), (0.25, 0.75, {1, 2}), (0, 1, {0, 1, 2, 3})):
        ranks = Window(start, end)(problem)
        assert problem.fits(ranks)
        if not problem.fits(problem.uniform(1)):
            continue
        assert set(problem.blocks[ranks > 0]) == layers
        if ranks.max() < problem.max_ranks.max():
            assert not problem.fits(np.where(ranks > 0, ranks + 1, 0)), "the largest rank"


def test_unknown_rules() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean: 'signal-mean'"):
        find_rule("signal-man")
    with pytest.raises(UnknownNameError, match=r'looks like a budget: pass budget="40%"'):
        find_rule("40%")
    assert all(find_rule(name).name == name for name in RULES)
