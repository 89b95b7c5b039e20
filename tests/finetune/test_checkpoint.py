"""The files that rankpilot adds to a Trainer's checkpoint, and those of another version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rankpilot.common.errors import RunFolderError
from rankpilot.cost.cost import ByteCost, ParameterCost, cost_from_state, cost_state
from rankpilot.finetune.checkpoint import STATE, TENSORS, as_saved, load_state, save_state
from rankpilot.finetune.step.peak_guard import PeakGuard
from rankpilot.finetune.step.shortage import PlanReduction
from rankpilot.finetune.watches import LossMeter


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {
        "outer": {"inner": {"a.b": torch.arange(3), "text": "x"}, "list": [[1, 2.5]], "empty": {}},
        "tensor": torch.ones(2, 2, dtype=torch.bfloat16).T,
        "number": 0.1,
    }
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert torch.equal(loaded["outer"]["inner"].pop("a.b"), torch.arange(3))
    assert torch.equal(loaded.pop("tensor"), torch.ones(2, 2, dtype=torch.bfloat16))
    assert loaded == {"outer": {"inner": {"text": "x"}, "list": [[1, 2.5]], "empty": {}}, "number": 0.1}


@pytest.mark.parametrize("number", [{"format": 99}, {}])
def test_the_checkpoint_of_another_version_is_refused_in_one_line(tmp_path: Path, number: dict[str, int]) -> None:
    save_state(tmp_path, {})
    (tmp_path / STATE).write_text(json.dumps({"applier": {}} | number))
    with pytest.raises(RunFolderError, match="written by another version of rankpilot") as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("missing", [STATE, TENSORS])
def test_a_checkpoint_that_was_cut_off_is_refused(tmp_path: Path, missing: str) -> None:
    save_state(tmp_path, {})
    (tmp_path / missing).unlink()
    with pytest.raises(RunFolderError, match=f"has no {missing}"):
        load_state(tmp_path)


@pytest.mark.parametrize("unit", ["bytes", "parameters"])
def test_costs_go_through_a_checkpoint(tmp_path: Path, unit: str) -> None:
    generator = np.random.default_rng(0)
    cost = ByteCost(("a", "b"), *(generator.random(shape) for shape in (2, (2, 3), (2, 4))), np.eye(4, 3, dtype=bool))
    given = cost if unit == "bytes" else ParameterCost(generator.random((1, 3)))
    save_state(tmp_path, as_saved({"cost": cost_state(given)}))
    loaded = cost_from_state(load_state(tmp_path)["cost"])
    assert type(loaded) is type(given)
    for name, value in vars(given).items():
        assert np.array_equal(getattr(loaded, name), value), name
        assert type(getattr(loaded, name)) is type(value), name


def test_meters_go_on_from_their_state(tmp_path: Path) -> None:
    losses, guard = LossMeter(), PeakGuard(10, print)
    losses.total, losses.count = torch.tensor(2.5), 2
    guard.meter.history = [(1, 1000)]
    given = PlanReduction(np.array([3, 4]), ("layers.0",), limit=9.0, cost=8.0, saved=1.0, times=1, step=5)
    guard.plan.now = replace(guard.plan.now, before=np.array([1, 2]), reduction=given)
    save_state(tmp_path, losses.state() | guard.state())
    state = load_state(tmp_path)
    other_losses, other_guard = LossMeter(), PeakGuard(10, print)
    other_losses.begin(state)
    other_guard.begin(state)
    assert other_losses.mean() == 1.25
    assert other_guard.meter.history == [(1, 1000)]
    before, taken = other_guard.plan.now.before, other_guard.plan.now.reduction
    assert before is not None
    assert before.tolist() == [1, 2]
    assert taken is not None
    assert taken.ranks.tolist() == [3, 4]
    assert {**vars(taken), "ranks": None} == {**vars(given), "ranks": None}
