"""Checkpoints of a loop of one's own: bit for bit as if never interrupted, and a clear error otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from rankpilot import TrainingRun
from rankpilot.common.errors import BudgetError, ConfigError, RunFolderError
from rankpilot.finetune.loop_checkpoint import OPTIMIZER, WEIGHTS
from transformers import LlamaConfig

from .test_faults import flip
from .test_pilot import STEPS, Loop
from .tiny_runs import adapted

CUT = 5
"""After the second decision, which drops some modules."""


@pytest.fixture(scope="module")
def kept(llama_config: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loop, Path]:
    """A run to its end, with a checkpoint on the way, and the folder of its log and checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    loop = Loop(llama_config, folder / "log", budget="40%")
    loop.pilot.begin(loop.run)
    loop.train(range(CUT))
    rankpilot.save_checkpoint(loop.pilot, loop.run, folder / "checkpoint")
    assert 0 in loop.ranks.values()
    loop.train(range(CUT, STEPS))
    return loop, folder


@pytest.fixture
def whole(kept: tuple[Loop, Path], tmp_path: Path) -> Loop:
    """The run, whose log and checkpoint are copied for each test."""
    loop, folder = kept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return loop


def test_a_run_goes_on_as_if_nothing_had_happened(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    assert rankpilot.load_checkpoint(again.pilot, again.run, tmp_path / "checkpoint") == CUT
    again.train(range(CUT, STEPS))
    assert again.losses == whole.losses[CUT:]
    assert again.ranks == whole.ranks
    there = dict(whole.model.named_parameters())
    assert all(torch.equal(value, there[name]) for name, value in again.model.named_parameters())
    again.pilot.finish()
    again.model.save_pretrained(tmp_path / "adapter")
    assert again.pilot.predictions == whole.pilot.predictions


def test_a_later_checkpoint_replaces_an_earlier_one(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    rankpilot.save_checkpoint(whole.pilot, whole.run, tmp_path / "checkpoint")
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    assert rankpilot.load_checkpoint(again.pilot, again.run, tmp_path / "checkpoint") == STEPS
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_holds_something_else_is_left_alone(whole: Loop, tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for folder, foreign in ((tmp_path / "checkpoint", "notes.txt"), (tmp_path, "checkpoint")):
        with pytest.raises(RunFolderError, match=f"such as {foreign}, and would be lost"):
            rankpilot.save_checkpoint(whole.pilot, whole.run, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_budget_counts_at_once(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    again = Loop(llama_config, tmp_path / "log", budget="30%")
    rankpilot.load_checkpoint(again.pilot, again.run, tmp_path / "checkpoint")
    assert sum(again.ranks.values()) < sum(whole.ranks.values())
    again = Loop(llama_config, tmp_path / "log", budget="1KiB step")
    with pytest.raises(BudgetError, match="The budget or the time limit has changed"):
        rankpilot.load_checkpoint(again.pilot, again.run, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"torn"), "Cannot read checkpoint .*Use an earlier one"),
        (
            lambda folder: flip(folder / WEIGHTS),
            "Cannot read checkpoint .*has changed since it was written.*Use an earlier one",
        ),
        (lambda folder: (folder / OPTIMIZER).write_bytes(b"torn"), "Cannot read checkpoint .*Use an earlier one"),
        (lambda folder: (folder / OPTIMIZER).unlink(), "Cannot read checkpoint .*Use an earlier one"),
        (lambda folder: (folder / "rankpilot.json").unlink(), "has no rankpilot.json"),
    ],
    ids=["weights", "a bit of the weights", "optimizer", "no optimizer", "no state"],
)
def test_a_torn_checkpoint(
    whole: Loop, llama_config: LlamaConfig, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(tmp_path / "checkpoint")
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    with pytest.raises(RunFolderError, match=words):
        rankpilot.load_checkpoint(again.pilot, again.run, tmp_path / "checkpoint")


def test_an_optimizer_of_another_kind(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    for state in ([1, 2], {"state": {}}, {"state": {}, "param_groups": []}):
        torch.save(state, tmp_path / "checkpoint" / OPTIMIZER)
        again = Loop(llama_config, tmp_path / "log", budget="40%")
        with pytest.raises(RunFolderError, match="does not fit the model or the optimizer"):
            rankpilot.load_checkpoint(again.pilot, again.run, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj"]}, r"belongs to another model: \d+ trainable parameters are missing in one of"),
        ({"lora_alpha": 32}, r"another scaling: at rank 8, .* by 2, now by 4"),
        ({"use_rslora": True}, r"another scaling: at rank 8, .* by 2, now by 5\.65685"),
    ],
)
def test_another_model_or_scaling(
    whole: Loop, llama_config: LlamaConfig, tmp_path: Path, lora: dict[str, Any], words: str
) -> None:
    """PEFT keeps no scaling beside the weights, so the function of the model would change unseen."""
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    model = adapted(llama_config, **lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = TrainingRun.of_loader(model, optimizer, again.loader, loss=again.loss, total_steps=STEPS)
    with pytest.raises(RunFolderError, match=words):
        rankpilot.load_checkpoint(again.pilot, run, tmp_path / "checkpoint")


def test_adapters_that_were_not_loaded(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    """A state alone does not make a run go on: the adapters would be blank."""
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    with pytest.raises(RunFolderError, match=r"\d+ adapters of the model differ in rank .*load_checkpoint"):
        again.pilot.resume(again.run, whole.pilot.state_dict(), step=CUT)
    with pytest.raises(RunFolderError, match=r"Not the state of a run: its keys are \[\]"):
        again.pilot.resume(again.run, {}, step=CUT)


def test_before_a_run_has_begun(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop = Loop(llama_config, tmp_path / "log")
    for call in (
        lambda: rankpilot.save_checkpoint(loop.pilot, loop.run, tmp_path / "checkpoint"),
        lambda: loop.pilot.before_step(next(iter(loop.loader))),
        loop.pilot.after_step,
        lambda: loop.pilot.limit,
    ):
        with pytest.raises(ConfigError, match=r"The run has not begun\. Call `begin`"):
            call()
    assert not (tmp_path / "checkpoint").exists()
