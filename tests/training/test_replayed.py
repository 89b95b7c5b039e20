"""Plans that are given, and plans dealt anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.policy import decided_plan
from rankpilot.decide.rules import RULES, GivenPlan, shuffled_within_kinds
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.proxy_task import ProxyTask, Reference
from rankpilot.errors import ConfigError, UnknownNameError
from rankpilot.training.compare import compare, log_folder

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = DecisionSchedule(probe_steps=4, fractions=(0.0, 0.18))
SIZES: dict[str, Any] = {"base": "llama-4x32", "steps": 20, "batch_size": 4, "length": 16, "eval_rows": 16}
TASK = ProxyTask(
    "planted", 1, corpus="documentation", budget=0.35, unit="parameters", reference=Reference(0.3, 0.2, 0.1), **SIZES
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a rule that keeps its first plan."""
    folder = tmp_path_factory.mktemp("logs")
    compare([RULES["top-half"]], [TASK], SCHEDULE, workers=1, logs=folder)
    return folder


def test_a_given_plan_is_taken_as_it_is(logs: Path) -> None:
    log = DecisionLog(log_folder(logs, ("top-half", TASK.id, TASK.seed)))
    first, later = log.logged(0).observation, log.logged(1).observation
    ranks = dict.fromkeys(first.names, 0) | {first.names[3]: 2}
    plan = GivenPlan("mine", ranks)
    wanted = decided_plan(first.problem, plan.decide(first)).ranks
    assert dict(zip(first.names, wanted.tolist(), strict=True)) == ranks
    np.testing.assert_array_equal(decided_plan(later.problem, plan.decide(later)).ranks, later.problem.ranks)
    with pytest.raises(UnknownNameError, match="target module 'x'"):
        GivenPlan("mine", {**ranks, "x": 1}).decide(first)
    with pytest.raises(ConfigError, match=f"gives no rank for 1 of {len(ranks)} modules"):
        GivenPlan("mine", dict.fromkeys(first.names[1:], 1)).decide(first)


def test_shuffling_keeps_each_kind() -> None:
    ranks, kinds = (
        {"a1": 1, "a2": 2, "a3": 3, "b1": 8, "b2": 9},
        {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b"},
    )
    dealt = [shuffled_within_kinds(ranks, kinds, seed, adapted_alone=False) for seed in range(20)]
    assert {tuple(sorted(each[name] for name in ("a1", "a2", "a3"))) for each in dealt} == {(1, 2, 3)}
    assert len({*map(str, dealt)}) > 6
    assert shuffled_within_kinds(ranks, kinds, 3, adapted_alone=False) == dealt[3]
    few = {**ranks, "a2": 0}
    dealt = [shuffled_within_kinds(few, kinds, seed, adapted_alone=True) for seed in range(20)]
    assert {each["a2"] for each in dealt} == {0}
    assert {(each["a1"], each["a3"]) for each in dealt} == {(1, 3), (3, 1)}
