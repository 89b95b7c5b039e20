"""Explanations say what the log holds: what was expected of plans, and what became of the ranks asked for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.policy_file import LearnedPolicy, load_policy
from rankpilot.common.errors import RunFolderError
from rankpilot.cost.savers.prices import Saved
from rankpilot.decide.choice import Choice
from rankpilot.decide.groups import GROUP_RULES, GroupView
from rankpilot.decide.log import DecisionLog, DecisionRecord
from rankpilot.decide.observation import Observation
from rankpilot.decide.plan.goal import CAUTION, Goal
from rankpilot.decide.policy import Decision, decision_to_keep
from rankpilot.decide.rate_control import KEEP, UNDO
from rankpilot.decide.rules import find_rule
from rankpilot.study.why import Explanation, explain, explanations

from ..conftest import four_plans
from .conftest import Decide, Observe, chooser

KEYS = {"decision", "step", "first", "policy", "verdict", "sentences", "what_ifs"}
OF_CHOICE = {"goal", "plans", "taken", "parts"}


@dataclass
class Wants:
    """A policy that wants certain ranks."""

    ranks: tuple[int, ...]
    choice: Choice | None = None
    name: str = "wants"

    def decide(self, observation: Observation) -> Decision:
        return Decision(np.array(self.ranks), np.zeros(len(self.ranks)), exact=True, choice=self.choice)


Explained = Any


@pytest.fixture
def of_choice(make_observation: Observe, log_decision: Decide) -> Explained:
    """The explanation of a decision that was chosen from some plans."""

    def make(found: Choice, **changes: Any) -> Explanation:
        observation = make_observation(4, ranks=np.ones(4, dtype=np.int64), limit=1e9)
        return Explanation(log_decision(observation, Wants(tuple(found.plans[found.taken].tolist()), found), **changes))

    return make


def test_the_lowest_loss(of_choice: Explained) -> None:
    saved = (Saved("plain LoRA", 8.0 * 2**20, 3.0 * 2**20), Saved("loss in tiles", 6.0 * 2**20, 2.0 * 2**20))
    told = of_choice(four_plans(caveats=("it learns labels",), taken=2), saved=saved, rates=(1e-3, 2e-3))
    assert told.verdict == (
        'At step 0 the plan "rank 16 on the MLP modules" was chosen: its loss is expected to be -2.0 % '
        "versus rank 8 on all modules, very likely at most -0.2 %."
    )
    assert told.sentences() == [
        "The expectation is the sum of these effects: rank of MLP modules -3.0 %, few modules +1.0 %.",
        ("Fine-tunes vary with a standard deviation of 1.0 %: the loss may be anywhere from -3.7 % to -0.2 %."),
        "The goal is the lowest loss within the budget.",
        'The next best by cautious loss estimate: "rank 8 on all modules" (+0.0 %), "rank 4 on all modules" '
        '(+0.6 %), "rank 1 on all modules" (+6.2 %).',
        "This is less reliable than usual: it learns labels.",
        "The plan was trained at a peak learning rate of 0.002, equivalent to 0.001 for plain LoRA.",
        "A step of this LoRA takes 8 MiB, or 3 MiB with all layers checkpointed. With exact savers it takes 6 MiB, or "
        "2 MiB with all layers checkpointed, with the same losses.",
        "Every module got the rank requested by the policy.",
    ]


PLAIN_KEPT = '"rank 8 on all modules" was chosen: no'
UNKEPT = (
    'plan "rank 1 on all modules" was chosen: the goal cannot be met: rank 8 on all modules does not '
    "fit the budget or bounds, and no plan that fits is very likely to stay within +1.0 % of "
    "its loss. A larger budget or tolerance helps."
)
FEWEST = (
    'plan "rank 4 on all modules" was chosen: of 3 plans very likely within +1.0 % of the loss of '
    "rank 8 on all modules, it takes the least memory, 2,000 parameters versus 4,000 parameters."
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"goal": Goal("bytes")}, FEWEST),
        ({"goal": Goal("time")}, "it takes the least time per step, 75% versus 100%."),
        (
            {"goal": Goal("bytes", 0.002), "costs": np.array([1.0, 2, 3, 4])},
            f"{PLAIN_KEPT} cheaper plan is very likely to stay",
        ),
        ({"goal": Goal("bytes"), "fits": np.arange(4) == 3}, UNKEPT),
        (
            {"fits": np.arange(4) == 1},
            "to be +0.4 % versus rank 8 on all modules, which does not fit, very likely at most",
        ),
        ({"spread": np.array([0, 0.1, 0.1, 0.1])}, f"{PLAIN_KEPT} plan that fits is clearly better than"),
    ],
)
def test_verdicts(of_choice: Explained, changes: dict[str, Any], words: str) -> None:
    assert words in of_choice(four_plans(**changes)).verdict


def test_what_else_was_within_the_tolerance(of_choice: Explained) -> None:
    told = of_choice(four_plans(goal=Goal("time"))).sentences()
    assert (
        'The next best within the tolerance: "rank 8 on all modules" (100%), "rank 16 on the MLP modules" (125%).'
        in told
    )
    alone = four_plans(goal=Goal("time"), fits=np.arange(4) == 1)
    assert "No other plan is within the tolerance." in of_choice(alone).sentences()
    assert "No other plan fits." in of_choice(replace(alone, goal=Goal())).sentences()


@pytest.mark.parametrize("goal", ["quality", "bytes"])
def test_json_is_the_contract(first: Observation, log_decision: Decide, goal: Any) -> None:
    logged = log_decision(first, chooser(goal))
    told, found = explain(logged, chooser()).to_json(), logged.choice
    assert set(told) == KEYS | OF_CHOICE
    json.dumps(told, allow_nan=False)
    plan = told["plans"][told["taken"]]
    assert plan["ranks"] == logged.rank_after.tolist()
    assert sum(part["value"] for part in told["parts"]) == pytest.approx(plan["expected"]), "no part is left out"
    assert {text["text"] for text in told["what_ifs"]} <= set(told["sentences"])
    assert len(told["what_ifs"]) > 0
    shown = [row for row in told["plans"] if row["fits"] and row["within"] in (None, True)]
    cautious = [row["expected"] + CAUTION * row["spread"] for row in shown]
    listed = cautious if goal == "quality" else [row["cost"] for row in shown]
    assert listed == sorted(listed), "the best for the goal come first"
    assert len(told["plans"]) == len(found.plans)


def test_policies_that_are_not_at_hand(first: Observation, log_decision: Decide, make_observation: Observe) -> None:
    """Rules and the policy that ships are found by their names; the rest of an explanation needs no policy."""
    rule = find_rule("signal-mean")
    of_rule = explain(log_decision(make_observation(8), rule)).to_json()
    assert of_rule["verdict"] == "At step 0 signal-mean decided; it predicts no losses."
    assert of_rule["what_ifs"]
    assert set(of_rule) == KEYS
    logged = log_decision(first, chooser())
    assert explain(logged, rule).notes == ("The policy default is not available, so there are no what-ifs.",)
    assert (
        explain(log_decision(make_observation(4), Wants((1, 1, 1, 1)))).notes[0].startswith("The policy wants is not")
    )
    assert "parts, spread" in explain(logged, replace(chooser(), worth=None)).notes[0]
    assert explain(logged, rule, what_ifs=False).notes == ()


def test_a_decision_of_an_agent_shows_what_it_weighed(make_observation: Observe, log_decision: Decide) -> None:
    agent, observation = load_policy("agent"), make_observation(24, max_step=2)
    assert isinstance(agent, LearnedPolicy)
    logged = log_decision(observation, agent)
    action, likely, saw, rule = explain(logged, agent, what_ifs=False).steered
    view = GroupView.of(logged.observation)
    found = re.findall(r"([^;:]+) \((\d+)%\)", likely)
    assert action == f"The action was to {found[0][0].strip()}."
    best = [each for each in np.sort(agent.probabilities(view))[:-4:-1] if each >= 0.005]
    np.testing.assert_allclose([int(share) for _, share in found], 100 * np.array(best), atol=0.51)
    assert f"{view.run_feature('spent'):.0%} of the budget" in saw
    union = GROUP_RULES["union"].actor.act(view)
    assert rule.endswith("do the same.") == (union == agent.act(view))
    of_union = explain(log_decision(observation, GROUP_RULES["union"])).steered
    assert len(of_union) == 2, "a rule has no probabilities, and is not compared with itself"
    other = replace(logged, decision=replace(logged.decision, change=UNDO if logged.decision.change != UNDO else KEEP))
    assert explain(other, agent, what_ifs=False).steered == (), "it was another version of the agent"


def test_decisions_that_change_nothing_and_corrections(make_observation: Observe, log_decision: Decide) -> None:
    observation, rule = make_observation(8), find_rule("signal-mean")
    kept = log_decision(observation, rule)
    kept = replace(kept, decision=decision_to_keep(observation), rank_after=observation.problem.ranks)
    assert explain(kept).verdict == "At step 0 signal-mean kept the ranks."
    assert explain(kept).what_ifs == ()
    correction = explain(log_decision(observation, rule, correction=True)).to_json()
    assert "the guard or a user changed the ranks" in correction["verdict"]
    assert "does not record how the guard" in correction["sentences"][-1]


def test_a_number_without_a_decision_and_a_folder_without_a_log(
    make_observation: Observe, log_decision: Decide, tmp_path: Path
) -> None:
    """A log may hold the later decisions alone."""
    log, done = DecisionLog(tmp_path / "log"), list[tuple[int, int]]()
    log.append(log_decision(make_observation(8), find_rule("signal-mean"), 2))
    told = explanations(log, what_ifs=False, on_progress=lambda *counts: done.append(counts))
    assert told[:2] == [None, None]
    assert told[2]["decision"] == 2
    assert done == [(1, 1)]
    with pytest.raises(RunFolderError, match="No decision log"):
        explanations(DecisionLog(tmp_path / "nothing"))


# What became of the ranks asked for ---------------------------------------------------------------------------------


def decided(make: Observe, log: Decide, *ranks: int, **problem: Any) -> Any:
    observation = make(4, ranks=np.array([4, 4, 4, 4]), **problem)
    return log(observation, Wants(ranks))


def refused(logged: DecisionRecord) -> list[str]:
    """Why modules did not get the rank asked for; each is told of one module."""
    start, told = "1 module did not get the requested rank: ", Explanation(logged).sentences()
    return [text.removeprefix(start).rstrip(".") for text in told if text.startswith(start)]


def test_every_reason_is_told(make_observation: Observe, log_decision: Decide) -> None:
    bounds = {"high": np.array([32, 2, 32, 32]), "low": np.array([0, 0, 6, 0])}
    logged = decided(make_observation, log_decision, 5, 4, 4, 32, max_step=2, limit=1e9, **bounds)
    assert logged.rank_after.tolist() == [4, 2, 8, 12]
    assert refused(logged) == [
        "the ladder does not have that rank, so the next lower one is used",
        "their upper bound is lower",
        "their lower bound is higher",
        "modules may move no further in one decision",
    ]


def test_pinned_modules_and_changes_by_a_person(make_observation: Observe, log_decision: Decide) -> None:
    logged = decided(make_observation, log_decision, 4, 8, 4, 4)
    pinned, edited = np.array([False, True, False, False]), logged.rank_clipped.copy()
    edited[1], edited[3] = 4, 16
    assert refused(replace(logged, pinned=pinned, rank_clipped=edited, rank_after=edited)) == [
        "they are pinned",
        "it was set by hand",
    ]


def test_a_budget_lowers_and_its_rest_raises(make_observation: Observe, log_decision: Decide) -> None:
    logged = decided(make_observation, log_decision, 32, 32, 4, 4, limit=3000.0)
    lowered = int((logged.rank_after < logged.rank_clipped).sum())
    assert lowered >= 1
    (sentence,) = [text for text in Explanation(logged).sentences() if "exceed the budget" in text]
    assert sentence.startswith(f"{lowered} module")
    same = Explanation(decided(make_observation, log_decision, 2, 2, 2, 2))
    assert same.sentences() == ["Every module got the rank requested by the policy."]
