"""Another policy in the states of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.log import DecisionLog, DecisionRecord
from rankpilot.agents.policy import decided_plan
from rankpilot.agents.rules import find_rule
from rankpilot.errors import ConfigError, RunFolderError
from rankpilot.study.replay import redecide, replay
from rich.console import Console


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
