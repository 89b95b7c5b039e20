"""Ends a Trainer's run early, with a checkpoint from which it goes on."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.processes import Processes
from ..common.termination import Terminated, is_unhandled, on_sigterm, terminate

logger = logging.getLogger(__name__)


class StopWithCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint after the step that runs when `stop` is called, and ends the training there.

    Args:
        processes: of the run; where `stop` is called in one of them, all end after the same step.

    Attributes:
        stopped: whether `stop` was called.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.stopped: bool = False
        self._processes = processes or Processes()
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
        self.stopped = bool(self._processes.most(self.stopped)[0])
        if self.stopped:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """All steps are done and saved."""
        self._stepping = False


class StopOnSigterm(StopWithCheckpoint):
    """Handles SIGTERM while a Trainer's run lasts: a checkpoint after the step that runs, and exit status 143.

    It is the last of the Trainer's callbacks, so that trackers have ended when it raises Terminated.

    Args:
        trainer: the Trainer whose run begins.
        processes: of the run.
    """

    def __init__(self, trainer: Trainer, processes: Processes) -> None:
        super().__init__(processes)
        self._trainer, self._handling = trainer, ExitStack()
        self._handling.enter_context(on_sigterm(self.stop))
        trainer.callback_handler.callbacks.append(self)

    @classmethod
    def unless_handled(cls, trainer: Trainer, processes: Processes) -> StopOnSigterm | None:
        """Handle SIGTERM for this Trainer; None if somebody does, such as its just-in-time checkpoint."""
        return cls(trainer, processes) if is_unhandled() else None

    def release(self) -> None:
        """Handle SIGTERM no more."""
        self._handling.close()
        callbacks = self._trainer.callback_handler.callbacks
        callbacks[:] = [one for one in callbacks if one is not self]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """End the process, if asked.

        Raises:
            Terminated: SIGTERM came.
        """
        self.release()
        if self.stopped:
            logger.warning(
                "Ended by SIGTERM after step %d, with a checkpoint: resume_from_checkpoint=True goes on from it.",
                state.global_step,
            )
            raise Terminated
