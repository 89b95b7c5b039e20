"""Keeps a run within its budget of bytes: measures real steps, looks at every batch, and shrinks the plan if needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..allocation.controller import RankController
from ..allocation.observation import Observation
from ..allocation.plan import Plan, check_budget
from ..common.arrays import IntArray
from ..common.units import format_bytes
from ..errors import UnsupportedError
from ..lora.signals import signal_buffer_bytes
from ..memory.batch_shape import BatchShape, reshaped
from ..memory.cost import ByteCost, plan_cost
from ..memory.for_training import measure_memory
from ..memory.model import MemoryModel
from ..memory.peak_meter import PeakMeter
from ..memory.recording import Batch
from .batch_watch import BatchWatch
from .before_training import undisturbed
from .loss_meter import LossMeter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Correction:
    """A change of ranks that no policy asked for.

    Attributes:
        step: the optimiser steps before it.
        reason: why, for the decision log.
        wanted: ranks of the plan before, the current ones where there was none, int64 (modules,).
        observation: the state of the run before it.
        plan: the new plan.
    """

    step: int
    reason: str
    wanted: IntArray
    observation: Observation
    plan: Plan


class PeakGuard:
    """Watches one run. Under a budget of bytes it also corrects the plan.

    A step is measured after each change of ranks, and every `every_steps` steps. A peak above the budget corrects the
    prediction by the error. Then the last change is rolled back, as far as the plan before it fits the corrected
    prediction; if there is no plan before it, the plan shrinks. The cost of a batch that is larger than all batches
    before it is predicted before the model sees it.

    Args:
        every_steps: see `PeakMeter`.

    Attributes:
        meter: measures the steps.
    """

    def __init__(self, every_steps: int) -> None:
        self.meter = PeakMeter(every_steps)
        self._watch = BatchWatch()
        self._underestimate = 0.0
        self._before: IntArray | None = None
        self._step = 0
        self._optimizer: Any = None

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        controller: RankController[Any],
        memory: MemoryModel | None,
        losses: LossMeter,
        corrected: Callable[[Correction], None],
        *,
        accumulates: bool,
    ) -> None:
        """Begin to watch.

        Args:
            model: the model, as the Trainer calls it.
            optimizer: its state is mapped to new ranks.
            controller: changes the ranks.
            memory: predicts the cost of other batch shapes; if it is None, it is made when it is needed.
            losses: paused while that runs the model.
            corrected: called with each correction.
            accumulates: whether gradients are kept over several micro-batches.
        """
        self._model, self._optimizer, self._controller = model, optimizer, controller
        self._memory, self._losses = memory, losses
        self._corrected, self._accumulates = corrected, accumulates
        if isinstance(controller.cost, ByteCost):
            self._watch.attach(model, memory.shape if memory else self._watch.shape, self._larger_batch)

    def detach(self) -> None:
        """Stop watching."""
        self.meter.close()
        self._watch.detach()

    def before_step(self, step: int) -> None:
        """Measure the step that begins, if it is due."""
        self._step = step
        controller = self._controller
        if self.meter.due(step):
            # Signal buffers are made in the first step of an interval, and stay.
            buffers = 0 if controller.finished else int(signal_buffer_bytes(controller.targets) @ controller.ranks)
            self.meter.begin(self._model, self._optimizer, buffers)

    def after_step(self, step: int) -> None:
        """Compare the peak of the step with the budget, if it was measured."""
        self._step = step
        peak = self.meter.end(step, self._model)
        controller = self._controller
        if peak is None or not isinstance(controller.cost, ByteCost) or peak <= controller.limit:
            return
        problem = controller.problem()
        error = max(peak - plan_cost(problem.cost, problem.ranks), 0.0)
        self._underestimate += error
        controller.reprice(replace(controller.cost, constant=controller.cost.constant + error))
        before = problem.ranks if self._before is None else self._before
        back = not np.array_equal(before, problem.ranks)
        logger.warning(
            "The peak of step %d was %s, above the budget of %s: the plan is %s.",
            step,
            format_bytes(peak, up=True),
            format_bytes(controller.limit),
            "rolled back" if back else "shrunk by the difference",
        )
        self._correct("rolled back: peak above the budget" if back else "shrunk: peak above the budget", before)

    def decided(self, before: IntArray, step: int) -> None:
        """Note that a decision has changed the ranks.

        Args:
            before: the ranks before it, int64 (modules,).
            step: the optimiser steps before it.
        """
        self._before = before if step > 0 else None  # the first plan follows no plan
        if isinstance(self._controller.cost, ByteCost):
            self.meter.request()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue, as tensors and JSON values."""
        shape = self._watch.shape
        before = {} if self._before is None else {"before": torch.from_numpy(self._before.copy())}
        return {
            "rows": shape.rows,
            "length": shape.length,
            "underestimate": self._underestimate,
            "peaks": list(self.meter.history),
            **before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; call this before `attach`."""
        self._watch.shape = BatchShape(state["rows"], state["length"])
        self._underestimate = state["underestimate"]
        self.meter.history = [(int(step), int(peak)) for step, peak in state["peaks"]]
        self._before = state["before"].numpy().copy() if "before" in state else None

    def _larger_batch(self, batch: Batch, shape: BatchShape) -> None:
        """Predict the cost of the new shape, and shrink the plan if it no longer fits, before the model runs."""
        controller = self._controller
        self.meter.close()  # calibration must not count as this step
        self.meter.request()
        cost = self._cost_of(batch, shape)
        controller.reprice(replace(cost, constant=cost.constant + self._underestimate))
        problem = controller.problem()
        fits = problem.fits(problem.ranks)
        logger.warning(
            "A batch of %s came, larger than the memory was planned for. The plan %s.",
            shape,
            "still fits" if fits else "is shrunk",
        )
        if not fits:
            check_budget(problem, list(controller.names))
            self._correct(f"shrunk: batch of {shape}", problem.ranks)

    def _cost_of(self, batch: Batch, shape: BatchShape) -> ByteCost:
        if self._memory is not None:
            try:
                return self._memory.cost(shape)
            except UnsupportedError:  # the byte model predicts the shape of its calibration alone
                logger.debug("Calibrating anew for %s.", shape)
        # The largest rows and the largest length so far may be of two batches.
        batch = reshaped(batch, shape)
        targets = self._controller.targets
        with undisturbed(), self._losses.paused():
            self._memory = measure_memory(
                self._model, targets, batch, self._optimizer, signals=True, accumulates=self._accumulates
            )
        return self._memory.cost()

    def _correct(self, reason: str, wanted: IntArray) -> None:
        """Bring the ranks within the limit, as near to the wanted ranks as it allows."""
        controller, step = self._controller, self._step
        observation = controller.observation_now(step)
        plan = controller.correct(wanted, np.zeros(len(wanted)), step, self._optimizer)
        self._before = None
        self.meter.request()
        self._corrected(Correction(step, reason, wanted, observation, plan))
