"""Plans by name, and from files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rankpilot.decide.log import DecisionLog
from rankpilot.errors import ConfigError
from rankpilot.finetune.experiment import other_plan

from ..decide.test_log import MODULES, make_record

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


def test_the_plan_of_a_file(log: DecisionLog, tmp_path: Path) -> None:
    ranks = dict(zip(MODULES, (1, 0, 16), strict=True))
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"modules": ranks}))
    assert other_plan(log, str(path)) == ranks


def test_an_unknown_name(log: DecisionLog) -> None:
    with pytest.raises(ConfigError, match=r"finale is no file and no plan by name\. Plans by name: final \("):
        other_plan(log, "finale")
