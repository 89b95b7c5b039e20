"""Losses, gradients and weights that are not a number: what a run undoes, what ends it, and what is never saved."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from rankpilot.common.errors import NonFiniteError
from rankpilot.decide.rate_control import CHANGES, UNDO
from rankpilot.finetune.controlled_rate import PATIENCE
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.finetune.watches import trains_finite
from rankpilot.study.run_data import control_sentence, read_run
from rankpilot.study.verdict import verdict
from safetensors.torch import load_file
from transformers import LlamaConfig, Trainer, TrainerCallback

from .test_controlled_rate import MOMENTS, STEPS, Loop, scripted
from .tiny_runs import PLAIN, adapted, arguments, counting, load_loop, save_loop
from .tiny_runs import llama_config as llama_config

Break = Callable[[Any], object]
"""Breaks the gradients of a model."""


def one_inf(model: Any) -> None:
    next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = math.inf


def too_large(model: Any) -> None:
    """Its square is infinite in the optimizer's moments, and the weights stay finite."""
    next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = 1e25


def all_nan(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)


class Breaking(Loop):
    """A loop some of whose steps break; the loss of those with `all_nan` is NaN."""

    total = STEPS

    @property
    def run(self) -> TrainingRun:
        return TrainingRun.of_loader(self.model, self.optimizer, self.loader, total_steps=self.total)

    def begin(self) -> Breaking:
        self.pilot.begin(self.run)
        return self

    def breaks(self, at: set[int], how: Break, steps: int, *, skips: bool = False) -> Breaking:
        """Make some steps, of which those of these numbers break; a scaler may leave them out (`skips`)."""
        for step in range(steps):
            batch = next(self.batches)
            self.pilot.before_step(batch)
            loss = self.model(**batch).loss
            loss.backward()
            if step in at:
                how(self.model)
                loss = loss * math.nan if how is all_nan else loss
            self.pilot.before_optimizer_step(loss.detach())
            if not (skips and step in at):
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.pilot.after_step()
        return self

    @property
    def about(self) -> list[str]:
        return [line for line in self.told if "finite" in line]


@pytest.mark.parametrize(
    ("at", "how", "total"), [(0, all_nan, 12), (5, too_large, 12), (11, one_inf, 12), (12, all_nan, STEPS)]
)
def test_under_control_a_broken_step_is_undone_and_the_rate_falls(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, at: int, how: Break, total: int
) -> None:
    script = scripted(monkeypatch)
    monkeypatch.setattr(Breaking, "total", total)
    loop = Breaking(llama_config, 1e-3).begin().breaks({at}, how, at + 1)
    (line,) = loop.about
    back = int(line.rpartition(" ")[2].rstrip("."))
    assert line.startswith(f"step {at + 1}: learning rate changed from 0.001 to 0.0005.")
    whole = Breaking(llama_config, 1e-3, control=False).begin().breaks(set(), all_nan, back)
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), loop.state(), strict=True))
    assert 0 <= at - back <= 2, "the copy is not much older"
    loop.breaks(set(), all_nan, min(total - at - 1, 5))
    assert loop.pilot._piloted.rate.of_plan.factor == pytest.approx(0.5)
    assert trains_finite(loop.optimizer, moments=True)
    loop.pilot.finish()
    if total == STEPS:  # what the next moment sees is not of the step that broke
        assert script.seen[-1]["undone"] == 1
        assert all(abs(script.seen[-1][name]) < 0.5 for name in ("loss", "above the best", "noise"))


def test_a_run_that_no_copy_helps_ends_with_adapters_that_are_whole(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch)
    loop = Breaking(llama_config, 1e-3, log=tmp_path).begin()
    with pytest.raises(
        NonFiniteError, match=r"After step 23 .* No checkpoint is overwritten\. Lower the learning rate"
    ):
        loop.breaks({4, *range(20, STEPS)}, all_nan, STEPS)
    assert trains_finite(loop.optimizer, moments=True)
    assert len(loop.about) == 1 + PATIENCE
    assert loop.pilot._piloted.rate.of_plan.factor == pytest.approx(2 ** -(1 + PATIENCE))
    assert "non-finite up to step 23" in verdict(read_run(tmp_path)).warnings[0]
    assert control_sentence(read_run(tmp_path)).endswith("Non-finite values after step 5, 21, 22, 23 were undone.")


@pytest.mark.parametrize("control", [True, False])
def test_steps_that_break_nothing_are_no_event(llama_config: LlamaConfig, control: bool) -> None:
    """A scaler leaves steps out whose gradients overflow; of batches without labels the loss is NaN and no gradient."""
    loop = Breaking(llama_config, 1e-3, control=control).begin()
    loop.breaks({0, 3}, one_inf, 5, skips=True)
    assert loop.about == []
    loop.breaks({0, 3}, all_nan, 5, skips=True)
    assert loop.about == ["step 6: the loss was not finite, but all trained parameters are; continuing."]
    assert loop.pilot._piloted.rate.of_plan.factor == 1
    loop.pilot.finish()


def test_a_loop_without_control_ends_and_keeps_its_checkpoint(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop = Breaking(llama_config, 1e-3, control=False, log=tmp_path / "log").begin().breaks(set(), all_nan, 3)
    save_loop(loop.pilot, loop.run, path := tmp_path / "checkpoint")
    before = path.read_bytes()
    with pytest.raises(NonFiniteError, match=r"After step 4 .* control=True undoes such steps"):
        loop.breaks({0}, all_nan, 1)
    with pytest.raises(NonFiniteError, match="they are not saved"):
        save_loop(loop.pilot, loop.run, path)
    with pytest.raises(NonFiniteError, match="they are not saved"):
        loop.pilot.finish()
    assert path.read_bytes() == before
    assert "non-finite up to step 4" in verdict(read_run(tmp_path / "log")).warnings[0]


class Begins(TrainerCallback):
    """Tells its Trainer when the first step begins, before which steps are measured."""

    trainer: BreakingTrainer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begun = True


class BreakingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is NaN in some steps, and in some evaluations."""

    at: set[int]
    evaluations: set[int]
    begun = False

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *rest, **options)
        broken = self.at if model.training else self.evaluations
        if not self.begun or self.state.global_step not in broken:
            return loss
        return (loss[0] * math.nan, *loss[1:]) if isinstance(loss, tuple) else loss * math.nan


def train(config: LlamaConfig, folder: Path, at: set[int], **options: Any) -> BreakingTrainer:
    """A run of six steps, with a checkpoint after each."""
    control, evaluations = options.pop("control", False), options.pop("evaluations", set())
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 1, "lr_scheduler_type": "constant"}
    trainer = BreakingTrainer(
        adapted(config),
        arguments(folder, **settings | options),
        train_dataset=counting(),  # type: ignore[arg-type]
        eval_dataset=counting(4),  # type: ignore[arg-type]
        callbacks=[begins := Begins()],
    )
    begins.trainer = trainer
    trainer.at, trainer.evaluations = at, evaluations
    piloted: dict[str, Any] = {"budget": "400%", "control": control, "keep_rate": True, **PLAIN}
    rankpilot.attach(trainer, "uniform", **piloted)
    trainer.train()
    return trainer


def assert_whole(folder: Path) -> None:
    for path in folder.glob("checkpoint-*/adapter_model.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(path).values()), path


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_trainer_under_control_saves_nothing_broken(llama_config: LlamaConfig, tmp_path: Path, at: int) -> None:
    trainer = train(llama_config, tmp_path, {at}, control=True)
    assert len([*tmp_path.glob("checkpoint-*")]) == 6
    assert_whole(tmp_path)
    assert trains_finite(trainer.optimizer, moments=True)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2] * (at + 1) + [5e-3] * (5 - at)), "those of the steps"


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_trainer_without_control_ends_and_keeps_the_last_good_checkpoint(
    llama_config: LlamaConfig, tmp_path: Path, at: int
) -> None:
    last = f"The last checkpoint is {tmp_path / f'checkpoint-{at}'}." if at else "No checkpoint is overwritten."
    with pytest.raises(NonFiniteError, match=f"After step {at + 1} .* {re.escape(last)}"):
        train(llama_config, tmp_path, {at}, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{at}"] * bool(at)
    assert_whole(tmp_path)
    assert f"non-finite up to step {at + 1}," in verdict(read_run(tmp_path)).warnings[0]


def test_a_gradient_alone_is_found_before_the_checkpoint(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its loss is finite, and that of the next step comes too late for the checkpoint in between."""

    def broken(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = step(self, model, inputs, *rest, **options)
        if self.state.global_step == 3:
            one_inf(model)
        return loss

    step = BreakingTrainer.training_step
    monkeypatch.setattr(BreakingTrainer, "training_step", broken)
    with pytest.raises(NonFiniteError, match=r"After step 4 .*checkpoint-3"):
        train(llama_config, tmp_path, set(), save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_an_evaluation_that_is_not_finite_is_never_the_best(llama_config: LlamaConfig, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = train(llama_config, tmp_path, {3}, control=True, evaluations={1, 5, 6}, **options)
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert {step for step, loss in losses.items() if math.isnan(loss)} == {1, 5, 6}
    assert trainer.state.best_metric == min(loss for loss in losses.values() if math.isfinite(loss))
    assert trains_finite(trainer.optimizer)


# A run that goes on from a checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("actions", "saved", "at"), [
    ((CHANGES.index(1.0), CHANGES.index(-1.0), UNDO), MOMENTS[2], set()),
    ((CHANGES.index(1.0), CHANGES.index(-1.0), UNDO), MOMENTS[1] + 1, set()),
    ((CHANGES.index(1.0),), 8, {8}),
    ((), 8, {7, 9}),
])  # fmt: skip
def test_a_resumed_run_undoes_what_the_whole_one_undoes_bit_for_bit(
    llama_config: LlamaConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    actions: tuple[int, ...],
    saved: int,
    at: set[int],
) -> None:
    scripted(monkeypatch, *actions)
    monkeypatch.setattr(Breaking, "total", STEPS if actions else 12)
    whole = Breaking(llama_config, 1e-3, log=tmp_path / "log").begin().breaks(at, all_nan, saved)
    save_loop(whole.pilot, whole.run, tmp_path / "checkpoint")
    more = min(whole.total - saved, 10)
    whole.breaks({step - saved for step in at}, all_nan, more)
    moves = (tmp_path / "log" / "control.jsonl").read_text()
    scripted(monkeypatch, *actions[sum(moment < saved for moment in MOMENTS) :])
    again = Breaking(llama_config, 1e-3, log=tmp_path / "log")
    for _ in range(saved):
        next(again.batches)
    load_loop(again.pilot, again.run, tmp_path / "checkpoint")
    again.breaks({step - saved for step in at}, all_nan, more)
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), again.state(), strict=True))
    assert again.pilot._piloted.rate.of_plan.factor == whole.pilot._piloted.rate.of_plan.factor
    assert (tmp_path / "log" / "control.jsonl").read_text() == moves
