"""Value networks fitted to a data set are those of the training, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import CARD, WEIGHTS, load_policy
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.common.files import read_json, sha256
from rankpilot.env.proxy_task import find_tasks
from rankpilot.errors import DataError, RunFolderError
from rankpilot.training import task_sampling
from rankpilot.training.config import TrainConfig
from rankpilot.training.plan_runs import RUNS, RealPlanRun, plan_dataset, read_plan_run, write_real_plan_runs
from rankpilot.training.train import finish, train

from tools.dataset import TrialsDataset, open_dataset, write_dataset
from tools.refit import Options, main, plan_runs_of, refit, save_refitted, training_config

from .conftest import CONFIG, STACKS

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = TrainConfig(
    iterations=1,
    stacks=1,
    tasks_per_stack=1,
    episodes_per_task=2,
    workers=1,
    plan_tasks=2,
    suites=("planted",),
    bases=("llama-4x32",),
    task_steps=6,
    validation_tasks=0,
    schedule=DecisionSchedule(probe_steps=2, fractions=(0.0, 0.4)),
    network=NetworkConfig(width=8),
)


def test_a_training_refitted_from_its_trials_is_the_same_policy(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_observation: Callable[..., Any],
) -> None:
    """From runs that really ran: the weights' file byte for byte, and so all votes."""

    def small(*given: Any) -> Any:
        sizes: dict[str, Any] = {"length": 16, "batch_size": 4, "eval_rows": 16}
        return tuple(dataclasses.replace(task, **sizes) for task in find_tasks(*given))

    monkeypatch.setattr(task_sampling, "find_tasks", small)
    folder = tmp_path / "pilot"
    finish(folder, train(TINY, folder), TINY)
    dataset = write_dataset(folder, tmp_path / "trials")
    refitted = refit(dataset, training_config(dataset))
    again = save_refitted(tmp_path / "again" / "pilot", refitted, TINY, dataset)
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    old, new = load_policy(folder), load_policy(again)
    assert isinstance(old, LearnedPolicy)
    for number in range(3):
        observation = make_observation(9, seed=number)
        then, now = (policy.decide(observation).deliberation for policy in (old, new))
        assert then is not None
        assert now is not None
        assert then.votes.tobytes() == now.votes.tobytes()
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


def test_the_seed_decides(dataset: TrialsDataset, training: Path) -> None:
    ensembles = [refit(dataset, dataclasses.replace(CONFIG, seed=seed)).policy.value_ensemble for seed in (4, 5)]
    policy = load_policy(training)
    assert isinstance(policy, LearnedPolicy)
    assert policy.value_ensemble is not None
    states = [ensemble.state_dict() for ensemble in ensembles if ensemble]
    for name, value in policy.value_ensemble.state_dict().items():
        assert torch.equal(value, states[0][name])
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())


# Further plan runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def further(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that also learned from `packed`, a file in the working directory."""
    generator = np.random.default_rng(0)
    real = RealPlanRun(
        task="a task",
        family="a family",
        names=("a", "b", "c"),
        modules=generator.normal(size=(3, len(MODULE_FEATURES))).clip(-3, 3).astype(np.float32),
        run=generator.normal(size=len(RUN_FEATURES)).clip(-3, 3).astype(np.float32),
        ranks=generator.choice([0, 8, 16], size=(RUNS, 3)),
        losses=generator.uniform(1, 2, size=RUNS),
        train_losses=np.ones((RUNS, 3), dtype=np.float32),
        initial=3.0,
        choices=np.zeros(RUNS, dtype=np.int8),
    )
    monkeypatch.chdir(tmp_path)
    write_real_plan_runs([real], Path("packed"))
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


def test_the_stacks_are_those_of_the_files(dataset: TrialsDataset) -> None:
    for made, read in zip(STACKS, plan_runs_of(dataset), strict=True):
        taken = made.ranks.min(axis=2) >= 0
        np.testing.assert_array_equal(read.ranks[taken], made.ranks[taken])
        assert (read.ranks[~taken] == -1).all()
        np.testing.assert_array_equal(read.gains, made.gains)
