"""Plans by name, and from files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rankpilot.allocation.log import DecisionLog
from rankpilot.errors import ConfigError
from rankpilot.study.run.other_plans import other_plan

from ...allocation.test_decision_log import MODULES, make_record

FIRST, LAST = [4, 1, 2], [8, 2, 0]


@pytest.fixture
def log(tmp_path: Path) -> DecisionLog:
    log = DecisionLog(tmp_path / "decisions")
    for number, ranks in enumerate((FIRST, LAST)):
        log.append(replace(make_record(number), rank_after=np.array(ranks)))
    return log


def test_plans_of_the_log(log: DecisionLog) -> None:
    assert other_plan(log, "first") == dict(zip(MODULES, FIRST, strict=True))
    assert other_plan(log, "final") == dict(zip(MODULES, LAST, strict=True))
    most = dict(zip(MODULES, (64, 32, 16), strict=True))
    assert other_plan(log, "uniform") == most, "there is room for the most that each can have"
    assert Counter(other_plan(log, "shuffled").values()) == Counter(LAST)


@pytest.mark.parametrize("form", ["{}", '{{"approved": true, "modules": {}}}'])
def test_plans_of_files(log: DecisionLog, tmp_path: Path, form: str) -> None:
    ranks = dict(zip(MODULES, (1, 0, 16), strict=True))
    path = tmp_path / "plan.yaml"
    entries = ranks if form == "{}" else {name: {"rank": rank, "before": 3} for name, rank in ranks.items()}
    path.write_text(form.format(json.dumps(entries)))
    assert other_plan(log, str(path)) == ranks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as YAML"),
        ("", "holds no ranks"),
        ("[1, 2]", "holds no ranks"),
        ("a: -1", "The rank of 'a' in .* is -1"),
        ("a: 2.5", "is 2.5; it is a whole number"),
        ("a: true", "is True"),
        ("1: 4", "The rank of 1 "),
    ],
)
def test_files_that_hold_no_plan(log: DecisionLog, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        other_plan(log, str(path))


def test_an_unknown_name(log: DecisionLog) -> None:
    with pytest.raises(ConfigError, match=r"finale is no file and no plan by name\. Plans by name: final \("):
        other_plan(log, "finale")
