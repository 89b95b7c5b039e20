"""The trials of the shipped policy, which a clone holds beside the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import rankpilot
import torch
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import CARD, DEFAULT, PACKAGED, load_policy
from rankpilot.agents.training.plan_runs import RUNS
from rankpilot.common.files import read_json
from rankpilot.study.dataset import TrialsDataset, open_dataset
from rankpilot.study.dataset.refit import training_config

ROOT = Path(rankpilot.__file__).parent
TRIALS = ROOT / "trials"


@pytest.fixture(scope="module")
def trials() -> TrialsDataset:
    return open_dataset(TRIALS)


def test_they_come_from_the_shipped_policys_training(trials: TrialsDataset) -> None:
    card = read_json(PACKAGED / DEFAULT / CARD)["training"]
    (source,) = trials.facts["sources"]
    further = training_config(trials).more_plan_runs
    assert further is not None
    assert source["training"] == card | {"more_plan_runs": further}
    assert (TRIALS / further).read_bytes() == (ROOT / card["more_plan_runs"]).read_bytes()
    shipped, actor = load_policy(DEFAULT), load_policy(TRIALS / source["actor"])
    assert isinstance(shipped, LearnedPolicy)
    assert isinstance(actor, LearnedPolicy)
    weights, read = shipped.network.state_dict(), actor.network.state_dict()
    assert weights.keys() == read.keys()
    assert all(torch.equal(weights[name], read[name]) for name in weights)


def test_each_task_has_all_of_its_plans(trials: TrialsDataset) -> None:
    rows = trials.table(["task", "stack", "run", "choice", "loss", "initial_loss"])
    plans = rows.group_by(["task", "stack"]).aggregate([("run", "count_distinct"), ("choice", "list")])
    counts = np.asarray(plans["run_count_distinct"])
    assert (counts % RUNS == 0).all()
    assert counts.sum() == 600 * RUNS
    assert all({"all-linear", "uniform", "signal-mean"} <= set(choices) for choices in plans["choice_list"].to_pylist())
    assert pc.mean(pc.less(rows["loss"], rows["initial_loss"])).as_py() > 0.9, "runs learned something"
