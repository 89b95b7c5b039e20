"""Runs at the final ranks of logged runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.policy import decided_plan
from rankpilot.agents.rules import RULES, GivenPlan, shuffled_within_kinds
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.env.proxy_task import ProxyTask, Reference
from rankpilot.errors import ConfigError, RunFolderError, UnknownNameError
from rankpilot.training.compare import (
    SHUFFLED,
    STATIC,
    Replayed,
    TaskRule,
    check_weights,
    compare,
    find_competitor,
    log_folder,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = DecisionSchedule(probe_steps=4, fractions=(0.0, 0.18))
SIZES: dict[str, Any] = {"base": "llama-4x32", "steps": 20, "batch_size": 4, "length": 16, "eval_rows": 16}
TASK = ProxyTask(
    "planted", 1, corpus="documentation", budget=0.35, unit="parameters", reference=Reference(0.3, 0.2, 0.1), **SIZES
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a rule that keeps its first plan, and of one that changes it."""
    folder = tmp_path_factory.mktemp("logs")
    compare([RULES["top-half"], RULES["signal-mean"]], [TASK], SCHEDULE, workers=1, logs=folder)
    return folder


def test_a_run_that_kept_its_plan_is_its_own_replay(logs: Path) -> None:
    replay = Replayed(logs / "top-half")
    rows = compare([RULES["top-half"], replay], [TASK], SCHEDULE, workers=1)
    assert [row.policy for row in rows] == ["top-half", "top-half static"]
    assert rows[0].loss == rows[1].loss


def test_shuffled_runs_have_the_same_ranks_elsewhere(logs: Path) -> None:
    replays = [Replayed(logs / "signal-mean", how) for how in (STATIC, SHUFFLED)]
    rows = compare(replays, [TASK], SCHEDULE, workers=1, logs=None)
    assert rows[0].loss != rows[1].loss
    static, shuffled = (dict(each.policy_for(TASK, None).ranks) for each in replays)  # type: ignore[arg-type, union-attr]
    log = DecisionLog(log_folder(logs, ("signal-mean", TASK.id, TASK.seed)))
    assert [*static.values()] == log.logged(len(log) - 1).rank_after.tolist()
    assert Counter(static.values()) == Counter(shuffled.values())
    assert static != shuffled
    for kind in ("q_proj", "down_proj"):
        ranks = [sorted(rank for name, rank in plan.items() if name.endswith(kind)) for plan in (static, shuffled)]
        assert ranks[0] == ranks[1]


def test_by_name_on_the_command_line(logs: Path) -> None:
    for how in (STATIC, SHUFFLED):
        found = find_competitor(f"{how}:{logs / 'top-half'}")
        assert isinstance(found, TaskRule)
        assert found.name == f"top-half {how}"


def test_other_logs_under_the_same_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"There is no folder .*none of decision logs"):
        find_competitor(f"static:{tmp_path / 'none'}")
    check_weights(tmp_path, {"top-half static": "static:a/top-half"})
    check_weights(tmp_path, {"top-half static": f"static:{Path('a').resolve()}/top-half"})
    with pytest.raises(RunFolderError, match=r"results of another policy named 'top-half static' \(.*/a/top-half\)"):
        check_weights(tmp_path, {"top-half static": "static:b/top-half"})


def test_a_task_without_a_log(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds 0 logs of task"):
        Replayed(tmp_path).policy_for(TASK, None)  # type: ignore[arg-type]


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
