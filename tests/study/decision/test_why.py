"""Explanations say what the log holds: recipe, votes, tie, and what became of the ranks asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans
from rankpilot.agents.log import DecisionRecord
from rankpilot.agents.observation import Observation, module_feature
from rankpilot.agents.policy import Decision, decided_plan, decision_from_scores
from rankpilot.agents.rules import signal_mean
from rankpilot.cost.cost import unit_cost
from rankpilot.plan.plan import SCORE_BOUND, base_depth_bias, base_rank_floor
from rankpilot.study.why import Explanation, actor_terms, same_in_tie

from .conftest import Decide, Observe, PolicyOf

KEYS = {
    "decision", "step", "first", "policy", "verdict", "sentences", "candidates", "plans", "taken", "reference",
    "caution", "margin", "unit_of_votes", "actor", "shapley", "what_ifs", "stability", "goal",
}  # fmt: skip


def test_the_actors_scores_are_the_sum_of_their_terms(decisions: list[DecisionRecord]) -> None:
    for logged in decisions:
        found = logged.deliberation
        sums = actor_terms(logged, found).sum(axis=0)
        np.testing.assert_allclose(np.clip(sums, -SCORE_BOUND, SCORE_BOUND), found.actor_scores, atol=1e-5)


def test_the_recipe_of_every_candidate_leads_to_its_plan(decisions: list[DecisionRecord]) -> None:
    """What pages are told of a candidate is enough to make its plan again."""
    for logged in decisions:
        observation, found = logged.observation, logged.deliberation
        told = Explanation(logged).to_json()
        parts = {name: module_feature(observation, name) for name in ("rank_cost", "relative_depth")}
        parts |= {"signal_mean": signal_mean(observation), "actor": found.actor_scores}
        parts = {name: values - values.mean() for name, values in parts.items()}
        base = base_rank_floor(logged.problem), base_depth_bias(logged.problem)
        for number, candidate in enumerate(told["candidates"]):
            if candidate["rank_floor"] is None:
                assert found.candidates[number] == "keep"
                continue
            scores = sum(gain * parts[name] for name, gain in candidate["gains"].items())
            placement = (np.log2(candidate["rank_floor"] / base[0]), candidate["depth_bias"] - base[1])
            decision = decision_from_scores(observation, np.clip(scores, -SCORE_BOUND, SCORE_BOUND), placement)
            ranks = decided_plan(logged.problem, decision).ranks
            assert ranks.tolist() == told["plans"][candidate["plan"]]["ranks"], found.candidates[number]


def test_json_is_the_contract(decisions: list[DecisionRecord]) -> None:
    for logged in decisions:
        told, found = Explanation(logged).to_json(), logged.deliberation
        assert set(told) == KEYS
        json.dumps(told, allow_nan=False)
        assert told["plans"][told["taken"]]["ranks"] == found.plans[found.plan].tolist()
        assert told["first"] == (logged.number == 0)
        bounds = [plan["mean"] - told["caution"] * plan["sd"] for plan in told["plans"]]
        assert bounds == pytest.approx([plan["bound"] for plan in told["plans"]], abs=1e-6)
        for plan in told["plans"]:
            assert plan["cost"] == unit_cost(logged.problem.cost, np.array(plan["ranks"]))
            assert plan["probability"] is None


def test_sentences_of_decisions_of_a_run(decisions: list[DecisionRecord]) -> None:
    first = Explanation(decisions[0])
    deliberation = decisions[0].deliberation
    text = " ".join(first.sentences())
    assert first.verdict.startswith("At step 0 the plan of candidate ")
    assert f"{deliberation.mean[deliberation.plan]:.3f} on the mean" in text
    assert f"a lower bound of {deliberation.bound[deliberation.plan]:.3f}" in text
    kept = [Explanation(logged) for logged in decisions if logged.kept]
    assert kept
    for each in kept:
        assert "the ranks in place were taken: no other plan is surely better" in each.verdict
        assert "leaves the ranks as they are" in each.sentences()[0]
        assert "Every module got the rank that the policy asked for." in each.sentences()


def test_a_tie_tells_what_its_plans_have_in_common(
    make_observation: Observe, policy_of: PolicyOf, log_decision: Decide
) -> None:
    def say(plans: Plans) -> torch.Tensor:
        return plans.ranks.double().std(2)[None].repeat(2, 1, 1) / 500

    logged = log_decision(make_observation(10), policy_of(say))
    found = logged.deliberation
    same, plans = same_in_tie(found), found.plans[found.tied]
    assert len(plans) >= 2
    assert (np.ptp(plans, axis=0)[same] == 0).all()
    assert np.ptp(plans, axis=0)[~same].all()
    told = Explanation(logged).sentences()
    (sentence,) = [text for text in told if "plans are tied" in text]
    assert sentence.startswith(f"{len(plans)} of {len(found.plans)} plans are tied")
    assert f"{same.sum()} of {len(same)} modules the same rank" in sentence
    assert found.margin < 0
    assert f"is {-found.margin:.3f} higher. It was taken because it is nearest to the reference" in " ".join(told)
    fits = np.arange(len(found.plans)) != np.argmax(found.bound)
    limited = replace(logged.decision, deliberation=replace(found, allowed=fits))
    without = Explanation(replace(logged, decision=limited))
    assert f"the best of the other {len(found.plans) - 2} plans that fit" in " ".join(without.sentences()).lower()
    assert [plan["fits"] for plan in without.to_json()["plans"]] == fits.tolist()


def test_plans_that_are_drawn_have_probabilities(
    make_observation: Observe, policy_of: PolicyOf, log_decision: Decide
) -> None:
    def say(plans: Plans) -> torch.Tensor:
        return (plans.ranks > 4).double().mean(2)[None].repeat(2, 1, 1)

    logged = log_decision(make_observation(10), policy_of(say, temperature=1.0))
    told = Explanation(logged).to_json()
    assert sum(plan["probability"] for plan in told["plans"]) == pytest.approx(1)
    chance = logged.deliberation.probabilities[logged.deliberation.plan]
    assert f"was drawn, with a probability of {chance:.1%}: " in told["verdict"]


# What became of the ranks asked for ---------------------------------------------------------------------------------


@dataclass
class Wants:
    """A policy that wants certain ranks."""

    ranks: tuple[int, ...]
    name: str = "wants"

    def decide(self, observation: Observation) -> Decision:
        return Decision(np.array(self.ranks), np.zeros(len(self.ranks)), exact=True)


def decided(make: Observe, log: Decide, *ranks: int, **problem: Any) -> Any:
    observation = make(4, ranks=np.array([4, 4, 4, 4]), **problem)
    return log(observation, Wants(ranks))


def refused(logged: DecisionRecord) -> list[str]:
    """Why modules did not get the rank asked for; each is told of one module."""
    start, told = "1 module did not get the rank asked for: ", Explanation(logged).sentences()
    return [text.removeprefix(start).rstrip(".") for text in told if text.startswith(start)]


def test_every_reason_is_told(make_observation: Observe, log_decision: Decide) -> None:
    bounds = {"high": np.array([32, 2, 32, 32]), "low": np.array([0, 0, 6, 0])}
    logged = decided(make_observation, log_decision, 5, 4, 4, 32, max_step=2, limit=1e9, **bounds)
    assert logged.rank_after.tolist() == [4, 2, 8, 12]
    assert refused(logged) == [
        "the ladder has no such rank, and the next one below counts",
        "their upper bound is lower",
        "their lower bound is higher",
        "no module may move further at one decision",
    ]


def test_pinned_modules_and_changes_by_a_person(make_observation: Observe, log_decision: Decide) -> None:
    logged = decided(make_observation, log_decision, 4, 8, 4, 4)
    pinned, edited = np.array([False, True, False, False]), logged.rank_clipped.copy()
    edited[1], edited[3] = 4, 16
    assert refused(replace(logged, pinned=pinned, rank_clipped=edited, rank_after=edited)) == [
        "they are pinned",
        "it was given by hand, or changed by a limit of time",
    ]


def test_a_budget_lowers_and_its_rest_raises(make_observation: Observe, log_decision: Decide) -> None:
    logged = decided(make_observation, log_decision, 32, 32, 4, 4, limit=3000.0)
    lowered = int((logged.rank_after < logged.rank_clipped).sum())
    assert lowered >= 1
    (sentence,) = [text for text in Explanation(logged).sentences() if "exceed the budget" in text]
    assert sentence.startswith(f"{lowered} module")
    same = Explanation(decided(make_observation, log_decision, 2, 2, 2, 2))
    assert same.sentences() == ["Every module got the rank that the policy asked for."]
