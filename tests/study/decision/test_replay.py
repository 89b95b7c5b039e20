"""Decisions of a log taken again: by the policy that took them, and by another one."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rankpilot.common.errors import ConfigError, RunFolderError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.observation import Observation
from rankpilot.decide.plan.goal import Goal, GoalKind
from rankpilot.decide.policy import decided_plan
from rankpilot.decide.rules import find_rule
from rankpilot.study.replay import redecide, replay
from rich.console import Console

from .conftest import Decide, Observe, chooser

RULE = find_rule("signal-mean")


@pytest.fixture
def log(make_observation: Observe, log_decision: Decide, tmp_path: Path) -> DecisionLog:
    """Four decisions of a rule, on states of their own."""
    log = DecisionLog(tmp_path / "log")
    for number in range(4):
        log.append(log_decision(make_observation(12, seed=number), RULE, number))
    return log


def test_decisions_of_a_rule_are_the_same_bit_for_bit(log: DecisionLog) -> None:
    assert [redecide(logged, RULE).differences for logged in log.read()] == [()] * 4
    again = replay(log, RULE)
    assert [row.same for row in again.agreements] == [12] * 4
    assert [row.distance for row in again.agreements] == [0.0] * 4
    assert again.lacking == ()


@pytest.mark.parametrize("goal", ["quality", "time", "bytes"])
def test_a_choice_is_made_again_with_the_goal_of_the_log(
    first: Observation, log_decision: Decide, tmp_path: Path, goal: GoalKind
) -> None:
    log = DecisionLog(tmp_path)
    log.append(log_decision(first, chooser(goal, 0.03)))
    (logged,) = log.read()
    assert redecide(logged, chooser()).differences == ()
    other = replace(logged.choice, spread=2 * logged.choice.spread, goal=Goal("quality"))
    found = replace(logged, decision=replace(logged.decision, choice=other))
    assert "spread" in redecide(found, chooser()).differences
    assert "choice" in redecide(logged, RULE).differences


@pytest.mark.parametrize("changes", [{"parts": 1e3}, {"spread": np.nan}, {"fits": 1.0}])
def test_a_damaged_choice_is_refused(
    first: Observation, log_decision: Decide, tmp_path: Path, changes: dict[str, float]
) -> None:
    logged, log = log_decision(first, chooser()), DecisionLog(tmp_path)
    arrays = {name: np.full(getattr(logged.choice, name).shape, value) for name, value in changes.items()}
    log.append(replace(logged, decision=replace(logged.decision, choice=replace(logged.choice, **arrays))))
    with pytest.raises(RunFolderError, match="damaged"):
        log.read()


def test_a_rule_in_the_states_of_the_run(log: DecisionLog) -> None:
    rule = find_rule("top-down")
    found = replay(log, rule)
    for logged, row in zip(log.read(), found.agreements, strict=True):
        expected = decided_plan(logged.problem, rule.decide(logged.observation)).ranks
        np.testing.assert_array_equal(row.other, expected)
        assert row.same < len(row.other)
        assert row.distance > 0
    told = json.loads(json.dumps(found.to_json()))
    assert told["decisions"][0]["same"] == sum(row["rank"] == row["other"] for row in told["decisions"][0]["modules"])
    assert (told["run"], told["policy"]) == ("signal-mean", "top-down")
    shown = StringIO()
    Console(file=shown, width=120).print(found.table())
    assert f"{found.agreements[0].same} of 12" in shown.getvalue()


def test_corrections_are_left_out_with_a_line(log: DecisionLog, tmp_path: Path) -> None:
    corrected = DecisionLog(tmp_path / "corrected")
    for logged in log.read():
        corrected.append(replace(logged, correction=logged.number in (1, 3)))
    found = replay(corrected, RULE)
    assert [row.logged.number for row in found.agreements] == [0, 2]
    assert found.lacking == ("Decision 1, 3: the guard or a user changed the ranks; no policy decided.",)
    assert found.table().caption == found.lacking[0]
    with pytest.raises(ConfigError, match="no policy decided"):
        redecide(corrected.logged(1), RULE)


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No decision log"):
        replay(DecisionLog(tmp_path), RULE)
