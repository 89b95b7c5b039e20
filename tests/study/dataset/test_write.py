"""Data sets hold exactly what their sources hold, and are complete or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rankpilot.agents.evaluation.results import read_rows
from rankpilot.agents.evaluation.runs import log_folder
from rankpilot.agents.learned.candidates import FIXED_NAMES
from rankpilot.agents.learned.structures import ALL_LINEAR
from rankpilot.agents.training.plan_runs import CHOICES, PLAN_CHOICES, RUNS, STRUCTURE
from rankpilot.allocation.features import MODULE_FEATURES, RUN_FEATURES
from rankpilot.allocation.goal import LOSS_UNIT
from rankpilot.allocation.log import DecisionLog
from rankpilot.errors import ConfigError, RunFolderError
from rankpilot.study.dataset import TrialsDataset, open_dataset
from rankpilot.study.dataset import write as module
from rankpilot.study.dataset.columns import COLUMNS
from rankpilot.study.dataset.read import SAMPLE
from rankpilot.study.dataset.write import write_dataset

from ...cases import first_cases
from .conftest import CONFIG, STACKS, write_training

pytestmark = pytest.mark.usefixtures("one_thread")


def bits(values: Any, kind: type) -> bytes:
    return np.asarray(values, dtype=kind).tobytes()


# Rows of plan runs ----------------------------------------------------------------------------------------------------


def test_a_row_for_each_decision_that_was_taken_bit_for_bit(dataset: TrialsDataset) -> None:
    rows = dataset.table(source="plan runs").to_pylist()
    assert len(rows) == sum(np.count_nonzero(stack.ranks.min(axis=2) >= 0) for stack in STACKS) == 2 * 45 - 2
    assert len({(row["run"], row["decision"]) for row in rows}) == len(rows)
    for row in rows:
        stack, place = STACKS[row["stack"]], (row["decision"], row["slot"])
        assert row["ranks"] == stack.ranks[place].tolist()
        assert row["module"] == list(stack.names)
        assert bits(row["actor_score"], np.float32) == stack.scores[place].tobytes()
        for index, name in enumerate(MODULE_FEATURES):
            assert bits(row[f"feature.{name}"], np.float32) == stack.modules[place][:, index].tobytes()
        for index, name in enumerate(RUN_FEATURES):
            assert bits(row[f"run.{name}"], np.float32) == stack.run[place][index].tobytes()
        assert row["initial_loss"] == stack.initial[row["slot"]]
        loss = stack.losses[row["slot"]]
        assert (row["loss"], row["failed"]) == ((loss, False) if np.isfinite(loss) else (None, True))


def test_which_task_was_run(dataset: TrialsDataset) -> None:
    for row in dataset.table(source="plan runs").to_pylist():
        task = STACKS[row["stack"]].tasks[row["slot"] // RUNS]
        same = ("seed", "kind", "base", "budget", "cost_kind", "learning_rate")
        assert {name: row[name] for name in same} == {name: getattr(task, name) for name in same}
        assert (row["task"], row["place"], row["total_steps"]) == (task.id, task.placement, task.steps)
        assert (row["split"], row["step"]) == ("train", CONFIG.schedule.steps(task.steps)[row["decision"]])
        assert 0 <= row["fold"] < 5


def test_probabilities_of_plan_runs_are_given_where_they_are_known(dataset: TrialsDataset) -> None:
    for row in dataset.table(source="plan runs").to_pylist():
        choices = STACKS[row["stack"]].choices
        assert choices is not None
        assert row["choice"] == CHOICES[choices[row["decision"], row["slot"]]]
        if row["decision"] == 0:
            assert row["choice_probability"] == 1
            assert row["probability"] == (None if row["choice"] == "drawn" else 1)
        else:
            assert row["choice_probability"] == {"keep": 0.75, "drawn": 0.25}[row["choice"]]
            assert row["probability"] is None


# Rows of logs ---------------------------------------------------------------------------------------------------------


def test_rows_of_logs_are_the_logged_decisions(dataset: TrialsDataset, comparison: Path) -> None:
    rows = dataset.table(source="policy runs").to_pylist()
    results = {result.key: result for result in read_rows(comparison / "rows.jsonl")}
    assert len({row["run"] for row in rows}) == len(results) == 8
    for row in rows:
        result = results[row["behaviour"], row["task"], row["seed"]]
        logged = DecisionLog(log_folder(comparison / "logs", result.key)).logged(row["decision"])
        assert row["ranks"] == logged.rank_after.tolist()
        assert row["module"] == list(logged.observation.names)
        seen = np.array([row[f"feature.{name}"] for name in MODULE_FEATURES], dtype=np.float32).T
        np.testing.assert_array_equal(seen, logged.observation.modules)
        same = ("loss", "initial_loss", "uniform_loss", "best_loss", "budget", "failed", "place")
        assert {name: row[name] for name in same} == {name: getattr(result, name) for name in same}
        assert (row["split"], row["step"], row["total_steps"]) == ("validation", logged.step, 6)


def test_probabilities_of_policies(dataset: TrialsDataset, comparison: Path) -> None:
    rows = dataset.table(source="policy runs").to_pylist()
    results = {result.key: result for result in read_rows(comparison / "rows.jsonl")}
    by_policy: dict[str, set[Any]] = {}
    for row in rows:
        by_policy.setdefault(row["behaviour"], set()).add(row["probability"])
        if "exploring" in row["behaviour"]:
            key = results[row["behaviour"], row["task"], row["seed"]].key
            logged = DecisionLog(log_folder(comparison / "logs", key)).logged(row["decision"])
            assert row["probability"] == pytest.approx(np.exp(logged.decision.log_prob))
            assert row["temperature"] == 0.05
    drawn = by_policy.pop("default exploring at 0.05")
    assert len(drawn) > 3
    assert max(drawn) < 1
    assert by_policy == {"signal-mean": {1.0}, "default": {1.0}, "random": {None}}


def test_runs_without_log_or_without_result_are_left_out(
    comparison: Path, dataset_of: Callable[..., TrialsDataset], tmp_path: Path
) -> None:
    folder = tmp_path / "comparison"
    shutil.copytree(comparison, folder)
    first, second, *_ = read_rows(folder / "rows.jsonl")
    shutil.rmtree(log_folder(folder / "logs", first.key))
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join([lines[0], *lines[2:]]))
    found = dataset_of(folder)
    (source,) = found.facts["sources"]
    assert (source["runs_without_log"], source["logs_without_result"]) == (1, 1)
    left = set(zip(*(found.table()[name].to_pylist() for name in ("behaviour", "task")), strict=True))
    assert len(left) == 6
    assert not {first.key[:2], second.key[:2]} & left


def test_a_torn_log_is_named(comparison: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    shutil.copytree(comparison, folder)
    part = log_folder(folder / "logs", read_rows(folder / "rows.jsonl")[0].key) / "decision-000001.safetensors"
    part.write_bytes(part.read_bytes()[:500])
    with pytest.raises(RunFolderError, match=re.escape(f"{part} is missing, damaged")):
        write_dataset([folder], tmp_path / "trials")
    assert not (tmp_path / "trials").exists()


# The folder -----------------------------------------------------------------------------------------------------------


def test_what_a_data_set_tells_of_itself(dataset: TrialsDataset) -> None:
    table = dataset.table()
    files = {path.relative_to(dataset.folder).as_posix() for path in dataset.folder.rglob("*") if path.is_file()}
    assert files == {*dataset.facts["files"], "README.md", "dataset.json"}
    assert not list(dataset.folder.parent.glob(".*"))
    assert dataset.facts["rows"] == table.num_rows
    assert dataset.facts["runs"] == 45 + 8
    assert [source["name"] for source in dataset.facts["sources"]] == ["pilot", "comparison"]
    assert table.column_names == [column.name for column in COLUMNS]
    assert str(dataset.folder.parent) not in (dataset.folder / "dataset.json").read_text(), "no paths of this machine"


def test_the_card_tells_behaviours_splits_columns_and_flaws(dataset: TrialsDataset) -> None:
    _, front, body = (dataset.folder / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "apache-2.0"
    behaviours = {(each["behaviour"], each["choice"]): each for each in told["rankpilot"]["behaviours"]}
    assert behaviours["plan runs", "drawn"]["probability"] == "not known"
    assert behaviours["plan runs", "uniform"] == {
        "behaviour": "plan runs", "choice": "uniform", "rows": 3, "probability": "1"
    }  # fmt: skip
    assert sum(each["rows"] for each in behaviours.values()) == dataset.facts["rows"]
    assert told["rankpilot"]["tasks_of_splits"] == {"train": 3, "validation": 2}
    for column in COLUMNS:
        assert f"| `{column.name}` |" in body
    for title in ("Behaviours", "Splits and seeds", "Columns", "Known flaws", "Licence", "How it was made"):
        assert f"\n## {title}\n" in body
    assert "seed 4" in body


def test_the_card_tells_what_plan_runs_take_and_what_is_learned_from_them(dataset: TrialsDataset) -> None:
    for card in ((dataset.folder / "README.md").read_text(), (SAMPLE / "README.md").read_text()):
        assert f"asinh((gain - gain of plain LoRA) / {LOSS_UNIT})" in card
        words = " ".join(card.split())
        assert "the first has plain LoRA, the next five take the five fixed candidates, four draw" in words
        assert "and the last five draw one of the plans of a kind" in words
    drawn, less = (PLAN_CHOICES.count(name) for name in ("drawn", "drawn for less"))
    assert (ALL_LINEAR, *FIXED_NAMES, *["drawn"] * drawn, *["drawn for less"] * less, *STRUCTURE) == PLAN_CHOICES
    assert (len(FIXED_NAMES), drawn, less, len(STRUCTURE)) == (5, 2, 2, 5)


def test_other_tools_read_it(dataset: TrialsDataset, tmp_path: Path) -> None:
    import datasets
    import pandas

    loaded = datasets.load_dataset(str(dataset.folder), split="decisions", cache_dir=str(tmp_path))
    assert loaded["loss"] == dataset.table(["loss"])["loss"].to_pylist()
    frame = pandas.read_parquet(dataset.folder / "trials-00000.parquet")
    assert frame["ranks"][0].tolist() == STACKS[0].ranks[0, 0].tolist()


def test_duckdb_reads_it(dataset: TrialsDataset) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = f"select count(*), max(len(ranks)) from '{dataset.folder}/trials-*.parquet'"
    assert duckdb.sql(query).fetchall() == [(dataset.facts["rows"], 28)]


class Killed(Exception):
    pass


def test_the_same_call_goes_on_after_an_interruption(
    training: Path, comparison: Path, dataset: TrialsDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[int] = []
    table_of = module.table_of

    def counted(rows: list[Any]) -> pa.Table:
        made.append(len(rows))
        if len(made) == 2:
            raise Killed
        return table_of(rows)

    monkeypatch.setattr(module, "table_of", counted)
    with pytest.raises(Killed):
        write_dataset([training, comparison], tmp_path / "trials")
    assert not (tmp_path / "trials").exists()
    write_dataset([training, comparison], tmp_path / "trials")
    assert made == [88, made[1], made[1]], "the first file is not made again"
    for name in dataset.facts["files"]:
        assert (tmp_path / "trials" / name).read_bytes() == (dataset.folder / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["trials"]


def test_sources_that_changed_in_between_are_refused(
    training: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "pilot"
    shutil.copytree(training, folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "data_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_dataset([folder], tmp_path / "trials")
    (folder / "plan_runs" / "00001.safetensors").unlink()
    with pytest.raises(RunFolderError, match="other settings"):
        write_dataset([folder], tmp_path / "trials")


def test_folders_that_are_no_sources(training: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="gives no rows"):
        write_dataset([tmp_path], tmp_path / "trials")
    with pytest.raises(ConfigError, match="several different ones"):
        write_dataset([training, training], tmp_path / "trials")
    with pytest.raises(ConfigError, match="several different ones"):
        write_dataset([], tmp_path / "trials")
    (tmp_path / "trials").mkdir()
    with pytest.raises(RunFolderError, match="exists already"):
        write_dataset([training], tmp_path / "trials")


@pytest.mark.parametrize(
    ("damage", "words"),
    first_cases(
        3,
        [
            ("card", "not finished"),
            ("tasks", "an earlier version"),
            ("cut", "cannot be read"),
            ("settings", "cannot be read"),
        ],
    ),
)
def test_trainings_that_cannot_be_read(tmp_path: Path, damage: str, words: str) -> None:
    stacks = tuple(replace(stack, tasks=()) for stack in STACKS) if damage == "tasks" else STACKS
    folder = write_training(tmp_path / "pilot", stacks)
    if damage == "card":
        (folder / "card.json").unlink()
    elif damage == "cut":
        path = folder / "plan_runs" / "00001.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "settings":
        card = folder / "card.json"
        card.write_text(card.read_text().replace('"iterations"', '"rounds"'))
    with pytest.raises(RunFolderError, match=words):
        write_dataset([folder], tmp_path / "trials")


def test_a_sound_data_set_opens_again(dataset: TrialsDataset) -> None:
    assert open_dataset(str(dataset.folder)).facts == dataset.facts
