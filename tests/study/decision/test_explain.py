"""A whole log explained for pages, and what is said where something is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.log import DecisionLog, DecisionRecord
from rankpilot.agents.policy import decided_plan
from rankpilot.agents.rules import find_rule
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.errors import ConfigError, RunFolderError
from rankpilot.study.replay import redecide, replay
from rankpilot.study.why import explain, explanations
from rich.console import Console

from .conftest import TASKS, Decide, Observe, log_runs


def test_every_decision_of_a_run_is_explained(logs: list[DecisionLog], policy: LearnedPolicy) -> None:
    told = explanations(logs[1], policy, what_ifs=False)
    assert [each["decision"] for each in told if each] == [0, 1, 2, 3]
    for each in told:
        json.dumps(each, allow_nan=False)
        assert each["shapley"]["groups"]
        assert (each["what_ifs"], each["stability"]) == ([], None)


def test_what_ifs_and_stability_of_one_decision(tmp_path: Path) -> None:
    """The policy that ships is found by itself."""
    (log,) = log_runs(tmp_path, TASKS[:1], load_policy("default"), DecisionSchedule(probe_steps=4))
    told = explain(log.logged(0)).to_json()
    texts = [each["text"] for each in told["what_ifs"]]
    for change in ("smaller", "larger"):
        told_so = rf"With a budget [\d.]+ % {change} \(.*\), \d+ modules? would have another rank"
        assert any(re.match(told_so, text) for text in texts)
    assert any("leaves its rank as it is" in text for text in texts), "and of a module whose rank is bounded"
    assert {text["text"] for text in told["what_ifs"]} <= set(told["sentences"])
    assert len(told["stability"]["sure"]) == len(log.logged(0).rank_after)
    json.dumps(told, allow_nan=False)


def test_an_unknown_policy_leaves_what_the_log_tells(decisions: list[DecisionRecord], policy: LearnedPolicy) -> None:
    told = explain(decisions[0], replace(policy, sha256="0")).to_json()
    assert told["shapley"] is None
    assert told["what_ifs"] == []
    assert told["plans"]
    assert told["sentences"][-1] == (
        "The policy default is not at hand (the one given is another: its weights have another sha256), so there are "
        "no Shapley values and no what-ifs."
    )
    assert "the one given is another" in explain(decisions[0], find_rule("top-down")).notes[0]


def test_a_decision_that_comes_out_otherwise_is_not_explained(
    decisions: list[DecisionRecord], policy: LearnedPolicy
) -> None:
    found = replace(decisions[0].deliberation, votes=decisions[0].deliberation.votes * 1.5)
    changed = replace(decisions[0], decision=replace(decisions[0].decision, deliberation=found))
    assert "the decision differs in votes" in explain(changed, policy).notes[0]


def test_plans_that_are_not_the_policys_own_are_said_to_be(
    decisions: list[DecisionRecord], policy: LearnedPolicy, make_observation: Observe, log_decision: Decide
) -> None:
    ranks = decisions[0].rank_after.copy()
    ranks[np.argmax(ranks)] //= 2
    reviewed = explain(replace(decisions[0], rank_after=ranks), policy, what_ifs=False)
    assert reviewed.attribution is not None
    assert reviewed.sentences()[-1].startswith("A limit of time, or somebody by hand, changed the plan")
    drawing = replace(policy, temperature=0.5, seed=3)
    drawn = explain(log_decision(make_observation(8), drawing), policy, what_ifs=False)
    assert drawn.attribution is not None
    assert drawn.sentences()[-1].startswith("The plan was drawn; what-ifs")


def test_rules_and_corrections(make_observation: Observe, log_decision: Decide) -> None:
    rule = find_rule("signal-mean")
    of_rule = explain(log_decision(make_observation(8), rule), rule).to_json()
    assert of_rule["verdict"] == "At step 0 signal-mean decided; the log holds no candidates and no votes."
    assert of_rule["shapley"] is None
    assert of_rule["sentences"][-1].startswith("signal-mean is a rule, or a policy without a value ensemble")
    correction = explain(log_decision(make_observation(8), rule, correction=True)).to_json()
    assert "the guard or a person changed the ranks" in correction["verdict"]
    assert "does not tell how the guard" in correction["sentences"][-1]


def test_a_number_without_a_decision_and_a_folder_without_a_log(
    decisions: list[DecisionRecord], policy: LearnedPolicy, tmp_path: Path
) -> None:
    """A log may hold the later decisions alone."""
    log = DecisionLog(tmp_path / "log")
    log.append(decisions[2])
    told = explanations(log, policy, what_ifs=False)
    assert told[:2] == [None, None]
    assert told[2]["shapley"] is not None
    with pytest.raises(RunFolderError, match="No decision log"):
        explanations(DecisionLog(tmp_path / "nothing"))


# Another policy in the states of a run --------------------------------------------------------------------------------


def test_decisions_are_the_same_bit_for_bit(logs: list[DecisionLog], policy: LearnedPolicy) -> None:
    for log in logs:
        assert [redecide(log.logged(number), policy).differences for number in range(len(log))] == [()] * 4
        again = replay(log, policy)
        assert [row.same for row in again.agreements] == [len(row.ranks) for row in again.agreements]
        assert [row.distance for row in again.agreements] == [0.0] * 4
        assert again.lacking == ()


def test_a_rule_in_the_states_of_the_run(logs: list[DecisionLog]) -> None:
    rule = find_rule("top-down")
    found = replay(logs[0], rule)
    for number, row in enumerate(found.agreements):
        observation = logs[0].logged(number).observation
        expected = decided_plan(observation.problem, rule.decide(observation)).ranks
        np.testing.assert_array_equal(row.other, expected)
        np.testing.assert_array_equal(row.ranks, logs[0].logged(number).rank_after)
        assert row.same < len(row.ranks)
        assert row.distance > 0
    told = json.loads(json.dumps(found.to_json()))
    assert told["decisions"][0]["same"] == sum(row["rank"] == row["other"] for row in told["decisions"][0]["modules"])
    assert (told["run"], told["policy"]) == ("default", "top-down")
    shown = StringIO()
    Console(file=shown, width=120).print(found.table())
    assert f"{found.agreements[0].same} of 28" in shown.getvalue()


def test_corrections_are_left_out_with_a_line(
    decisions: list[DecisionRecord], tmp_path: Path, policy: LearnedPolicy
) -> None:
    log = DecisionLog(tmp_path)
    for number in range(4):
        log.append(replace(decisions[number], correction=number in (1, 3)))
    found = replay(log, policy)
    assert [row.decision for row in found.agreements] == [0, 2]
    assert found.lacking == ("Decision 1, 3: the guard or a person changed the ranks; no policy decided.",)
    assert found.table().caption == found.lacking[0]
    with pytest.raises(ConfigError, match="no policy decided there"):
        redecide(log.logged(1), policy)


def test_no_log(tmp_path: Path, policy: LearnedPolicy) -> None:
    with pytest.raises(RunFolderError, match="No decision log"):
        replay(DecisionLog(tmp_path), policy)
