"""Checkpoints: of a fine-tune, of a training of policies."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import gymnasium as gym
import pytest
import rankpilot
import torch
from hypothesis import strategies as st
from peft import set_peft_model_state_dict
from rankpilot.agents.sb3_policy import GroupPolicy, read_checkpoint, write_checkpoint
from rankpilot.common.errors import RunFolderError
from rankpilot.finetune.checkpoint import STATE, TENSORS, TRAINER_STATE, fault_of, load_state, save_state
from sb3_contrib import MaskablePPO
from transformers import LlamaConfig

from ..finetune.test_pilot import STEPS, Loop
from ..finetune.tiny_runs import save_loop
from .damage import Files, as_text, damaged, damaged_json, damaged_tensors, files_of, folder_of, put
from .running import fuzz

# Of a fine-tune -------------------------------------------------------------------------------------------------------

STATE_OF_A_RUN = {"ranks": [1, 2], "meter": {"signals": torch.ones(3), "steps": 5}, "processes": 2}


def unsigned(files: Files) -> Files:
    """The same without the checksum, as a stranger may leave it out."""
    state = json.loads(files[STATE])
    del state["checksum"]
    return files | {STATE: as_text(state)}


checkpoint = cache(lambda: unsigned(files_of(lambda folder: save_state(folder, STATE_OF_A_RUN))))
"""What rankpilot adds to a checkpoint."""


@st.composite
def checkpoints(draw: st.DrawFn) -> Files:
    """The same, with one or both of the files damaged, and with damaged files of the Trainer."""
    files = checkpoint() | {"rng_state.pth": b"PK"}
    if draw(st.booleans()):
        files[STATE] = draw(damaged_json(json.loads(files[STATE])))
    if draw(st.booleans()):
        files[TENSORS] = draw(damaged_tensors(files[TENSORS]))
    return files | {TRAINER_STATE: draw(damaged_json({"global_step": 5, "log_history": [{"loss": 1.0, "step": 5}]}))}


@fuzz(checkpoints(), examples=50)
def test_checkpoints(files: Files) -> None:
    with folder_of(files) as folder:
        assert fault_of(folder, piloted=True)
        assert isinstance(load_state(folder), dict)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint as far as it is looked at, without the optimizer's state."""
    weights = {"adapter_config.json": b"{}", "adapter_model.safetensors": checkpoint()[TENSORS]}
    put(checkpoint() | {TRAINER_STATE: b"{}"} | weights, tmp_path)
    for name in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({}, tmp_path / name)
    return tmp_path


def test_an_archive_that_unpacks_to_more_than_it_is(saved: Path) -> None:
    """A checkpoint's zip file of a few bytes would be unpacked to be checked."""
    with ZipFile(saved / "optimizer.pt", "w", ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(2**24))
    assert fault_of(saved, piloted=True) == "optimizer.pt is corrupt"
    torch.save({}, saved / "optimizer.pt")
    assert fault_of(saved, piloted=True) == ""


def test_a_checkpoint_of_a_million_million_processes(saved: Path) -> None:
    state = json.loads((saved / STATE).read_text())
    (saved / STATE).write_bytes(as_text(state | {"processes": 10**12}))
    assert fault_of(saved, piloted=True) == "optimizer.pt is missing"


def test_tensors_that_do_not_fit_the_state(saved: Path) -> None:
    state = json.loads((saved / STATE).read_text())
    (saved / STATE).write_bytes(as_text(state | {"meter": 5}))
    with pytest.raises(RunFolderError, match=r"does not match rankpilot\.json: unexpected tensor 'meter/signals'"):
        load_state(saved)


# Of a loop of one's own -----------------------------------------------------------------------------------------------

LLAMA = LlamaConfig(
    vocab_size=128, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False
)


@cache
def of_a_loop() -> tuple[Any, Files]:
    """A loop after three steps, and its pilot's state."""
    with folder_of({}) as folder:
        loop = Loop(LLAMA, folder / "log", budget="60%")
        loop.pilot.begin(loop.run)
        loop.train(range(3))
        save_loop(loop.pilot, loop.run, folder / "loop.pt")
        saved = torch.load(folder / "loop.pt")
        return saved, unsigned(files_of(lambda folder: save_state(folder, saved["pilot"])))


@st.composite
def of_loops(draw: st.DrawFn) -> Files:
    """The state with one of its two files damaged."""
    files = dict(of_a_loop()[1])
    if draw(st.integers(0, 3)):
        return files | {STATE: draw(damaged_json(json.loads(files[STATE])))}
    return files | {TENSORS: draw(damaged_tensors(files[TENSORS]))}


@fuzz(of_loops(), examples=12)
def test_states_of_loops(files: Files) -> None:
    """What `load_state_dict` takes has to go on for a step."""
    with folder_of(files) as folder:
        loop = Loop(LLAMA, folder.parent / "log", budget="60%")
        set_peft_model_state_dict(loop.model, of_a_loop()[0]["adapter"])
        loop.optimizer.load_state_dict(deepcopy(of_a_loop()[0]["optimizer"]))
        step = loop.pilot.load_state_dict(loop.run, load_state(folder))
        loop.train(range(step, min(step + 1, STEPS)))


# Of a training of policies --------------------------------------------------------------------------------------------

DONE = 3
"""Rounds of the checkpoint."""

FILE = "checkpoint.pt"


@cache
def model() -> MaskablePPO:
    """A small one."""
    return MaskablePPO(GroupPolicy, gym.make(rankpilot.ENV_ID), n_steps=2, batch_size=2, policy_kwargs={"width": 4})


of_a_training = cache(lambda: files_of(lambda folder: write_checkpoint(folder / FILE, model(), {"done": DONE}))[FILE])


def restored(path: Path) -> Any:
    """The rounds done."""
    return read_checkpoint(path, model())["done"]


@fuzz(st.deferred(lambda: damaged(of_a_training())), examples=40)
def test_checkpoints_of_trainings(content: bytes) -> None:
    with folder_of({FILE: content}) as folder:
        assert restored(folder / FILE) == DONE


def test_a_training_s_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with ZipFile(io.BytesIO(of_a_training())) as plain, ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
        packed.writestr("archive/data/huge", bytes(2**24))
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt is corrupt"):
        restored(path)
    path.write_bytes(of_a_training())
    assert restored(path) == DONE
