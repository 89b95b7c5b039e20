"""Data sets of decisions, plan runs of a training, and checkpoints of a fine-tune."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from rankpilot.env.proxy_task import ProxyTask
from rankpilot.errors import RunFolderError
from rankpilot.finetune.checkpoint import STATE, TENSORS, TRAINER_STATE, fault_of, load_state, save_state
from rankpilot.training.compare import log_folder
from rankpilot.training.plan_runs import RUNS, PlanRun, plan_dataset, read_plan_run, write_plan_run
from rankpilot.training.results import read_rows

from .damage import as_text, damaged_json, damaged_tensors, opened
from .running import fuzz


@cache
def plan_run() -> bytes:
    """Runs of one task on two modules."""
    generator, shape = np.random.default_rng(0), (2, RUNS, 2)
    runs = PlanRun(
        modules=generator.normal(size=(*shape, 3)).astype(np.float32),
        scores=generator.normal(size=shape).astype(np.float32),
        run=generator.normal(size=(2, RUNS, 4)).astype(np.float32),
        ranks=generator.integers(0, 8, shape),
        losses=generator.uniform(1, 2, RUNS),
        initial=np.full(RUNS, 3.0),
        choices=np.zeros((2, RUNS), dtype=np.int8),
        tasks=(ProxyTask("shift", 1),),
        names=("a", "b"),
    )
    return whole(lambda path: write_plan_run(runs, path))


def whole(write: Callable[[Path], object]) -> bytes:
    """What a writer writes into a file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "file"
        write(path)
        return path.read_bytes()


@fuzz(st.deferred(lambda: damaged_tensors(plan_run(), opened)), examples=60)
def test_plan_runs(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "00000.safetensors"
        path.write_bytes(content)
        runs = read_plan_run(path)
        if runs.modules.dtype == np.float32:
            plan_dataset([runs])


STATE_OF_A_RUN = {"ranks": [1, 2], "meter": {"signals": torch.ones(3), "steps": 5}, "processes": 2}


@cache
def checkpoint() -> dict[str, bytes]:
    """What rankpilot adds to a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        save_state(Path(name), STATE_OF_A_RUN)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, bytes]:
    """The same, with one or both of the files damaged, and with damaged files of the Trainer."""
    files = dict(checkpoint())
    if draw(st.booleans()):
        files[STATE] = draw(damaged_json(json.loads(files[STATE])))
    if draw(st.booleans()):
        files[TENSORS] = draw(damaged_tensors(files[TENSORS]))
    return files | {TRAINER_STATE: draw(damaged_json({"global_step": 5, "log_history": [{"loss": 1.0, "step": 5}]}))}


@fuzz(checkpoints(), examples=100)
def test_checkpoints(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        (Path(name) / "rng_state.pth").write_bytes(b"PK")
        assert fault_of(Path(name), piloted=True)
        assert isinstance(load_state(Path(name)), dict)


ROW = {
    "policy": "p", "task": "t", "seed": 1, "kind": "shift", "base": "b", "family": "llama", "depth": 4, "budget": 0.5,
    "cost_kind": "step", "place": "", "initial_loss": 3.0, "uniform_loss": 2.0, "best_loss": None, "loss": 1.5,
    "improvement": 0.5, "failed": False,
}  # fmt: skip


@fuzz(st.lists(damaged_json(ROW), max_size=3), examples=100)
def test_rows_of_comparisons(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        for row in read_rows(path):
            folder = log_folder(Path(name) / "logs", row.key)
            assert folder.parent.parent == Path(name) / "logs"
            assert folder.resolve() == folder.absolute()


# What was found -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["..", ".", "../..", "/etc", "a/../../b", "..\\x"])
def test_names_in_rows_do_not_lead_out_of_the_folder_of_logs(tmp_path: Path, policy: str) -> None:
    folder = log_folder(tmp_path / "logs", (policy, "../t", 0))
    assert folder.resolve().is_relative_to(tmp_path / "logs")
    assert folder.resolve().parent.parent == (tmp_path / "logs").resolve()


def test_a_row_whose_seed_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_text(ROW | {"seed": "/../../../x"}))
    with pytest.raises(RunFolderError, match=r"seed is '/\.\./\.\./\.\./x'"):
        read_rows(path)


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    """A checkpoint's zip file of a few bytes would be unpacked to be checked."""
    for file, content in checkpoint().items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / TRAINER_STATE).write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(checkpoint()[TENSORS])
    torch.save({}, tmp_path / "scheduler.pt")
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        torch.save({}, tmp_path / name)
    with ZipFile(tmp_path / "optimizer.pt", "w", ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(2**24))
    assert fault_of(tmp_path, piloted=True) == "optimizer.pt is torn"
    torch.save({}, tmp_path / "optimizer.pt")
    assert fault_of(tmp_path, piloted=True) == ""


def test_a_checkpoint_of_a_million_million_processes(tmp_path: Path) -> None:
    for file, content in checkpoint().items():
        (tmp_path / file).write_bytes(content)
    state = json.loads((tmp_path / STATE).read_text())
    (tmp_path / STATE).write_bytes(as_text(state | {"processes": 10**12}))
    (tmp_path / TRAINER_STATE).write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(checkpoint()[TENSORS])
    torch.save({}, tmp_path / "rng_state_0.pth")
    assert fault_of(tmp_path, piloted=True) == "optimizer.pt is missing"


@pytest.mark.parametrize("content", [b"[]", b"5", b"{", b"\xff"])
def test_a_checkpoint_whose_state_is_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    (tmp_path / TENSORS).write_bytes(checkpoint()[TENSORS])
    with pytest.raises(RunFolderError, match=STATE):
        load_state(tmp_path)


def test_tensors_that_do_not_fit_the_state(tmp_path: Path) -> None:
    save_state(tmp_path, {"meter": {"signals": torch.ones(3)}})
    state: dict[str, Any] = json.loads((tmp_path / STATE).read_text())
    (tmp_path / STATE).write_bytes(as_text(state | {"meter": 5}))
    with pytest.raises(RunFolderError, match=r"does not fit rankpilot\.json: it has a tensor 'meter/signals'"):
        load_state(tmp_path)
