"""Every rule gives a plan that fits, whatever the budget counts; and what each of them prefers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.evaluation.ablation import KNOTS, Constant, constant_of
from rankpilot.agents.evaluation.hindsight import TASK_RULES
from rankpilot.agents.rules import RULES, RandomScores, Window, find_rule
from rankpilot.agents.rules.given_plan import GivenPlan
from rankpilot.allocation.actions import base_rank_floor
from rankpilot.allocation.features import MODULE_FEATURES
from rankpilot.allocation.observation import Observation
from rankpilot.allocation.plan import project
from rankpilot.allocation.policy import decision_from_scores
from rankpilot.allocation.problem import AllocationProblem
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.env.episodes.stacked import StackedEpisodes
from rankpilot.env.tasks.finetune import Reference
from rankpilot.env.tasks.proxy_task import ProxyTask
from rankpilot.errors import UnknownNameError

MakeObservation = Callable[..., Observation]
BUDGETS: dict[str, dict[str, Any]] = {
    "bytes": {"budget": 0.6},
    "few bytes": {"budget": 0.3},
    "checkpointed": {"budget": 0.6, "checkpointing": True},
    "parameters": {"budget": 0.25, "unit": "parameters"},
}


@pytest.fixture(scope="module")
def episodes() -> StackedEpisodes:
    torch.set_num_threads(1)
    return StackedEpisodes("llama-4x32", DecisionSchedule(probe_steps=4), 4)


@pytest.fixture(scope="module")
def problems(episodes: StackedEpisodes) -> dict[str, AllocationProblem]:
    return {name: episodes.problem(task(**options)) for name, options in BUDGETS.items()}


def task(**options: Any) -> ProxyTask:
    sizes: dict[str, Any] = {"base": "llama-4x32", "steps": 12, "batch_size": 4, "length": 16, "eval_rows": 16}
    return ProxyTask("planted", 1, corpus="documentation", reference=Reference(1.0, 0.5), **sizes, **options)


def seen(problem: AllocationProblem, seed: int = 0) -> Observation:
    """An observation with random signals and the features of places and prices that they go with."""
    generator = np.random.default_rng(seed)
    modules = generator.normal(size=(len(problem.ranks), len(MODULE_FEATURES)))
    modules[:, MODULE_FEATURES.index("relative_depth")] = problem.blocks / problem.blocks.max()
    price = np.log(problem.cost.per_rank.max(axis=0))
    modules[:, MODULE_FEATURES.index("rank_cost")] = price - price.mean()
    names = tuple(map(str, range(len(modules))))
    return Observation(
        modules.clip(-3, 3).astype(np.float32), generator.uniform(size=8).astype(np.float32), problem, names
    )


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


def test_rules_that_see_the_task(episodes: StackedEpisodes) -> None:
    planted = task(budget=0.25, unit="parameters")
    problem = episodes.problem(planted)
    for name, rule in TASK_RULES.items():
        attempts = rule.prepare(planted, problem)
        assert len(attempts) == rule.attempts
        assert rule.name == name
        for attempted, policy in attempts:
            budget = episodes.problem(attempted)
            decision = policy.decide(seen(budget))
            assert budget.fits(project(budget, decision.ranks, decision.scores).ranks)
    (larger, _), *_ = TASK_RULES["uniform-115"].prepare(planted, problem)
    assert larger.budget == pytest.approx(1.15 * 0.25)
    assert larger.reference == planted.reference
    assert TASK_RULES["oracle"].prepare(replace(planted, kind="shift", corpus="code"), problem) == []
    assert TASK_RULES["best-window"].attempts == TASK_RULES["best-of-8"].attempts == 8


def test_a_constant_action_is_the_mean(make_observation: MakeObservation) -> None:
    class ByHeight:
        name = "by height"

        def decide(self, observation: Observation) -> Any:
            height = observation.modules[:, MODULE_FEATURES.index("relative_depth")].astype(np.float64)
            return decision_from_scores(observation, 2 * height - 1, (float(observation.run[0] > 0.5), -1.0))

    observations = []
    for seed, modules in enumerate((8, 20, 12, 16)):
        observation = make_observation(modules, seed)
        columns = observation.modules.copy()
        columns[:, MODULE_FEATURES.index("relative_depth")] = np.linspace(0, 1, modules)
        run = np.full_like(observation.run, 0.9 if seed == 0 else 0.1)
        observations.append(replace(observation, modules=columns, run=run))
    constant = constant_of(ByHeight(), observations, "constant:x")
    assert constant.name == "constant:x"
    np.testing.assert_allclose(constant.scores, 2 * KNOTS - 1, atol=1e-6)
    assert constant.placement == pytest.approx((1 / 4, -1))
    blind = [constant.decide(replace(o, run=0 * o.run)).scores for o in observations[:1]]
    np.testing.assert_array_equal(blind[0], constant.decide(observations[0]).scores)
    assert isinstance(constant, Constant)


def test_the_mean_of_plans_that_follow_from_no_scores(make_observation: MakeObservation) -> None:
    """Rank 4 on the upper half: its logs by depth, and 4 as the floor."""
    observation = make_observation(16)
    columns = observation.modules.copy()
    columns[:, MODULE_FEATURES.index("relative_depth")] = np.linspace(0, 1, 16)
    ranks = np.repeat([0, 4], 8)
    plan = GivenPlan("upper half", dict(zip(observation.names, ranks.tolist(), strict=True)))
    constant = constant_of(plan, [replace(observation, modules=columns)] * 2, "constant:x")
    assert constant.placement == pytest.approx((np.log2(4 / base_rank_floor(observation.problem)), 0))
    assert np.isfinite(constant.scores).all()
    assert constant.scores[0] < -0.9 < 0.9 < constant.scores[-1]


def test_unknown_rules() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean: 'signal-mean'"):
        find_rule("signal-man")
    assert all(find_rule(name).name == name for name in RULES)
