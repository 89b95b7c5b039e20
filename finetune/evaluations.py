"""The evaluations of a Trainer's run: one of each batch size is measured, and the next ones keep within the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from .pilot import RankPilot

logger = logging.getLogger(__name__)

EVALUATION_ROOM = 0.5
"""The share of the budget for which the batch of an evaluation is made anew, since not all of it shrinks with it."""


class Evaluations:
    """Runs the evaluations of one run.

    Args:
        trainer: whose `per_device_eval_batch_size` may shrink.
        pilot: knows the budget.
    """

    def __init__(self, trainer: Trainer, pilot: RankPilot) -> None:
        self._trainer, self._pilot = trainer, pilot
        self._measured, self._own = 0, 0  # batch sizes; 0 for none

    def run(self, evaluate: Callable[[], Any]) -> Any:
        """Run an evaluation, and measure the first one with its batch size."""
        rows = self._trainer.args.per_device_eval_batch_size
        if rows == self._measured:
            return evaluate()
        self._measured = rows
        with self._pilot.evaluation():
            result = evaluate()
        share = self._pilot.evaluation_share
        if share > 1 and rows > 1:
            self._own = self._own or rows
            self._have(max(1, int(EVALUATION_ROOM * rows / share)))
            logger.warning(
                "An evaluation with batches of %d took %.0f %% of the budget: the next one has batches of %d.",
                rows,
                100 * share,
                self._trainer.args.per_device_eval_batch_size,
            )
        return result

    def put_back(self) -> None:
        """Let evaluations after the run have the batches that their user chose."""
        if self._own:
            self._have(self._own)
        self._own = 0

    def _have(self, rows: int) -> None:
        """Have batches of so many rows from the next evaluation on, also where the Trainer keeps its loaders."""
        self._trainer.args.per_device_eval_batch_size = rows
        vars(self._trainer).pop("_eval_dataloaders", None)
