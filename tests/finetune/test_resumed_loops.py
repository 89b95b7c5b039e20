"""Resumed loops of one's own: bit for bit as if never interrupted, and a clear error otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from rankpilot import TrainingRun
from rankpilot.common.errors import BudgetError, ConfigError, RunFolderError
from transformers import LlamaConfig

from .test_pilot import STEPS, Loop
from .tiny_runs import adapted, load_loop, save_loop

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
    save_loop(loop.pilot, loop.run, folder / "loop.pt")
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
    assert load_loop(again.pilot, again.run, tmp_path / "loop.pt") == CUT
    again.train(range(CUT, STEPS))
    assert again.losses == whole.losses[CUT:]
    assert again.ranks == whole.ranks
    there = dict(whole.model.named_parameters())
    assert all(torch.equal(value, there[name]) for name, value in again.model.named_parameters())
    again.pilot.finish()
    again.model.save_pretrained(tmp_path / "adapter")
    assert again.pilot.predictions == whole.pilot.predictions


def test_another_budget_counts_at_once(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    again = Loop(llama_config, tmp_path / "log", budget="30%")
    load_loop(again.pilot, again.run, tmp_path / "loop.pt")
    assert sum(again.ranks.values()) < sum(whole.ranks.values())
    again = Loop(llama_config, tmp_path / "log", budget="1KiB step")
    with pytest.raises(BudgetError, match="The budget has changed"):
        load_loop(again.pilot, again.run, tmp_path / "loop.pt")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj"]}, r"\d+ adapters of the model differ in rank"),
        ({"lora_alpha": 32}, r"another scaling: at rank 8, .* by 2, now by 4"),
        ({"use_rslora": True}, r"another scaling: at rank 8, .* by 2, now by 5\.65685"),
    ],
)
def test_another_model_or_scaling(
    whole: Loop, llama_config: LlamaConfig, tmp_path: Path, lora: dict[str, Any], words: str
) -> None:
    """PEFT keeps no scaling beside the weights, so the function of the model would change unseen."""
    saved = torch.load(tmp_path / "loop.pt")
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    model = adapted(llama_config, **lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = TrainingRun.of_loader(model, optimizer, again.loader, loss=again.loss, total_steps=STEPS)
    if len(lora.get("target_modules", ())) != 1:
        set_peft_model_state_dict(model, saved["adapter"])
    with pytest.raises(RunFolderError, match=words):
        again.pilot.load_state_dict(run, saved["pilot"])


def test_adapters_that_were_not_loaded(whole: Loop, llama_config: LlamaConfig, tmp_path: Path) -> None:
    """A state alone does not make a run go on: the adapters would be blank."""
    again = Loop(llama_config, tmp_path / "log", budget="40%")
    with pytest.raises(RunFolderError, match=r"\d+ adapters of the model differ in rank"):
        again.pilot.load_state_dict(again.run, whole.pilot.state_dict())
    with pytest.raises(RunFolderError, match=r"Not the state of a run: its keys are \[\]"):
        again.pilot.load_state_dict(again.run, {})
    state = whole.pilot.state_dict() | {"ranks": again.ranks}
    with pytest.raises(RunFolderError, match="The adapters of the model are new"):
        again.pilot.load_state_dict(again.run, state)


def test_before_a_run_has_begun(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop = Loop(llama_config, tmp_path / "log")
    for call in (
        loop.pilot.state_dict,
        lambda: loop.pilot.before_step(next(iter(loop.loader))),
        loop.pilot.after_step,
        lambda: loop.pilot.limit,
    ):
        with pytest.raises(ConfigError, match=r"The run has not begun\. Call `begin`"):
            call()
