"""Comparisons: the same rows each time, those of real PEFT episodes, and never the same work twice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rankpilot.data.task import SPLITS, SUITES
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.policy import Policy
from rankpilot.decide.rules import RULES, SignalRule
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.episode import Comparison, Episode
from rankpilot.env.proxy_finetune import ProxyFineTune
from rankpilot.env.proxy_task import ProxyTask, Reference, load_suite
from rankpilot.errors import ConfigError, RunFolderError
from rankpilot.study.replay import redecide
from rankpilot.training import compare as evaluation
from rankpilot.training.compare import SEED_STEP, Oracle, compare, log_folder, repetition
from rankpilot.training.results import Row, append_rows, groups_of, read_rows, row_of, summarise, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = DecisionSchedule(probe_steps=4)
SIZES: dict[str, Any] = {"base": "llama-4x32", "steps": 8, "batch_size": 4, "length": 16, "eval_rows": 8}
TASKS = (
    ProxyTask("planted", 1, corpus="documentation", budget=0.25, unit="parameters", **SIZES),
    ProxyTask("planted", 2, corpus="documentation", budget=0.6, reference=Reference(0.3, 0.2, 0.15), **SIZES),
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each chunk had."""
    counts: list[int] = []

    def noted(episodes: Any, attempts: Any, slots: int, logs: Any) -> list[float]:
        counts.append(len(attempts))
        return list(real(episodes, attempts, slots, logs))

    real: Callable[..., Any] = evaluation.run_attempts
    monkeypatch.setattr(evaluation, "run_attempts", noted)
    return counts


def loss_with_peft(policy: Policy, task: ProxyTask) -> float:
    episode, loss = Episode(ProxyFineTune(task), SCHEDULE), None
    while episode.step < task.steps:
        episode.apply(policy.decide(episode.observe(loss)))
        loss = episode.advance()
    return episode.held_out_loss()


@pytest.fixture(scope="module")
def compared() -> list[Row]:
    """Two rules on two tasks."""
    torch.manual_seed(0)
    return compare([RULES["signal-mean"], RULES["top-down"]], TASKS, SCHEDULE, workers=1)


def test_rows_are_those_of_peft_episodes(compared: list[Row]) -> None:
    rows, uniform = compared, [loss_with_peft(RULES["uniform"], task) for task in TASKS]
    assert [(row.policy, row.task) for row in rows] == [(p, t.id) for p in ("signal-mean", "top-down") for t in TASKS]
    for row, task, of_uniform in zip(rows, (*TASKS, *TASKS), (*uniform, *uniform), strict=True):
        assert row.loss == pytest.approx(loss_with_peft(RULES[row.policy], task), abs=1e-4)
        assert row.uniform_loss == pytest.approx(of_uniform, abs=1e-4)
        assert row.improvement == Comparison.with_uniform(row.reference).improvement(row.loss)
        assert (row.seed, row.kind, row.family, row.depth, row.failed) == (task.seed, "planted", "llama", 4, False)
    assert rows[0].loss != rows[2].loss


def test_decisions_of_every_run_are_written_down(compared: list[Row], tmp_path: Path) -> None:
    policies = [RULES["signal-mean"], RULES["top-down"]]
    rows = compare(policies, TASKS, SCHEDULE, workers=1, logs=tmp_path)
    assert [row.loss for row in rows] == [row.loss for row in compared]
    for row in rows:
        log = DecisionLog(log_folder(tmp_path, row.key))
        table = log.to_pandas()
        assert len(log) == len(SCHEDULE.steps(SIZES["steps"]))
        assert table["step"].tolist()[:: len(table) // len(log)] == list(SCHEDULE.steps(SIZES["steps"]))
        assert set(table["policy"].tolist()) == {row.policy}
        assert table["loss"].isna().sum() == len(table) // len(log), "none before the first decision"
        for number in range(len(log)):
            assert redecide(log.logged(number), RULES[row.policy]).differences == ()
    assert len(list(tmp_path.glob("*/*"))) == 4


def test_runs_without_a_log_are_run_again_where_one_is_wanted(tmp_path: Path, counted: list[int]) -> None:
    file, logs = tmp_path / "rows.jsonl", tmp_path / "logs"
    competitors = [RULES["signal-mean"], Oracle()]
    rows = compare(competitors, TASKS, SCHEDULE, workers=1, file=file)
    counted.clear()
    assert compare(competitors, TASKS, SCHEDULE, workers=1, file=file, logs=logs) == rows
    assert sum(counted) == 2, "those of task rules have none"
    assert all(len(DecisionLog(log_folder(logs, row.key))) for row in rows if row.policy == "signal-mean")
    assert compare(competitors, TASKS, SCHEDULE, workers=1, file=file, logs=logs) == rows
    assert sum(counted) == 2


def test_repetitions_and_progress() -> None:
    progress: list[tuple[int, int]] = []
    rows = compare(
        [RULES["top-down"]], TASKS, SCHEDULE, workers=1, seeds=2, on_progress=lambda *done: progress.append(done)
    )
    assert [row.seed for row in rows] == [1, 1 + SEED_STEP, 2, 2 + SEED_STEP]
    assert len({row.task for row in rows}) == 2, "repetitions share their task"
    assert len({row.loss for row in rows}) == 4
    assert rows[3].uniform_loss != 0.2, "a repetition's uniform run is its own"
    card, repeated = TASKS[1].reference, rows[3].reference
    assert card is not None
    assert repeated.headroom / repeated.gain == pytest.approx(card.headroom / card.gain)
    assert progress[-1] == (8, 8), "four runs, and four uniform ones"
    alone = compare([RULES["top-down"]], TASKS[:1], SCHEDULE, workers=1)
    assert alone == rows[:1], "whatever runs beside it"


def test_uniform_rank_is_run_beside_the_others() -> None:
    """What a card says of it is not what competitors are held against: it was rounded, and measured elsewhere."""
    rows = compare([RULES["uniform"], RULES["top-down"]], TASKS, SCHEDULE, workers=1, seeds=2)
    for row, other in zip(rows[:4], rows[4:], strict=True):
        assert row.uniform_loss == other.uniform_loss == row.loss
        assert row.improvement == 0.0
    assert [row.loss for row in rows[:4]] != [row.loss for row in rows[4:]]
    assert [row.best_loss for row in rows[:3]] == [None, None, 0.15]
    (table,) = groups_of(rows, "top-down")
    assert table.against == "top-down"
    uniform = next(result.uniform for result in table.results if result.policy == "uniform")
    assert (uniform.wins, uniform.ties, uniform.losses) == (0, 4, 0)


def test_seeds_of_repetitions_are_nobody_elses() -> None:
    seeds = [task.seed for suite in SUITES for split in SPLITS for task in load_suite(suite, split)]
    repeated = [repetition(ProxyTask("shift", seed), number).seed for seed in seeds for number in range(6)]
    assert len(set(repeated)) == 6 * len(seeds)
    assert repetition(TASKS[1], 0) is TASKS[1]


def test_rows_that_exist_are_not_run_again(tmp_path: Path, counted: list[int]) -> None:
    file = tmp_path / "rows.jsonl"
    competitors = [RULES["signal-mean"], RULES["uniform"], Oracle()]
    whole = compare(competitors, TASKS, SCHEDULE, workers=1, file=file)
    assert sorted(read_rows(file), key=lambda row: row.key) == sorted(whole, key=lambda row: row.key)
    assert sum(counted) == 2 + 2 + 2
    counted.clear()
    progress: list[Any] = []
    again = compare(competitors, TASKS, SCHEDULE, workers=1, file=file, on_progress=lambda *done: progress.append(done))
    assert (again, counted, progress) == (whole, [], [])
    lines = file.read_text().splitlines()
    kept = [row for row in whole if row.policy != "uniform"]
    write_rows(file, kept)
    file.write_text(file.read_text() + lines[0][:30])  # killed while writing
    assert compare(competitors, TASKS, SCHEDULE, workers=1, file=file) == whole
    assert sum(counted) == 2
    assert len(read_rows(file)) == len(whole)


def test_two_processes_find_the_same_rows() -> None:
    """Also under a budget of bytes, for which each process records steps first."""
    competitors = [RULES["signal-mean"], Oracle()]
    assert compare(competitors, TASKS, SCHEDULE, workers=2) == compare(competitors, TASKS, SCHEDULE, workers=1)


def test_the_oracle_knows_what_was_planted() -> None:
    (oracle,) = compare([Oracle()], TASKS[:1], SCHEDULE, workers=1)
    (uniform,) = compare([RULES["uniform"]], TASKS[:1], SCHEDULE, workers=1)
    assert oracle.loss != uniform.loss
    shift = ProxyTask("shift", 3, corpus="code", reference=Reference(2.0, 1.0), **SIZES)
    assert compare([Oracle()], [shift], SCHEDULE, workers=1) == [], "nothing planted, no row"


def test_a_loss_that_is_not_finite_is_a_failed_run(tmp_path: Path) -> None:
    hot = dataclasses.replace(TASKS[1], seed=3, learning_rate=1e30)
    good, bad = compare([SignalRule()], [TASKS[1], hot], SCHEDULE, workers=1)
    assert not good.failed
    assert (bad.loss, bad.improvement, bad.failed) == (None, -3, True)
    write_rows(tmp_path / "rows.jsonl", [bad])
    assert read_rows(tmp_path / "rows.jsonl") == [bad]


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different names"):
        compare([RULES["signal-mean"], SignalRule(gain=1.0)], TASKS, SCHEDULE, workers=1)
    for options in ({"workers": 0}, {"workers": 1, "seeds": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            compare([RULES["signal-mean"]], TASKS, SCHEDULE, **options)
    (tmp_path / "rows.jsonl").write_text('{"policy": "signal-mean"}\n')
    with pytest.raises(RunFolderError, match="no results of this version"):
        compare([RULES["signal-mean"]], TASKS, SCHEDULE, workers=1, file=tmp_path / "rows.jsonl")


# Results -------------------------------------------------------------------------------------------------------------


def made_up(policy: str, losses: dict[int, float], kind: Any = "planted") -> list[Row]:
    tasks = {seed: ProxyTask(kind, seed, corpus="code", **SIZES) for seed in losses}
    reference = Reference(2.0, 1.0, 0.5)
    return [row_of(policy, task, task, reference, losses[seed]) for seed, task in tasks.items()]


def test_results() -> None:
    rows = [
        *made_up("a", {1: 0.5, 2: 0.75, 3: 1.25, 4: math.nan}),
        *made_up("b", {1: 0.75, 2: 0.75, 3: 1.0, 4: 1.5, 5: 0.5}),
        *made_up("a", {7: 1.0}, "shift"),
    ]
    everything, planted = groups_of(rows, "b")
    assert (everything.name, everything.tasks) == ("all tasks", 6)
    assert (planted.name, planted.tasks) == ("planted, bytes", 5), "one task of shift makes no interval"
    first, second = planted.results
    assert (first.policy, second.policy) == ("b", "a")
    assert first.against is first.difference is None
    assert (second.runs, second.failed, second.loss) == (4, 1, pytest.approx(2.5 / 3))
    assert second.improvement.value == pytest.approx((1 + 0.5 - 0.5 - 3) / 4)
    assert (second.uniform.wins, second.uniform.ties, second.uniform.losses) == (2, 0, 2)
    assert second.against is not None
    assert second.difference is not None
    assert (second.against.wins, second.against.ties, second.against.losses) == (1, 1, 2)
    assert second.difference.value == pytest.approx(((1 - 0.5) + 0 + (-0.5 - 0) + (-3 + 1)) / 4)


def test_two_bad_runs_are_told_apart_where_their_improvements_are_clipped() -> None:
    rows = [*made_up("a", {1: 9.0, 2: 8.0}), *made_up("b", {1: 8.0, 2: 7.0})]
    assert {row.improvement for row in rows} == {-3}
    (group,) = groups_of(rows, "b")
    against = {result.policy: result.against for result in group.results}["a"]
    assert against is not None
    assert (against.wins, against.ties, against.losses) == (0, 0, 2)


def test_summary() -> None:
    row = summarise(made_up("a", {1: 0.95, 2: 1.1, 3: 1.0, 4: 0.8}))["a"]
    assert (row["tasks"], row["wins"], row["losses"]) == (4, 2, 1)
    assert row["improvement"] == pytest.approx(0.075)
    assert -0.2 - 1e-9 <= row["low"] < 0.075 < row["high"] <= 0.4 + 1e-9, "within what there is"
    assert summarise([]) == {}


def test_rows_as_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    rows = made_up("a", {1: 0.1, 2: math.nan})
    append_rows(file, rows[:1])
    append_rows(file, rows[1:])
    assert read_rows(file) == rows
    append_rows(file, [dataclasses.replace(rows[0], loss=0.5)])
    assert [row.loss for row in read_rows(file)] == [0.5, None], "a row that is there twice counts once"
    file.write_text(file.read_text().replace('"loss": 0.5', '"loss": NaN'))
    with pytest.raises(RunFolderError, match=r"no results of this version of rankpilot \(loss is nan\)"):
        read_rows(file)
