"""Data sets hold exactly what their training holds, and are complete or absent."""

from __future__ import annotations

from pathlib import Path

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


def test_a_row_for_each_decision_that_was_taken_bit_for_bit(dataset: TrialsDataset) -> None:
    rows = dataset.table().to_pylist()
    assert len(rows) == sum(np.count_nonzero(stack.ranks.min(axis=2) >= 0) for stack in STACKS) == 2 * 45 - 2
    assert len({(row["run"], row["decision"]) for row in rows}) == len(rows)
    for row in rows:
        stack, place = STACKS[row["stack"]], (row["decision"], row["slot"])
        floats = {"actor_score": stack.scores[place]}
        floats |= {f"feature.{name}": stack.modules[place][:, index] for index, name in enumerate(MODULE_FEATURES)}
        floats |= {f"run.{name}": stack.run[place][index] for index, name in enumerate(RUN_FEATURES)}
        for name, values in floats.items():
            assert np.asarray(row[name], dtype=np.float32).tobytes() == values.tobytes()
        assert (row["ranks"], row["module"]) == (stack.ranks[place].tolist(), list(stack.names))
        loss = stack.losses[row["slot"]]
        assert (row["loss"], row["failed"]) == ((loss, False) if np.isfinite(loss) else (None, True))
        assert row["initial_loss"] == stack.initial[row["slot"]]

        task = stack.tasks[row["slot"] // RUNS]
        alike = ("seed", "kind", "base", "budget", "cost_kind", "learning_rate")
        assert {name: row[name] for name in alike} == {name: getattr(task, name) for name in alike}
        assert (row["task"], row["place"], row["total_steps"]) == (task.id, task.placement, task.steps)
        assert 0 <= row["fold"] < 5
        assert (row["split"], row["step"]) == ("train", CONFIG.schedule.steps(task.steps)[row["decision"]])

        assert stack.choices is not None
        choice = CHOICES[stack.choices[place]]
        chosen = {"keep": 0.75, "drawn": 0.25}[choice] if row["decision"] else 1
        drawn = row["decision"] or choice == "drawn"
        assert (row["choice"], row["choice_probability"]) == (choice, chosen)
        assert row["probability"] == (None if drawn else 1), "given where it is known"


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


def test_a_training_that_is_not_finished(tmp_path: Path) -> None:
    folder = write_training(tmp_path / "pilot")
    (folder / "card.json").unlink()
    with pytest.raises(RunFolderError, match="not finished"):
        write_dataset(folder, tmp_path / "trials")
    assert not (tmp_path / "trials").exists(), "complete or absent"


def test_the_trials_of_the_shipped_policy_are_whole() -> None:
    trials = open_dataset(TRIALS)
    assert trials.table(["task"]).num_rows == trials.facts["rows"] == 9000
