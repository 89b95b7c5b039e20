"""Ends a Trainer's run early, with a checkpoint from which it goes on."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.termination import terminate


class StopWithCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint after the step that runs when `stop` is called, and ends the training there.

    Attributes:
        stopped: whether `stop` was called.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._stepping = False

    def stop(self) -> None:
        """Ask for the end.

        Raises:
            Terminated: no step runs, so there is nothing to save; or this is the second call.
        """
        if self.stopped or not self._stepping:
            terminate()
        self.stopped = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """From now on there are steps that a checkpoint can keep."""
        self._stepping = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Let the Trainer save and end, if asked."""
        if self.stopped:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """All steps are done and saved."""
        self._stepping = False
