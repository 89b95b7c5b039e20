"""Data sets hold exactly what their training holds, and are complete or absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.errors import DataError, RunFolderError
from rankpilot.training.plan_runs import CHOICES, RUNS

from tools.dataset import COLUMNS, TrialsDataset, open_dataset, write_dataset

from .conftest import CONFIG, STACKS, write_training

TRIALS = Path(__file__).parents[2] / "tools" / "trials"

pytestmark = pytest.mark.usefixtures("one_thread")


def bits(values: Any, kind: type) -> bytes:
    return np.asarray(values, dtype=kind).tobytes()


def test_a_row_for_each_decision_that_was_taken_bit_for_bit(dataset: TrialsDataset) -> None:
    rows = dataset.table().to_pylist()
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
    for row in dataset.table().to_pylist():
        task = STACKS[row["stack"]].tasks[row["slot"] // RUNS]
        same = ("seed", "kind", "base", "budget", "cost_kind", "learning_rate")
        assert {name: row[name] for name in same} == {name: getattr(task, name) for name in same}
        assert (row["task"], row["place"], row["total_steps"]) == (task.id, task.placement, task.steps)
        assert (row["split"], row["step"]) == ("train", CONFIG.schedule.steps(task.steps)[row["decision"]])
        assert 0 <= row["fold"] < 5


def test_probabilities_of_plan_runs_are_given_where_they_are_known(dataset: TrialsDataset) -> None:
    for row in dataset.table().to_pylist():
        choices = STACKS[row["stack"]].choices
        assert choices is not None
        assert row["choice"] == CHOICES[choices[row["decision"], row["slot"]]]
        if row["decision"] == 0:
            assert row["choice_probability"] == 1
            assert row["probability"] == (None if row["choice"] == "drawn" else 1)
        else:
            assert row["choice_probability"] == {"keep": 0.75, "drawn": 0.25}[row["choice"]]
            assert row["probability"] is None


def test_the_card_tells_what_is_there(dataset: TrialsDataset) -> None:
    text = (dataset.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["rankpilot"]["tasks_of_splits"] == {"train": 3}
    assert "88 decisions of 45 runs on 3 tasks." in text
    assert all(f"| `{column.name}` |" in text for column in COLUMNS)


def test_damage_is_found(training: Path, tmp_path: Path) -> None:
    folder = write_dataset(training, tmp_path / "trials").folder
    path = folder / "trials-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"trials-00000\.parquet is missing or damaged"):
        open_dataset(folder)
    with pytest.raises(DataError, match="is no data set of rankpilot"):
        open_dataset(tmp_path)
    with pytest.raises(RunFolderError, match="exists already"):
        write_dataset(training, folder)


@pytest.mark.parametrize(("damage", "words"), [("card", "not finished"), ("tasks", "an earlier version")])
def test_trainings_that_cannot_be_read(tmp_path: Path, damage: str, words: str) -> None:
    stacks = tuple(replace(stack, tasks=()) for stack in STACKS) if damage == "tasks" else STACKS
    folder = write_training(tmp_path / "pilot", stacks)
    if damage == "card":
        (folder / "card.json").unlink()
    with pytest.raises(RunFolderError, match=words):
        write_dataset(folder, tmp_path / "trials")
    assert not (tmp_path / "trials").exists(), "complete or absent"


def test_the_trials_of_the_shipped_policy_are_whole() -> None:
    trials = open_dataset(TRIALS)
    assert trials.table(["task"]).num_rows == trials.facts["rows"] == 9000
