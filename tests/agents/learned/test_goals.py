"""Goals of cost: the cheapest plan that surely loses nothing, held against a direct search over what was weighed.

And the lower limits of bytes or time under which candidates for it are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans, RankNetwork
from rankpilot.agents.learned.policy import (
    ALL_LINEAR,
    SHARES,
    LearnedPolicy,
    check_any_cost,
    parts,
    structure_plans,
    with_goal,
    with_less,
    with_less_time,
)
from rankpilot.agents.observation import MODULE_FEATURES, Observation
from rankpilot.agents.policy import Decision, Deliberation, decided_plan, frontier, plan_distance
from rankpilot.agents.rules import find_rule
from rankpilot.agents.settings import NetworkConfig
from rankpilot.cost.cost import ByteCost, moment_costs, plan_cost, unit_cost
from rankpilot.cost.step_time import SecondsRow
from rankpilot.errors import ConfigError
from rankpilot.lora.spec import RankLadder
from rankpilot.plan.goal import Goal, improvement_of
from rankpilot.plan.plan import least_ranks, uniform_ranks
from rankpilot.plan.problem import AllocationProblem

from .test_policy import Judges

pytestmark = pytest.mark.usefixtures("narrow_plans_too")

LAYERS, A_LAYER = 4, 4
MODULES = LAYERS * A_LAYER
BLOCKS = np.arange(MODULES) // A_LAYER
WIDE = np.arange(MODULES) % A_LAYER >= 2
BYTES = ByteCost(
    ("backward",), np.array([1000.0]), np.full((1, MODULES), 10.0), np.full((1, LAYERS), 700.0),
    np.arange(LAYERS)[:, None] >= BLOCKS[None],
)  # fmt: skip
PLAIN = float(plan_cost(BYTES, np.full(MODULES, 8)))
SECONDS = SecondsRow(1.0, np.full(MODULES, 1e-4), np.where(WIDE, 0.3, 0.01), np.eye(MODULES, dtype=np.bool_))
"""A step takes longer for each wide module that is adapted, however deep it is."""

Say = Callable[[Plans], torch.Tensor]
MakeObservation = Callable[..., Observation]


def policy_of(say: Say, goal: str = "quality", tolerance: float = 0.01, **options: Any) -> LearnedPolicy:
    torch.manual_seed(0)
    made = LearnedPolicy("known", RankNetwork(NetworkConfig(width=8)).eval(), Judges(say, "log loss").eval(), **options)
    aimed = with_goal(made, Goal(goal, tolerance))  # type: ignore[arg-type]
    assert isinstance(aimed, LearnedPolicy)
    return aimed


@pytest.fixture
def seen(make_observation: MakeObservation) -> Callable[..., Observation]:
    """A first decision on four layers of two narrow and two wide modules, under a share of what plain LoRA takes."""

    def make(share: float, *, timed: bool = False, **problem: Any) -> Observation:
        limit = round(share * PLAIN)
        cost = SECONDS.added_to(BYTES, limit, 64.0) if timed else BYTES
        given = make_observation(
            MODULES, blocks=BLOCKS, cost=cost, limit=limit, ranks=np.ones(MODULES, dtype=np.int64), **problem
        )
        modules = given.modules.copy()
        modules[:, MODULE_FEATURES.index("wide")] = WIDE
        return replace(given, modules=modules)

    return make


def loss_without(needed: np.ndarray, rank: int = 2, lost: float = 4.0) -> Say:
    """Plans lose nothing if these modules have this rank, and else so much; two networks that agree."""

    def say(plans: Plans) -> torch.Tensor:
        enough = (plans.ranks[0][:, torch.from_numpy(needed)] >= rank).all(dim=1)
        return torch.where(enough, 0.0, -lost).repeat(2, 1)

    return say


def decided(policy: LearnedPolicy, observation: Observation) -> tuple[np.ndarray, Decision, Deliberation]:
    decision = policy.decide(observation)
    assert decision.deliberation is not None
    ranks = decided_plan(observation.problem, decision).ranks
    np.testing.assert_array_equal(ranks, decision.deliberation.plans[decision.deliberation.plan])
    assert observation.problem.fits(ranks), "never above the budget"
    return ranks, decision, decision.deliberation


# What is weighed ------------------------------------------------------------------------------------------------------


def test_parts_of_a_model(seen: Callable[..., Observation]) -> None:
    found = parts(seen(1.0))
    np.testing.assert_array_equal(found["wide"], WIDE)
    np.testing.assert_array_equal(found["narrow"], ~WIDE)
    np.testing.assert_array_equal(found["top quarter"], BLOCKS == 3)
    np.testing.assert_array_equal(found["top half"], BLOCKS >= 2)
    np.testing.assert_array_equal(found["top three quarters"], BLOCKS >= 1)
    np.testing.assert_array_equal(found["every other layer"], BLOCKS % 2 == 1)
    np.testing.assert_array_equal(found["wide in the top half"], WIDE & (BLOCKS >= 2))


def test_plans_by_structure_keep_bounds_and_ladder(seen: Callable[..., Observation]) -> None:
    high, low = np.where(np.arange(MODULES) == 0, 3, 64), np.where(np.arange(MODULES) == 5, 12, 0)
    plans = dict(structure_plans(seen(1.0, high=high, low=low)))
    assert plans["wide at 8"][WIDE].tolist() == [12 if index == 5 else 8 for index in np.flatnonzero(WIDE)]
    assert plans["narrow at 8, others at 2"].tolist() == [
        12 if index == 5 else 2 if index == 0 or WIDE[index] else 8 for index in range(MODULES)
    ]
    assert len({tuple(plan) for plan in plans.values()}) == len(plans)


def test_plans_of_many_costs_are_weighed_and_plain_lora_among_them(seen: Callable[..., Observation]) -> None:
    for share, timed in ((0.6, False), (1.0, False), (1.0, True)):
        _, _, found = decided(policy_of(loss_without(WIDE), "bytes"), seen(share, timed=timed))
        assert found.candidates[0] == ALL_LINEAR
        assert found.plain is not None
        assert found.plans[found.plain].tolist() == [8] * MODULES
        assert found.may_take[found.plain] == (share == 1.0)
        assert found.costs is not None
        np.testing.assert_allclose(found.costs, [unit_cost(BYTES, plan) for plan in found.plans])
        allowed = found.costs[found.may_take]
        assert allowed.max() <= share * PLAIN + 1
        assert allowed.min() < 0.45 * PLAIN
        assert len(np.unique(allowed)) > 12
        of_time = sum(name.endswith("of the time") for name in found.candidates)
        assert of_time == (5 * len(SHARES) if timed else 0)
        assert (found.seconds is None) == (not timed)


def problem_of(seconds: float | None = None, limit: float = PLAIN) -> AllocationProblem:
    """Fresh modules under a limit of bytes, and of so many seconds."""
    cost = BYTES if seconds is None else SECONDS.added_to(BYTES, limit, seconds)
    return AllocationProblem(np.ones(MODULES, dtype=int), np.full(MODULES, 64), BLOCKS, cost, limit, RankLadder())


@pytest.mark.parametrize("seconds", [2.5, 64.0])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_less_of_the_budget_leaves_the_limit_of_time(seconds: float, share: float) -> None:
    limited = with_less(problem_of(seconds), share)
    least = plan_cost(BYTES, least_ranks(problem_of()))
    assert limited.limit == least + share * (PLAIN - least) < PLAIN
    for ranks in np.random.default_rng(0).choice([0, 1, 8], size=(100, MODULES)):
        time = moment_costs(limited.cost, ranks)[-1] / limited.limit * seconds
        assert time == pytest.approx(SECONDS.seconds(ranks), rel=1e-6)
        assert limited.fits(ranks) == (plan_cost(BYTES, ranks) <= limited.limit and SECONDS.seconds(ranks) <= seconds)


def test_less_time_leaves_the_budget() -> None:
    limited = with_less_time(problem_of(2.5), 0.5)
    assert limited.limit == PLAIN
    least = SECONDS.seconds(least_ranks(problem_of(2.5)))
    ranks = np.where(BLOCKS >= 2, 8, 0)
    time = moment_costs(limited.cost, ranks)[-1] / PLAIN * (least + 2.5) / 2
    assert time == pytest.approx(SECONDS.seconds(ranks), rel=1e-6)


def test_all_of_a_limit_that_plain_lora_leaves_unspent_is_what_plain_lora_takes() -> None:
    assert with_less(problem_of(limit=3 * PLAIN), 1.0).limit == PLAIN
    limited = with_less_time(problem_of(64.0), 1.0)
    assert moment_costs(limited.cost, np.full(MODULES, 8))[-1] == pytest.approx(PLAIN, rel=1e-6)


# Which plan is taken --------------------------------------------------------------------------------------------------


def test_the_cheapest_plan_that_loses_nothing(seen: Callable[..., Observation]) -> None:
    """Only wide modules matter: all of them at a thin rank cost the least."""
    ranks, decision, found = decided(policy_of(loss_without(WIDE), "bytes"), seen(1.0))
    assert (ranks[WIDE] == 2).all()
    assert not ranks[~WIDE].any()
    assert found.candidates[found.taken] == "wide at 2"
    assert decision.exact
    top = BLOCKS == 3
    ranks, _, _ = decided(policy_of(loss_without(top), "bytes"), seen(1.0))
    assert ranks[top].min() >= 2
    assert not ranks[~top].any()


def test_time_and_bytes_are_saved_by_different_plans(seen: Callable[..., Observation]) -> None:
    """Any eight modules at rank 2 lose nothing; deep narrow ones take no time, and high ones few bytes."""

    def say(plans: Plans) -> torch.Tensor:
        return torch.where((plans.ranks[0] >= 2).sum(dim=1) >= 8, 0.0, -4.0).repeat(2, 1)

    observation = seen(1.0, timed=True)
    of_time, _, timed = decided(policy_of(say, "time"), observation)
    of_bytes, _, _ = decided(policy_of(say, "bytes"), observation)
    assert not of_time[WIDE].any()
    assert of_bytes[BLOCKS >= 2].all()
    assert not of_bytes[BLOCKS < 2].any()
    assert timed.seconds is not None
    np.testing.assert_allclose(timed.seconds, [SECONDS.seconds(plan) for plan in timed.plans], rtol=1e-5)


@pytest.mark.parametrize("goal", ["bytes", "time"])
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_decision_is_that_of_a_direct_search(
    seen: Callable[..., Observation], goal: str, tolerance: float, share: float
) -> None:
    observation = seen(share, timed=True)
    problem, surely = observation.problem, 0
    for seed in range(6):
        worth = torch.from_numpy(np.random.default_rng(seed).normal(0.02, 0.06, (3, MODULES)))

        def say(plans: Plans, worth: torch.Tensor = worth) -> torch.Tensor:
            logs = torch.log2(1 + plans.ranks[0].double())
            return (worth @ logs.T).float()

        ranks, decision, found = decided(policy_of(say, goal, tolerance), observation)
        votes = found.votes - found.votes[:, [found.plain]]
        bounds = votes.mean(axis=0) - found.lcb_coefficient * votes.std(axis=0)
        assert found.seconds is not None
        assert found.costs is not None
        costs = found.seconds if goal == "time" else found.costs
        enough = [improvement_of(float(bound)) >= -tolerance - 1e-9 for bound in bounds]
        sure = [plan for plan, ranks in enumerate(found.plans) if problem.fits(ranks) and enough[plan]]
        uniform = decided_plan(problem, Decision(uniform_ranks(problem), np.zeros(MODULES))).ranks
        assert found.simple is not None
        np.testing.assert_array_equal(found.plans[found.simple], uniform)
        if sure:
            tied = [plan for plan in sure if costs[plan] <= 1.01 * min(costs[plan] for plan in sure)]
            nearest = min(plan_distance(found.plans[plan], uniform) for plan in tied)
            assert found.plan in tied
            assert plan_distance(ranks, uniform) == pytest.approx(nearest)
            assert decision.expected == pytest.approx(float(votes[:, found.plan].mean()), abs=1e-6)
        else:
            np.testing.assert_array_equal(ranks, uniform)
        surely += bool(sure)
    assert surely or (share, tolerance) == (0.5, 0.0), "the search finds something"


def test_networks_that_disagree_save_nothing(seen: Callable[..., Observation]) -> None:
    """Plain LoRA where it fits, which surely loses nothing against itself; else uniform rank."""

    def say(plans: Plans) -> torch.Tensor:
        moved = (plans.ranks[0] != 8).any(dim=1).float()
        return torch.stack([3.0 * moved, -3.0 * moved])

    ranks, decision, _ = decided(policy_of(say, "bytes"), seen(1.0))
    assert ranks.tolist() == [8] * MODULES
    assert (decision.expected, decision.uncertainty) == (0.0, 0.0)
    observation = seen(0.6)
    ranks, _, found = decided(policy_of(say, "bytes"), observation)
    assert not found.within_tolerance.any()
    assert found.plan == found.simple
    window = uniform_ranks(observation.problem) > 0
    assert ranks[window].min() >= 8
    assert not window.all()


def test_a_doubt_counts_for_all_plans_but_plain_lora(seen: Callable[..., Observation]) -> None:
    """Two networks that agree are not enough where votes on unseen tasks have promised too much."""
    for doubt, name in ((0.0, "wide at 2"), (0.85, "wide at 2"), (0.95, ALL_LINEAR)):  # the tolerance is .88 votes
        policy = policy_of(loss_without(WIDE), "bytes")
        assert policy.value_ensemble is not None
        policy.value_ensemble.config = replace(policy.value_ensemble.config, doubt=doubt)
        _, _, found = decided(policy, seen(1.0))
        assert found.candidates[found.taken] == name
        rows = {row.name: row for row in frontier(found)}
        assert rows[name].taken
        assert rows[ALL_LINEAR].high == rows[ALL_LINEAR].low == 1
        assert rows["wide at 2"].high == pytest.approx(np.exp(0.01 * np.sinh(doubt)))


def test_of_plans_that_cost_the_same_the_one_nearest_to_uniform_is_taken(seen: Callable[..., Observation]) -> None:
    def say(plans: Plans) -> torch.Tensor:
        return torch.zeros(2, plans.ranks.shape[1])

    cost = replace(BYTES, per_rank=np.zeros((1, MODULES)), group_bytes=np.zeros((1, LAYERS)))
    observation = seen(1.0)
    observation = replace(observation, problem=replace(observation.problem, cost=cost))
    ranks, _, found = decided(policy_of(say, "bytes"), observation)
    assert found.tied.sum() > 20
    distances = plan_distance(found.plans, found.plans[found.simple])
    assert plan_distance(ranks, found.plans[found.simple]) == distances[found.may_take].min() == 0


def test_quality_takes_the_best_plan_of_any_cost(seen: Callable[..., Observation]) -> None:
    """Fewer modules may well be better than more."""

    def say(plans: Plans) -> torch.Tensor:
        return -(plans.ranks[0][:, torch.from_numpy(WIDE)] > 0).sum(dim=1).float().repeat(2, 1)

    for share in (0.6, 1.0):
        ranks, _, found = decided(policy_of(say), seen(share))
        assert not ranks[WIDE].any()
        assert found.reference == found.simple
        assert found.candidates[0] == "uniform"


def test_quality_never_takes_plain_lora_above_the_budget(seen: Callable[..., Observation]) -> None:
    def say(plans: Plans) -> torch.Tensor:
        return (plans.ranks[0] == 8).all(dim=1).float().repeat(2, 1)

    _, _, found = decided(policy_of(say), seen(0.6))
    assert found.plain is not None
    assert found.bound[found.plain] == 1
    assert found.plan != found.plain
    drawn = replace(policy_of(say), temperature=0.01)
    _, _, found = decided(drawn, seen(0.6))
    assert found.probabilities[found.plain] == 0


@pytest.mark.parametrize("goal", ["quality", "bytes"])
def test_a_budget_in_which_no_plan_by_structure_fits(seen: Callable[..., Observation], goal: str) -> None:
    """One module at rank 1 does, and nothing else that follows from the model alone."""
    observation = seen(1.0)
    ranks = np.zeros(MODULES, dtype=np.int64)
    ranks[-1] = 1
    tight = replace(observation.problem, limit=plan_cost(observation.problem.cost, ranks))
    assert not any(tight.fits(plan) and plan.any() for _, plan in structure_plans(observation))
    taken, _, found = decided(policy_of(loss_without(WIDE), goal), replace(observation, problem=tight))
    assert taken.sum() == 1
    assert not any(" at " in name for name in found.candidates)


def test_later_decisions_keep_the_ranks_under_a_goal_of_cost(seen: Callable[..., Observation]) -> None:
    observation = seen(1.0, max_step=2)
    ranks, decision, found = decided(policy_of(loss_without(WIDE), "bytes"), observation)
    np.testing.assert_array_equal(ranks, observation.problem.ranks)
    assert decision.exact
    assert found.candidates == ("keep",)
    assert found.goal == Goal("bytes")
    moved, _, _ = decided(policy_of(loss_without(WIDE, rank=4)), observation)
    assert not np.array_equal(moved, observation.problem.ranks), "under quality it may move"


# Who can have which goal ----------------------------------------------------------------------------------------------


def test_policies_that_cannot_tell_plans_of_any_cost_apart() -> None:
    actor = replace(policy_of(loss_without(WIDE)), value_ensemble=None)
    earlier = replace(actor, value_ensemble=Judges(loss_without(WIDE)))
    one_cost = "The networks of known compare plans of one cost alone, so goal='time' needs a policy that was trained"
    for policy, message in (
        (find_rule("signal-mean"), "signal-mean expects nothing of plans, so goal='time' needs another policy"),
        (actor, "known expects nothing of plans"),
        (earlier, one_cost),
        (replace(policy_of(loss_without(WIDE)), temperature=0.1), "draws its plans, which goal='time' cannot"),
    ):
        assert with_goal(policy, Goal()) is policy
        with pytest.raises(ConfigError, match=message):
            with_goal(policy, Goal("time"))
    with pytest.raises(ConfigError, match="so a frontier needs another policy"):
        check_any_cost(find_rule("uniform"), "a frontier", "leave it out")


def test_a_goal_that_the_costs_do_not_know(seen: Callable[..., Observation], make_observation: MakeObservation) -> None:
    with pytest.raises(ConfigError, match="the time of a step is not known"):
        policy_of(loss_without(WIDE), "time").decide(seen(1.0))
    with pytest.raises(ConfigError, match="counts parameters"):
        policy_of(loss_without(WIDE), "bytes").decide(make_observation(MODULES))


# The frontier ---------------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_no_other_plan_beats(seen: Callable[..., Observation]) -> None:
    def say(plans: Plans) -> torch.Tensor:
        logs = torch.log2(1 + plans.ranks[0].double()).sum(dim=1)
        return torch.stack([logs, 1.2 * logs]).float() / 20

    for goal, share in (("bytes", 0.6), ("time", 1.0), ("quality", 1.0)):
        _, _, found = decided(policy_of(say, goal), seen(share, timed=True))
        rows = frontier(found)
        costs = [row.seconds if goal == "time" else row.cost for row in rows]
        assert costs == sorted(costs)  # type: ignore[type-var]
        assert [row.taken for row in rows].count(True) == 1
        plain = next(row for row in rows if row.ranks.tolist() == [8] * MODULES)
        assert (plain.loss, plain.low, plain.high, plain.verdict) == (1, 1, 1, "tie")
        assert plain.fits == (share == 1.0)
        others = [row for row in rows if not (row.taken or row is plain)]
        assert all(a.loss > b.loss for a, b in pairwise(others))
        assert all(row.low <= row.loss <= row.high for row in rows)
        assert {"worse"} <= {row.verdict for row in rows}
        allowed = np.flatnonzero(found.may_take)
        weighed = found.seconds if goal == "time" else found.costs
        assert weighed is not None
        assert found.plain is not None
        votes = (found.votes - found.votes[:, [found.plain]]).mean(axis=0)
        for row in others:
            place = int(np.flatnonzero((found.plans == row.ranks).all(axis=1))[0])
            cheaper = allowed[weighed[allowed] <= weighed[place]]
            assert votes[place] == votes[cheaper].max()


def test_there_is_no_frontier_of_plans_of_one_cost(seen: Callable[..., Observation]) -> None:
    earlier = replace(policy_of(loss_without(WIDE)), value_ensemble=Judges(loss_without(WIDE)))
    found = earlier.decide(seen(1.0)).deliberation
    assert found is not None
    assert found.unit == "spread"
    assert ALL_LINEAR not in found.candidates
    with pytest.raises(ConfigError, match="no frontier"):
        frontier(found)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_narrow_plans_count_where_plain_lora_cannot_be_taken(
    seen: Callable[..., Observation], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The floor stands for what could be kept in place of a cheap plan; without that it would leave nothing."""
    for name, least in (("LEAST_MODULES", 0.5), ("LEAST_LAYERS", 2 / 3), ("LEAST_THICK", 0.5)):
        monkeypatch.setattr(f"rankpilot.plan.goal.{name}", least)
    top = BLOCKS == 3
    ranks, _, found = decided(policy_of(loss_without(top), "bytes"), seen(share))
    floor = share == 1.0
    assert found.narrow.any() == floor
    assert ranks[~top].any() == floor, "the top layer alone would do"
    assert found.broad is not None
    assert found.broad[found.plan] == floor
