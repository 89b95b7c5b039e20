"""Another policy in the states of a run, and logs that hold less."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.rules import find_rule
from rankpilot.allocation.log import SCHEMA_KEY, DecisionLog
from rankpilot.allocation.policy import decided_plan
from rankpilot.errors import RunFolderError
from rankpilot.study.decision.redecide import redecide
from rankpilot.study.decision.replay import replay
from rich.console import Console


def as_schema(log: DecisionLog, folder: Path, number: int, schema: int) -> DecisionLog:
    """A copy of a log in which one decision is of an earlier schema."""
    shutil.copytree(log.folder, folder)
    part = folder / f"part-{number:05d}.parquet"
    table = pq.ParquetFile(part).read()
    (folder / f"state-{number:05d}.safetensors").unlink()
    if schema == 2:
        table = table.drop_columns(["problem", "rank_wanted"]).rename_columns({"rank_clipped": "rank_asked"})
    pq.write_table(table.replace_schema_metadata({SCHEMA_KEY: str(schema).encode()}), part)
    return DecisionLog(folder)


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


def test_earlier_schemas_lack_a_line_each(logs: list[DecisionLog], tmp_path: Path, policy: LearnedPolicy) -> None:
    third = replay(as_schema(logs[0], tmp_path / "3", 1, 3), policy)
    assert len(third.agreements) == 4
    assert third.lacking == ("Decision 1: log schema 3 holds no candidates and votes; only ranks are compared.",)
    second = replay(as_schema(logs[0], tmp_path / "2", 1, 2), policy)
    assert [row.decision for row in second.agreements] == [0, 2, 3]
    assert second.lacking == ("Decision 1: log schema 2 does not hold the problem that was solved.",)
    assert second.table().caption == second.lacking[0]


def test_no_log(tmp_path: Path, policy: LearnedPolicy) -> None:
    with pytest.raises(RunFolderError, match="No decision log"):
        replay(DecisionLog(tmp_path), policy)
