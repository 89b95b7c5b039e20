"""A policy that explores draws plans with the probabilities that it tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.learned.policy import LearnedPolicy, exploring
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.observation import Observation
from rankpilot.agents.policy import decided_plan
from rankpilot.agents.rules import find_rule
from rankpilot.errors import ConfigError

MakeObservation = Callable[..., Observation]


@pytest.fixture(scope="module")
def policy() -> LearnedPolicy:
    loaded = load_policy("default")
    assert isinstance(loaded, LearnedPolicy)
    return loaded


def test_probabilities_are_a_softmax_over_the_bounds(make_observation: MakeObservation, policy: LearnedPolicy) -> None:
    decision = exploring(policy, 0.05).decide(make_observation(12))
    deliberation = decision.deliberation
    assert deliberation is not None
    odds = np.where(deliberation.may_take, np.exp(deliberation.bound.astype(float) / 0.05), 0)
    np.testing.assert_allclose(deliberation.probabilities, odds / odds.sum(), rtol=1e-6)
    assert decision.log_prob == pytest.approx(np.log(deliberation.probabilities[deliberation.plan]))
    assert decision.expected == deliberation.mean[deliberation.plan]
    plans = deliberation.plans
    assert len(np.unique(plans, axis=0)) == len(plans)
    np.testing.assert_array_equal(plans[deliberation.plan], decided_plan(make_observation(12).problem, decision).ranks)


def test_plans_are_drawn_as_often_as_the_probabilities_say(
    make_observation: MakeObservation, policy: LearnedPolicy
) -> None:
    """Chi-squared over some seeds: its upper 1e-4 quantile is passed by chance once in ten thousand tries."""
    observation, draws = make_observation(6), 150
    deliberations = [exploring(policy, 0.2, seed).decide(observation).deliberation for seed in range(draws)]
    counts = Counter(each.plan for each in deliberations if each)
    expected = draws * deliberations[0].probabilities  # type: ignore[union-attr]
    often = expected >= 5
    seen = np.array([counts[plan] for plan in range(len(expected))], dtype=float)
    parts = [np.append(values[often], values[~often].sum()) for values in (seen, expected)]
    statistic = float(((parts[0] - parts[1]) ** 2 / np.maximum(parts[1], 1e-9)).sum())
    freedom = often.sum()
    assert freedom >= 3
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 8


def test_the_same_seed_draws_the_same(make_observation: MakeObservation, policy: LearnedPolicy) -> None:
    observation, other = make_observation(12), make_observation(12, 1)
    one, again = (exploring(policy, 1.0, 3).decide(observation) for _ in range(2))
    np.testing.assert_array_equal(one.ranks, again.ranks)
    taken = {exploring(policy, 1.0, seed).decide(observation).deliberation.taken for seed in range(8)}  # type: ignore[union-attr]
    assert len(taken) > 1
    assert one.deliberation is not None
    assert exploring(policy, 1.0, 3).decide(other).deliberation is not None


def test_little_temperature_takes_the_best_that_fits(make_observation: MakeObservation, policy: LearnedPolicy) -> None:
    for seed in range(4):
        deliberation = exploring(policy, 1e-6).decide(make_observation(12, seed)).deliberation
        assert deliberation is not None
        assert deliberation.plan == int(np.argmax(np.where(deliberation.may_take, deliberation.bound, -np.inf)))


@pytest.mark.parametrize("temperature", [0, -1, "warm", float("nan"), float("inf")])
def test_a_temperature_that_cannot_be(policy: LearnedPolicy, temperature: Any) -> None:
    with pytest.raises(ConfigError, match="a temperature above 0, in the unit of the votes"):
        exploring(policy, temperature)


def test_only_a_policy_that_weighs_plans_explores(policy: LearnedPolicy) -> None:
    for other in (find_rule("signal-mean"), replace(policy, value_ensemble=None)):
        with pytest.raises(ConfigError, match="has no value ensemble"):
            exploring(other, 0.1)
