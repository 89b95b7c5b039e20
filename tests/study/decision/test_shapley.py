"""Shapley values: they add up on every decision, and are those of a game whose values are known."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.log import DecisionRecord
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.agents.rules import find_rule
from rankpilot.errors import ConfigError
from rankpilot.study.shapley import GROUPS, USUAL_RUN, attribute

from .conftest import Decide, Observe, PolicyOf

SNR, COST, BUDGET = MODULE_FEATURES.index("snr"), MODULE_FEATURES.index("rank_cost"), RUN_FEATURES.index("budget")


def test_the_groups_hold_every_feature_once() -> None:
    features = [feature for names in GROUPS.values() for feature in names]
    assert sorted(features) == sorted((*MODULE_FEATURES, *RUN_FEATURES))
    assert set(USUAL_RUN) == set(RUN_FEATURES)


def test_they_add_up_on_every_decision_of_runs(decisions: list[DecisionRecord], policy: LearnedPolicy) -> None:
    taken = 0
    for logged in decisions:
        found, deliberation = attribute(logged, policy), logged.deliberation
        assert found.error < 1e-6
        assert found.bound_total == pytest.approx(deliberation.bound[found.plan], abs=1e-5)
        assert found.mean_total == pytest.approx(deliberation.mean[found.plan], abs=1e-5)
        assert found.plan != found.reference
        taken += found.plan == deliberation.plan
        told = found.to_json()
        assert told["alone"] + sum(group["value"] for group in told["groups"]) == pytest.approx(told["total"], abs=1e-6)
        assert [group["name"] for group in told["groups"]] == list(GROUPS)
    assert 0 < taken < len(decisions), "plans that were taken, and the best others where ranks were kept"


def shares(values: dict[frozenset[str], float], players: tuple[str, ...]) -> dict[str, float]:
    """Shapley values from the definition: the mean over all orders."""
    sums = dict.fromkeys(players, 0.0)
    orders = list(permutations(players))
    for order in orders:
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            sums[player] += (values[before | {player}] - values[before]) / len(orders)
    return sums


def test_they_are_those_of_the_definition(make_observation: Observe, policy_of: PolicyOf, log_decision: Decide) -> None:
    """Three groups that depend on one another, and a plan's shape; two networks that disagree."""

    def say(plans: Plans) -> torch.Tensor:
        ranks = plans.ranks.to(plans.modules.dtype) ** 2
        ranks = ranks / ranks.sum(2, keepdim=True)
        signal = (ranks * plans.modules[:, None, :, SNR]).sum(2)
        cost = (ranks * plans.modules[:, None, :, COST].exp()).sum(2)
        budget = plans.run[:, None, BUDGET]
        value = ranks.max(dim=2).values + signal * cost * (1 + budget)
        return torch.stack([value, 2 * value + signal])

    observation = make_observation(12, seed=3)
    logged = log_decision(observation, policy_of(say))
    found, deliberation = attribute(logged, policy_of(say)), logged.deliberation

    players = ("signals", "costs", "budget of the run")
    bounds, means = {}, {}
    for bits in range(8):
        shown = frozenset(name for place, name in enumerate(players) if bits >> place & 1)
        modules, run = observation.modules.astype(np.float64), observation.run.astype(np.float64)
        if "signals" not in shown:
            modules[:, SNR] = modules[:, SNR].mean()
        if "costs" not in shown:
            modules[:, COST] = modules[:, COST].mean()
        if "budget of the run" not in shown:
            run[BUDGET] = USUAL_RUN["budget"]
        ranks = deliberation.plans[[found.reference, found.plan]]
        parts: list[Any] = [torch.from_numpy(part)[None] for part in (modules, np.zeros(12), run, np.ones(12), ranks)]
        values = say(Plans(*parts)).numpy()[:, 0]
        difference = values[:, 1] - values[:, 0]
        means[shown] = float(difference.mean())
        bounds[shown] = float(difference.mean() - deliberation.lcb_coefficient * difference.std())
    for values_of, got, alone in ((bounds, found.bound, found.bound_alone), (means, found.mean, found.mean_alone)):
        expected = shares(values_of, players)
        assert dict(zip(GROUPS, got.tolist(), strict=True)) == pytest.approx(
            {name: expected.get(name, 0.0) for name in GROUPS}, abs=1e-12
        )
        assert alone == pytest.approx(values_of[frozenset()], abs=1e-12)


def test_other_networks_than_those_of_the_log_are_refused(decisions: list[DecisionRecord], policy_of: PolicyOf) -> None:
    other = policy_of(lambda plans: plans.ranks.double().mean(2)[None])
    with pytest.raises(ConfigError, match="Pass the policy that decided"):
        attribute(decisions[0], other)


def test_without_votes_there_is_nothing_to_share(
    make_observation: Observe, policy: LearnedPolicy, log_decision: Decide
) -> None:
    logged = log_decision(make_observation(8), find_rule("signal-mean"))
    with pytest.raises(ConfigError, match="decision 0 of signal-mean has none"):
        attribute(logged, policy)
