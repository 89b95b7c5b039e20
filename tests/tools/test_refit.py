"""Value networks fitted to a data set are those of the training, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.policy_file import CARD, WEIGHTS
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.common.files import read_json, sha256
from rankpilot.env.proxy_task import find_tasks
from rankpilot.errors import DataError, RunFolderError
from rankpilot.training import task_sampling
from rankpilot.training.plan_runs import RUNS, plan_dataset, read_plan_run
from rankpilot.training.train import finish, train

from benchmarks.plan_runs import write_real_plan_runs
from tools.dataset import TrialsDataset, open_dataset, write_dataset
from tools.refit import Options, main, plan_runs_of, refit, save_refitted, training_config

from ..training.made_up import real_plan_run
from .conftest import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(
    CONFIG,
    **{"iterations": 1, "stacks": 1, "tasks_per_stack": 1, "episodes_per_task": 2, "plan_tasks": 2, "task_steps": 6},
    **{"validation_tasks": 0, "suites": ("planted",), "bases": ("llama-4x32",)},
    schedule=DecisionSchedule(probe_steps=2, fractions=(0.0, 0.4)),
)


def test_a_training_refitted_from_its_trials_is_the_same_policy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From runs that really ran: the weights' file byte for byte."""

    def small(*given: Any) -> Any:
        return tuple(dataclasses.replace(task, length=16, batch_size=4, eval_rows=16) for task in find_tasks(*given))

    monkeypatch.setattr(task_sampling, "find_tasks", small)
    folder = tmp_path / "pilot"
    finish(folder, train(TINY, folder), TINY)
    dataset = write_dataset(folder, tmp_path / "trials")
    again = save_refitted(tmp_path / "again" / "pilot", refit(dataset, training_config(dataset)), TINY, dataset)
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    card, before = read_json(again / CARD), read_json(folder / CARD)
    assert card["plan_runs"] == before["plan_runs"]
    assert card["from_trials"]["sha256"] == sha256(dataset.folder / "dataset.json")


def test_what_learns_from_a_data_set_sees_what_the_training_saw(dataset: TrialsDataset, training: Path) -> None:
    """Also of runs that failed, and of stacks with different numbers of modules."""
    before, after = (
        plan_dataset(list(runs))
        for runs in (map(read_plan_run, sorted((training / "plan_runs").iterdir())), plan_runs_of(dataset))
    )
    for name in ("gains", "groups", "tasks"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    for name, values in vars(before.plans).items():
        assert np.asarray(values).tobytes() == np.asarray(getattr(after.plans, name)).tobytes()


# Further plan runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def further(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that also learned from `packed`, a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_real_plan_runs([real_plan_run(3)], Path("packed"))
    shutil.copytree(training, tmp_path / "pilot")
    card = tmp_path / "pilot" / CARD
    card.write_text(card.read_text().replace('"more_plan_runs": null', '"more_plan_runs": "packed"'))
    return tmp_path / "pilot"


def test_further_plan_runs_are_in_the_data_set_and_learned_from(further: Path, tmp_path: Path) -> None:
    found, name = write_dataset(further, tmp_path / "trials"), "more-plan-runs-0.safetensors"
    assert found.facts["files"][name]["sha256"] == sha256(Path("packed"))
    assert training_config(found).more_plan_runs == name
    assert read_json(found.folder / "actor-0" / CARD)["training"]["more_plan_runs"] == name
    assert f"which are no rows; they are in `{name}`." in (found.folder / "README.md").read_text()
    Path("packed").unlink()
    Path(name).write_bytes(b"another file of this name, in the working directory")
    assert refit(found, training_config(found)).facts["runs"] == (3 + 1) * RUNS
    (found.folder / name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="missing or damaged"):
        open_dataset(found.folder)


def test_further_plan_runs_that_the_data_set_does_not_hold(dataset: TrialsDataset) -> None:
    facts = json.loads(json.dumps(dataset.facts))
    facts["sources"][0]["training"]["more_plan_runs"] = "packed"
    with pytest.raises(DataError, match="'packed', which is no file of the data set"):
        training_config(TrialsDataset(dataset.folder, facts))


def test_further_plan_runs_that_are_gone(further: Path, tmp_path: Path) -> None:
    Path("packed").unlink()
    with pytest.raises(RunFolderError, match=re.escape("plan runs in packed, and there is no such file")):
        write_dataset(further, tmp_path / "trials")


def test_the_command(dataset: TrialsDataset, training: Path, tmp_path: Path) -> None:
    options = Options(dataset.folder, tmp_path / "again", workers=1)
    main(options)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (training / WEIGHTS).read_bytes()
    with pytest.raises(RunFolderError, match="exists already"):
        main(options)
