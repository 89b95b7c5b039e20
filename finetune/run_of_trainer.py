"""The run that a Trainer would begin, found without training."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .callback import run_of
from .run import TrainingRun
from .trainer_step import TrainerStep


def run_of_trainer(trainer: Trainer) -> TrainingRun:
    """The run that `trainer.train()` would begin: its step, its optimiser and its data.

    The Trainer is ready to run steps afterwards, and its own callbacks have heard of nothing.
    """
    handler, finder = trainer.callback_handler, _Finder(trainer)
    callbacks, handler.callbacks = handler.callbacks, [finder]  # alone, so that no tracker opens a run
    try:
        trainer.train()
    except _FoundError:
        return finder.run
    finally:
        handler.callbacks = callbacks
    raise AssertionError("training begins with an event")


class _FoundError(Exception):
    """Ends `Trainer.train` before the first step."""


class _Finder(TrainerCallback):  # type: ignore[misc]
    """Notes the run that begins, and ends it."""

    run: TrainingRun

    def __init__(self, trainer: Trainer) -> None:
        self._step = TrainerStep(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        self.run = run_of(self._step, args, state, objects)
        raise _FoundError
