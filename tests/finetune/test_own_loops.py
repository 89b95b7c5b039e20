"""Loops of one's own that are no model ones: they keep the budget, and what they leave out is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from rankpilot.decide.rate_control import RunRecord
from rankpilot.finetune.watches import LossMeter
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .test_elastic import Loop
from .test_elastic import loop as loop
from .tiny_runs import load_loop, messages_of, ranks_of, save_loop, take_step


def test_layers_in_evaluation_mode_are_checkpointed_all_the_same(loop: Callable[..., Loop]) -> None:
    """As `from_pretrained` leaves them, where nobody calls `model.train()`."""
    run = loop("60%")
    assert run.checkpointed > 0
    run.model.base_model.eval()
    run.steps(2)
    run.pilot.finish()
    layers = [module for module in run.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert not any(module.training for layer in layers for module in layer.modules())


@pytest.mark.parametrize("checkpoints", [False, "auto"])
@pytest.mark.parametrize("stay", [True, False], ids=["set_to_none=False", "cleared before the forward pass"])
def test_gradients_that_stay_are_counted(
    loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture, checkpoints: bool | str, stay: bool
) -> None:
    run = loop("35%", gradient_checkpointing=checkpoints)
    clear = run.optimizer.zero_grad
    run.optimizer.zero_grad = partial(clear, set_to_none=False) if stay else lambda: None  # type: ignore
    if not stay:
        run.model.register_forward_pre_hook(lambda *_: clear())
    for _ in range(5):
        take_step(run.pilot, run.optimizer, next(run.batches), lambda batch: run.model(**batch).loss)
    assert len(messages_of(caplog, "Gradients are kept")) == stay
    assert max(peak for step, peak in run.pilot.peaks if step > 2) <= run.pilot.limit


def test_a_larger_batch_after_a_restart_is_met_before_its_step(
    llama_config: LlamaConfig, loop: Callable[..., Loop], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = loop("60%")
    run.steps(2)
    save_loop(run.pilot, run.run, tmp_path / "checkpoint")
    again = loop("60%", rows=16)
    load_loop(again.pilot, again.run, tmp_path / "checkpoint")
    again.steps(2)
    assert messages_of(caplog, "A batch of 16 x 12 is larger")


def test_nothing_is_taken_after_the_last_step(
    loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = loop()
    run.steps(1)
    ranks = ranks_of(run.model)
    monkeypatch.setattr(run.pilot.applier.clock, "total_steps", 2)
    monkeypatch.setattr(run.pilot._piloted.guard.meter, "end", lambda step: 2**40)
    run.steps(1)
    assert ranks_of(run.model) == ranks
    assert messages_of(caplog, "It was the last step, so the plan is kept")


def test_losses_that_are_no_numbers_do_not_count() -> None:
    """As of a batch whose labels are all masked; they would be in every checkpoint after it."""
    meter, record = LossMeter(), RunRecord(100)
    for loss in (torch.tensor(math.nan), 2.0, torch.tensor(4.0), math.inf):
        meter.before_optimizer_step(0, loss)
        record.add(float(loss), 0.1)
    assert meter.mean() == 3
    again = LossMeter()
    again.begin(json.loads(json.dumps(meter.state(), allow_nan=False)))
    assert again.mean() == 3
    assert all(map(math.isfinite, [*record.losses, *record.observe(1.0)]))
