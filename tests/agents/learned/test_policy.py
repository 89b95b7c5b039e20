"""A learned policy with a value ensemble: it takes the plan that is surely better, or none; or it explores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans, PlanValueConfig, PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy import (
    DRAWS,
    FIXED,
    LATER_LCB_COEFFICIENT,
    LCB_COEFFICIENT,
    TIE,
    LearnedPolicy,
    candidate_actions,
    exploring,
)
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.observation import Observation
from rankpilot.agents.policy import Decision, Deliberation, decided_plan, decision_from_scores, plan_distance
from rankpilot.agents.rules import find_rule
from rankpilot.agents.settings import NetworkConfig
from rankpilot.common.arrays import IntArray
from rankpilot.cost.cost import ByteCost
from rankpilot.errors import ConfigError
from rankpilot.plan.plan import uniform_ranks

MakeObservation = Callable[..., Observation]


class Judges(PlanValueEnsemble):
    """Critics that say what a test wants, (critics, plans), and keep what they were asked."""

    def __init__(self, say: Callable[[Plans], torch.Tensor], unit: Any = "spread") -> None:
        super().__init__(PlanValueConfig(count=1, width=1, unit=unit))
        self.say = say
        self.asked: list[Plans] = []

    def forward(self, plans: Plans) -> torch.Tensor:
        self.asked.append(plans)
        return self.say(plans)[:, None]


def judges_of(gains: Mapping[int, Sequence[float]], offsets: Sequence[float] = (0.0, 0.0)) -> Judges:
    """Two critics; what each expects of the plans of some candidates, by number, over the rest."""

    def say(plans: Plans) -> torch.Tensor:
        estimates = torch.tensor(offsets)[:, None].repeat(1, plans.ranks.shape[1])
        for number, each in gains.items():
            alike = (plans.ranks[0] == plans.ranks[0, number]).all(dim=1)
            estimates[:, alike] = torch.tensor(offsets)[:, None] + torch.tensor(each)[:, None]
        return estimates

    return Judges(say)


def stirred(make: Callable[[], torch.nn.Module], scale: float = 0.2) -> Any:
    torch.manual_seed(3)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(params=[None, 2], ids=["first", "later"])
def seen(request: pytest.FixtureRequest, make_observation: MakeObservation) -> Observation:
    """Twelve modules at a first or a later decision."""
    return make_observation(12, max_step=request.param)


@pytest.fixture(scope="module")
def network() -> RankNetwork:
    made: RankNetwork = stirred(lambda: RankNetwork(NetworkConfig(width=8)))
    return made


def proposed(network: RankNetwork, observation: Observation) -> list[Decision]:
    """In the order in which critics see them; ahead of them, later on, the ranks as they are."""
    acted = LearnedPolicy("actor", network).act(observation)
    proposed = candidate_actions(observation, acted.scores, acted.placement, DRAWS, np.random.default_rng(0))
    return [candidate.decision(observation) for candidate in proposed]


def same(left: Decision, right: Decision) -> bool:
    names = [field.name for field in fields(Decision) if field.name != "deliberation"]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def ranks_of(observation: Observation, decision: Decision) -> IntArray:
    return decided_plan(observation.problem, decision).ranks


# Which plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, FIXED + DRAWS - 1])
def test_it_takes_the_plan_that_critics_expect_the_most_of(
    seen: Observation, network: RankNetwork, number: int
) -> None:
    place = number if seen.problem.max_step is None else number + 1
    critics = judges_of({3: (0.1, 0.05)} | {place: (0.3, 0.2)})
    taken = LearnedPolicy("p", network, critics).decide(seen)
    np.testing.assert_array_equal(ranks_of(seen, taken), ranks_of(seen, proposed(network, seen)[number]))
    assert taken.expected == pytest.approx(0.25)


def test_critics_see_the_state_and_the_ranks(seen: Observation, network: RankNetwork) -> None:
    critics = judges_of({})
    policy = LearnedPolicy("p", network, critics)
    policy.decide(seen)
    (plans,) = critics.asked
    scores = policy.act(seen).scores
    np.testing.assert_array_equal(plans.modules, seen.modules[None])
    np.testing.assert_array_equal(plans.run, seen.run[None])
    np.testing.assert_allclose(plans.scores, (scores - scores.mean())[None], atol=1e-6)
    assert plans.mask.tolist() == [[1.0] * 12]
    assert {plans.modules.dtype, plans.run.dtype, plans.scores.dtype, plans.mask.dtype} == {torch.float32}
    expected = [ranks_of(seen, decision) for decision in proposed(network, seen)]
    if seen.problem.max_step is not None:
        expected.insert(0, seen.problem.ranks)
    np.testing.assert_array_equal(plans.ranks[0], np.stack(expected))


# Or none --------------------------------------------------------------------------------------------------------------


def no_critics_opinion() -> PlanValueEnsemble:
    """Critics of which each says the same of all plans."""
    critics = PlanValueEnsemble(PlanValueConfig(width=4))
    with torch.no_grad():
        for number, critic in enumerate(critics.critics):
            critic.head[-1].weight.zero_()  # type: ignore[index, union-attr]
            critic.head[-1].bias.fill_(float(number))  # type: ignore[index, union-attr]
    return critics.eval()


def test_without_a_better_plan_the_first_is_uniform(make_observation: MakeObservation, network: RankNetwork) -> None:
    """In bytes there is room for rank 14 everywhere; top-down would leave modules out so that others have 16."""
    per_rank, needs = np.full((1, 12), 10.0), np.arange(3)[:, None] >= np.arange(12)[None] // 4
    cost = ByteCost(("backward",), np.array([1000.0]), per_rank, np.full((1, 3), 700.0), needs)
    for options in ({}, {"cost": cost, "limit": 1000 + 3 * 700.0 + 14 * 120.0}):
        observation = make_observation(12, **options)
        taken = LearnedPolicy("p", network, no_critics_opinion()).decide(observation)
        np.testing.assert_array_equal(
            ranks_of(observation, taken), ranks_of(observation, proposed(network, observation)[0])
        )
        assert (taken.expected, taken.uncertainty) == (0.0, 0.0)
    assert uniform_ranks(observation.problem).tolist() == [14] * 12
    assert ranks_of(observation, taken).min() >= 12


def test_without_a_better_plan_nothing_changes_later(make_observation: MakeObservation, network: RankNetwork) -> None:
    for seed in range(3):
        observation = make_observation(12, seed, max_step=2)
        taken = LearnedPolicy("p", network, no_critics_opinion()).decide(observation)
        np.testing.assert_array_equal(taken.ranks, observation.problem.ranks)
        assert (taken.expected, taken.uncertainty) == (0.0, 0.0)
        assert any(
            (ranks_of(observation, decision) != observation.problem.ranks).any()
            for decision in proposed(network, observation)
        )


def test_plans_that_are_worse_are_not_taken(seen: Observation, network: RankNetwork) -> None:
    everything = range(1, FIXED + DRAWS + (seen.problem.max_step is not None))
    worse = LearnedPolicy("p", network, judges_of(dict.fromkeys(everything, (-0.1, -0.1))))
    indifferent = LearnedPolicy("p", network, judges_of({}))
    assert same(worse.decide(seen), indifferent.decide(seen))


def test_what_critics_disagree_about_is_not_worth_a_risk(seen: Observation, network: RankNetwork) -> None:
    def decided(gains: Mapping[int, Sequence[float]]) -> Decision:
        return LearnedPolicy("p", network, judges_of(gains)).decide(seen)

    spread, caution = 0.2, LCB_COEFFICIENT if seen.problem.max_step is None else LATER_LCB_COEFFICIENT
    bold = 1.5 * caution * spread
    timid = 0.5 * caution * spread
    stays, goes = (decided({9: (gain - spread, gain + spread)}) for gain in (timid, bold))
    assert same(stays, decided({}))
    assert (goes.expected, goes.uncertainty) == pytest.approx((bold, spread))
    assert not np.array_equal(ranks_of(seen, goes), ranks_of(seen, stays))


def test_a_surer_plan_goes_before_one_that_promises_more(seen: Observation, network: RankNetwork) -> None:
    later = seen.problem.max_step is not None
    critics = judges_of({7 + later: (0.9, 0.1), 9 + later: (0.3, 0.2)})
    taken = LearnedPolicy("p", network, critics).decide(seen)
    assert (taken.expected, taken.uncertainty) == pytest.approx((0.25, 0.05))
    np.testing.assert_array_equal(taken.ranks, proposed(network, seen)[9].ranks)


def test_what_a_critic_says_of_all_plans_does_not_count(seen: Observation, network: RankNetwork) -> None:
    one, other = (
        LearnedPolicy("p", network, judges_of({9: (0.5, 0.25)}, offsets)).decide(seen)
        for offsets in ((0.0, 0.0), (8.0, -16.0))
    )
    assert same(one, other)
    assert (one.expected, one.uncertainty) == (0.375, 0.125)


# With critics that can be trained -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def critics() -> PlanValueEnsemble:
    made: PlanValueEnsemble = stirred(lambda: PlanValueEnsemble(PlanValueConfig(count=2, width=8)))
    return made


@pytest.mark.parametrize(("modules", "max_step"), [(1, None), (2, 2), (60, None), (60, 2)])
def test_decisions_are_deterministic_and_possible(
    make_observation: MakeObservation, network: RankNetwork, critics: PlanValueEnsemble, modules: int, max_step: Any
) -> None:
    observation = make_observation(modules, max_step=max_step)
    state, draws = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"]  # noqa: NPY002
    first, again = (LearnedPolicy("p", network, critics).decide(observation) for _ in range(2))
    assert same(first, again)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from what others draw from"
    assert np.random.get_state(legacy=False)["state"]["pos"] == draws  # noqa: NPY002
    ranks = ranks_of(observation, first)
    assert observation.problem.fits(ranks)
    moved = observation.problem.ladder.rung(ranks) - observation.problem.rungs
    assert max_step is None or np.abs(moved).max() <= max_step
    assert all(parameter.grad is None for parameter in critics.parameters())


def test_expected_and_uncertainty_are_those_of_the_plan_that_is_chosen(
    make_observation: MakeObservation, network: RankNetwork, critics: PlanValueEnsemble
) -> None:
    taken = 0
    for seed in range(20):
        observation = make_observation(12, seed)
        asked: list[Plans] = []

        def note(_: torch.nn.Module, given: tuple[Plans], asked: list[Plans] = asked) -> None:
            asked.append(given[0])

        handle = critics.register_forward_pre_hook(note)
        decided = LearnedPolicy("p", network, critics).decide(observation)
        handle.remove()
        with torch.no_grad():
            estimates = critics(asked[0])[:, 0].double().numpy()
        gains = estimates - estimates[:, :1]
        means, stds = gains.mean(axis=0), gains.std(axis=0)
        bounds = means - LCB_COEFFICIENT * stds
        plans = asked[0].ranks[0].numpy()
        tied = np.flatnonzero((bounds >= bounds.max() - TIE) & (bounds > 0))
        nearness = [plan_distance(plans[number], plans[0]) for number in tied]
        best_of_nearest = [number for number, far in zip(tied, nearness, strict=True) if far == min(nearness)]
        chosen = max(best_of_nearest, key=lambda number: bounds[number]) if bounds.max() > 0 else 0
        assert (decided.expected, decided.uncertainty) == pytest.approx((means[chosen], stds[chosen]), abs=1e-5)
        np.testing.assert_array_equal(asked[0].ranks[0, chosen], ranks_of(observation, decided))
        assert decided.expected >= LCB_COEFFICIENT * decided.uncertainty - 1e-6
        taken += chosen > 0
    assert taken > 0


# Without critics ------------------------------------------------------------------------------------------------------


def test_without_critics_the_actor_decides(seen: Observation, network: RankNetwork) -> None:
    policy = LearnedPolicy("p", network)
    taken, action = policy.decide(seen), policy.act(seen)
    expected = decision_from_scores(seen, action.scores, action.placement)
    np.testing.assert_array_equal(taken.ranks, expected.ranks)
    np.testing.assert_array_equal(taken.scores, action.scores)
    assert (taken.rank_floor, taken.depth_bias) == (expected.rank_floor, expected.depth_bias)
    assert (taken.log_prob, taken.expected, taken.uncertainty) == (None, action.expected, action.uncertainty)
    assert taken.deliberation is None
    assert taken.uncertainty > 0


# A policy that explores ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> LearnedPolicy:
    loaded = load_policy("default")
    assert isinstance(loaded, LearnedPolicy)
    return loaded


def drawn(policy: LearnedPolicy, observation: Observation, temperature: float, seed: int = 0) -> Deliberation:
    deliberation = exploring(policy, temperature, seed).decide(observation).deliberation
    assert deliberation is not None
    return deliberation


def test_probabilities_are_a_softmax_over_the_bounds(make_observation: MakeObservation, shipped: LearnedPolicy) -> None:
    decision, found = exploring(shipped, 0.05).decide(make_observation(12)), drawn(shipped, make_observation(12), 0.05)
    odds = np.where(found.may_take, np.exp(found.bound.astype(float) / 0.05), 0)
    np.testing.assert_allclose(found.probabilities, odds / odds.sum(), rtol=1e-6)
    assert decision.log_prob == pytest.approx(np.log(found.probabilities[found.plan]))
    assert decision.expected == found.mean[found.plan]
    assert len(np.unique(found.plans, axis=0)) == len(found.plans)
    np.testing.assert_array_equal(found.plans[found.plan], ranks_of(make_observation(12), decision))


def test_plans_are_drawn_as_often_as_the_probabilities_say(
    make_observation: MakeObservation, shipped: LearnedPolicy
) -> None:
    """Chi-squared over some seeds, with the plans from the likeliest on in four parts that are about as likely."""
    draws = 100
    found = [drawn(shipped, make_observation(6), 0.2, seed) for seed in range(draws)]
    assert drawn(shipped, make_observation(6), 0.2, 3).plan == found[3].plan, "the same seed draws the same"
    order = found[0].probabilities.argsort()[::-1]
    likely = found[0].probabilities[order]
    part = np.minimum(4 * (likely.cumsum() - likely / 2), 3).astype(int)
    expected = draws * np.bincount(part, weights=likely, minlength=4)
    seen = np.bincount(part[order.argsort()[[each.plan for each in found]]], minlength=4)
    assert expected.min() >= 5
    assert ((seen - expected) ** 2 / expected).sum() < 21.1, "the upper 1e-4 quantile, by chance once in 10,000 tries"


def test_little_temperature_takes_the_best_that_fits(make_observation: MakeObservation, shipped: LearnedPolicy) -> None:
    for seed in range(4):
        found = drawn(shipped, make_observation(12, seed), 1e-6)
        assert found.may_take[found.plan]
        assert found.bound[found.plan] >= found.bound[found.may_take].max() - 1e-4


@pytest.mark.parametrize("temperature", [0, -1, "warm", float("nan"), float("inf")])
def test_a_temperature_that_cannot_be(shipped: LearnedPolicy, temperature: Any) -> None:
    with pytest.raises(ConfigError, match="a temperature above 0, in the unit of the votes"):
        exploring(shipped, temperature)


def test_only_a_policy_that_weighs_plans_explores(shipped: LearnedPolicy) -> None:
    for other in (find_rule("signal-mean"), replace(shipped, value_ensemble=None)):
        with pytest.raises(ConfigError, match="has no value ensemble"):
            exploring(other, 0.1)
