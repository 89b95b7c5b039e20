"""A training whose plan runs are made up, and its data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy_file import save_policy
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.common.files import as_json
from rankpilot.env.proxy_task import ProxyTask, load_suite
from rankpilot.training.config import TrainConfig
from rankpilot.training.fit_plan_value import ANY_COST, fit_value_ensemble
from rankpilot.training.plan_runs import CHOICES, RUNS, PlanRun, plan_dataset, read_plan_run, write_plan_run

from tools.dataset import TrialsDataset, write_dataset

from ..training.made_up import plan_run

CONFIG = TrainConfig(
    plan_tasks=3, schedule=DecisionSchedule(fractions=(0.0, 0.4)), network=NetworkConfig(width=8), workers=1, seed=4
)
TASKS = tuple(replace(task, seed=10_000_000 + number) for number, task in enumerate(load_suite("planted", "train")[:3]))


def made_up(number: int, tasks: tuple[ProxyTask, ...], modules: int) -> PlanRun:
    """Plan runs of two decisions; runs 7 and 8 failed too, the first of them before the second decision."""
    made = plan_run(number, decisions=2, tasks=len(tasks), modules=modules)
    made.losses[7], made.losses[8] = np.nan, np.inf
    made.ranks[1, 7] = -1
    made.modules[0, 0, 0, :2] = -0.0, np.float32(0.1)
    runs = len(tasks) * RUNS
    later = np.random.default_rng(number).choice([5, 6], runs)
    choices = np.array([[min(slot % RUNS, 5) for slot in range(runs)], later], dtype=np.int8)
    return replace(made, choices=choices, tasks=tasks, names=tuple(f"model.layers.{index}" for index in range(modules)))


STACKS = (made_up(0, TASKS[:2], 3), made_up(1, TASKS[2:], 5))
assert CHOICES[5:7] == ("drawn", "keep")


def write_training(folder: Path) -> Path:
    """A finished training with these plan runs."""
    for number, stack in enumerate(STACKS):
        write_plan_run(stack, folder / "plan_runs" / f"{number:05}.safetensors")
    torch.manual_seed(0)
    ensemble = PlanValueEnsemble(ANY_COST)
    runs = [read_plan_run(path) for path in sorted((folder / "plan_runs").iterdir())]
    fit_value_ensemble(ensemble, plan_dataset(runs), seed=CONFIG.seed)
    provenance = {"name": folder.name, "training": as_json(TrainConfig, CONFIG), "suite_version": 3}
    return save_policy(folder, RankNetwork(CONFIG.network), CONFIG.schedule, provenance, ensemble)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training."""
    return write_training(tmp_path_factory.mktemp("sources") / "pilot")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, training: Path) -> TrialsDataset:
    """The data set of the training."""
    return write_dataset(training, tmp_path_factory.mktemp("datasets") / "trials")
