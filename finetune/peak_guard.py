"""Keeps a run within its budget: measures real steps, looks at every batch, and shrinks the plan if needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..allocation.controller import RankController
from ..allocation.plan import check_budget, least_ranks
from ..common.arrays import IntArray
from ..common.stored_numbers import counted, finite
from ..common.units import format_bytes
from ..data.batches import unknown_lengths
from ..errors import BudgetError, UnsupportedError
from ..lora.signals import signal_buffer_bytes
from ..memory.batch_shape import BatchShape, reshaped
from ..memory.budget import Budget
from ..memory.calibration import highest_ranks, measure_memory
from ..memory.cost import ByteCost, plan_cost
from ..memory.model import MemoryModel
from ..memory.model_states import excess_of_state
from ..memory.peak_meter import PeakMeter
from ..memory.recording import Batch
from .correction import Correction
from .peak_cause import StepBatches, likely_cause
from .recomputation import Recomputation
from .run import TrainingRun

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_SHARE = 0.9
"""After an out-of-memory error the plan may cost this share of what it cost, or half of what its adapters cost if that
is more: where most of the cost is the same under every plan, less would be no adapter at all."""


class PeakGuard:
    """Watches one run. Under a budget of bytes it also corrects the plan.

    A step is measured after each change of ranks, and every `every_steps` steps. A peak above the budget corrects the
    prediction by the error. Then the last change is rolled back, as far as the plan before it fits the corrected
    prediction; if there is no plan before it, the plan shrinks. The cost of a batch that is larger than all batches
    before it is predicted before the model sees it. Where layers may run again in the backward pass, more of them do
    before the plan changes. A plan without any adapter is never the result: where nothing else fits, the run stops with
    `BudgetError`.

    Args:
        every_steps: see `PeakMeter`.

    Attributes:
        meter: measures the steps.
        shape: the largest number of rows and the largest length of a batch so far.
        evaluation_share: the peak of the latest evaluation as a share of the budget; 0 before the first.
        checks: (step, predicted bytes, measured bytes) of the first measured step after each change of ranks.
    """

    def __init__(self, every_steps: int) -> None:
        self.meter: PeakMeter = PeakMeter(every_steps)
        self.shape: BatchShape = BatchShape(0, 0)
        self.checks: list[tuple[int, float, int]] = []
        self.evaluation_share: float = 0.0
        self._step_shape, self._batches = BatchShape(0, 0), StepBatches(0)
        self._unchecked = True
        self._underestimate = 0.0
        self._before: IntArray | None = None
        self._step = 0
        self._recomputation: Recomputation | None = None

    def attach(
        self,
        run: TrainingRun,
        controller: RankController[Any],
        memory: MemoryModel | None,
        corrected: Callable[[Correction], None],
        recomputation: Recomputation | None = None,
    ) -> None:
        """Begin to watch.

        Args:
            run: the run; its optimiser's state is mapped to new ranks.
            controller: changes the ranks.
            memory: predicts the cost of other batch shapes; if it is None, it is made when it is needed.
            corrected: called with each correction.
            recomputation: chooses the layers that run again; `memory` is of the step in which all do.
        """
        self._run, self._controller, self._memory, self._corrected = run, controller, memory, corrected
        self._recomputation, self.meter.highest = recomputation, run.replicas.highest
        if memory:
            self.shape = self.shape.joined(memory.shape)
            if recomputation:
                recomputation.memory, self._memory = memory, memory.recomputing(recomputation.layers)
                if controller.time:
                    controller.time.layers = self._fewest

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the layers that were chosen to run again."""
        return self._recomputation.layers if self._recomputation else ()

    def finish(self) -> None:
        """Stop measuring, and set the model's layers as they were."""
        self.meter.close()
        if self._recomputation:
            self._recomputation.put_back()

    def remark(self) -> str:
        """How many layers run again and what a step takes in time, for people; nothing where neither is limited."""
        time, ranks = self._controller.time, self._controller.ranks
        parts = [str(self._recomputation or ""), time.text(ranks) if time else ""]
        return ", ".join(filter(None, parts))

    def deciding(self, *, recomputing: bool = True) -> None:
        """Price plans for a decision, where layers may run again; see `recomputed_cost`.

        Args:
            recomputing: whether they may in this decision.
        """
        if self._recomputation and self._recomputation.memory:
            controller = self._controller
            highest = highest_ranks(controller.targets)
            cost = self._recomputation.cost(highest, controller.limit, self.shape, recomputing=recomputing)
            controller.reprice(replace(cost, constant=cost.constant + self._underestimate))

    @property
    def _limits_bytes(self) -> bool:
        return isinstance(self._controller.cost, ByteCost)

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Look at the batches of the step that begins, and measure it if it is due."""
        self._step = step
        self._step_shape = self._run.replicas.largest_shape(batches)
        if self._unchecked:
            self._batches = StepBatches.of(batches)
        larger = self.shape.joined(self._step_shape)
        if larger != self.shape:
            self.shape = larger
            if self._limits_bytes:
                self._larger_batch(batches, larger)
        controller = self._controller
        if self.meter.due(step):
            held, signals = self._run.replicas.begin_measuring(), controller.adapters.meter
            # Signal buffers are made in the first step of an interval, and stay.
            self.meter.begin(self._run.model, self._run.optimizer, held, lambda: signals.buffer_bytes)

    def after_step(self, step: int) -> None:
        """Compare the peak of the step with its prediction and with the budget, if it was measured.

        Raises:
            BudgetError: the peak is above the budget, and no plan with an adapter fits the corrected prediction.
        """
        self._step = step
        peak = self.meter.end(step)
        if peak is None or not self._limits_bytes:
            return
        controller = self._controller
        ranks = controller.ranks
        cause = self._check(step, peak, ranks) if self._unchecked else ""
        if peak <= controller.limit:
            if cause:
                self._warn("The peak of step %d was %s, %s", step, format_bytes(peak, up=True), cause)
            return
        error = max(peak - plan_cost(controller.cost_now(), ranks), 0.0)
        self._underestimate += error
        assert isinstance(controller.cost, ByteCost)
        controller.reprice(replace(controller.cost, constant=controller.cost.constant + error))
        before = ranks if self._before is None else self._before
        back = not np.array_equal(before, ranks)
        text = (
            f"The peak of step {step} was {format_bytes(peak, up=True)}, above the budget of "
            f"{format_bytes(controller.limit)}"
        )
        text = f"{text}, {cause}" if cause else f"{text}."
        if self._relieved(text):
            return
        self._check_possible(f"{text} With the prediction corrected by that, no adapter fits.")
        self._warn("%s The plan is %s.", text, "rolled back" if back else "shrunk by the difference")
        self._correct("rolled back: peak above the budget" if back else "shrunk: peak above the budget", before)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure an evaluation; `evaluation_share` tells afterwards how much of the budget it took."""
        if self._limits_bytes:
            self.meter.begin(self._run.model, self._run.optimizer, self._run.replicas.begin_measuring())
        try:
            yield
        except BaseException:
            self.meter.close()
            raise
        peak = self.meter.end_other()
        if peak is not None:
            self.evaluation_share = peak / self._controller.limit

    def out_of_memory(self) -> None:
        """Shrink the plan after a step that ran out of memory, so that the step can be taken again.

        Raises:
            BudgetError: no smaller plan is possible, or other processes are in the middle of the step.
        """
        controller = self._controller
        self.meter.close()
        self.meter.request()
        cost = plan_cost(controller.cost_now(), controller.ranks)
        every = self._recomputation.memory if self._recomputation else None  # all layers may run again
        cheapest = self._cost_of_shape(self.shape, every) if every else None
        least = plan_cost(controller.cost_now(cheapest), least_ranks(controller.problem_now()))
        if cost <= least:
            raise BudgetError(
                f"Step {self._step + 1} ran out of memory, and no smaller plan is possible. Lower the batch size or "
                "the length, or use checkpointing."
            )
        controller.limit = min(controller.limit, max(OUT_OF_MEMORY_SHARE * cost, (cost + least) / 2))
        self._run.replicas.check_again(self._step + 1, Budget(controller.cost.unit, controller.limit))
        if self._relieved(f"Step {self._step + 1} ran out of memory, and is taken again."):
            return
        self._warn(
            "Step %d ran out of memory. The plan shrinks to %.0f %% of its cost, and the step is taken again.",
            self._step + 1,
            100 * controller.limit / cost,
        )
        self._correct("shrunk: out of memory", controller.ranks)

    def new_limit(self, limit: float, step: int) -> None:
        """Take another limit, and shrink the plan if it no longer fits.

        Args:
            limit: what a plan may cost.
            step: the optimiser steps done.

        Raises:
            BudgetError: no plan fits.
        """
        controller = self._controller
        controller.limit, self._step = limit, step
        if self._relieved("The budget or the time was changed."):
            return
        if not controller.fits():
            self._check_possible("The budget or the time was changed.")
            self._correct("shrunk: another budget or time", controller.ranks)

    def decided(self, before: IntArray, step: int) -> None:
        """Note that a decision has changed the ranks.

        Args:
            before: the ranks before it, int64 (modules,).
            step: the optimiser steps before it.
        """
        self._before = before if step > 0 else None  # the first plan follows no plan
        self._settle()
        if self._limits_bytes:
            self._measure_next()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue, as tensors and JSON values."""
        before = {} if self._before is None else {"before": torch.from_numpy(self._before.copy())}
        return {
            "rows": self.shape.rows,
            "length": self.shape.length,
            "underestimate": self._underestimate,
            "peaks": list(self.meter.history),
            "measure_next": self.meter.requested,
            "checks": list(self.checks),
            **before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; call this before `attach`."""
        self.shape = BatchShape(counted(state["rows"]), counted(state["length"]))
        self._underestimate = finite(state["underestimate"])
        self.meter.history = [(counted(step), counted(peak)) for step, peak in state["peaks"]]
        self.meter.requested = self._unchecked = bool(state.get("measure_next", True))
        self.checks = [(counted(step), finite(cost), counted(peak)) for step, cost, peak in state["checks"]]
        self._before = state["before"].numpy().copy() if "before" in state else None

    def _warn(self, text: str, *values: object) -> None:
        if self._run.replicas.processes.first:  # all processes come to the same
            logger.warning(text, *values)

    def _measure_next(self) -> None:
        self.meter.request()
        self._unchecked = True

    def _check(self, step: int, peak: int, ranks: IntArray) -> str:
        """Hold the first measured step after a change of ranks against its prediction.

        Returns:
            The prediction and the likely cause if they differ by more than the margin, else nothing.
        """
        self._unchecked = False
        controller = self._controller
        cost = controller.cost
        if self._step_shape != self.shape:  # a smaller batch than the plan was made for
            try:
                cost = self._cost_of_shape(self._step_shape)
            except UnsupportedError:
                return ""
        predicted = plan_cost(controller.cost_now(cost), ranks)
        if not self._underestimate:  # which is beside the cost with the excess
            predicted -= excess_of_state(controller.targets, self._run.optimizer)
        self.checks.append((step, predicted, peak))
        return likely_cause(peak, predicted, self._batches, self._run.accumulation)

    def _cost_of_shape(self, shape: BatchShape, memory: MemoryModel | None = None) -> ByteCost:
        memory = memory or self._memory
        if memory is None:
            raise UnsupportedError("This run was resumed, and has no byte model.")
        cost = memory.cost(shape)
        return replace(cost, constant=cost.constant + self._underestimate)

    def _larger_batch(self, batches: Sequence[Batch], shape: BatchShape) -> None:
        """Predict the cost of the new shape, and shrink the plan if it no longer fits, before the model runs."""
        controller = self._controller
        self._measure_next()
        try:
            cost = self._cost_of_shape(shape)
        except UnsupportedError:  # the byte model predicts the shape of its calibration alone
            logger.debug("Calibrating anew for %s.", shape)
            longest = max(batches, key=lambda batch: BatchShape.of(batch).length, default=None)
            self._measure_again(longest, shape)
            cost = self._cost_of_shape(shape)
        controller.reprice(cost)
        text = f"A batch of {shape} came, larger than the memory was planned for."
        if controller.fits():
            self._warn("%s The plan still fits.", text)
        elif not self._relieved(text):
            self._check_possible(text + unknown_lengths(self._run.dataset))
            self._warn("%s The plan is shrunk.", text)
            self._correct(f"shrunk: batch of {shape}", controller.ranks)

    def _measure_again(self, batch: Batch | None, shape: BatchShape) -> None:
        run, targets = self._run, self._controller.targets
        if self._recomputation:
            self._recomputation.all()

        def measure() -> MemoryModel:
            # The largest rows and the largest length so far may be of two batches, or of another process.
            largest = run.largest_batch() if batch is None else run.on_device(batch)
            whole = reshaped(largest, shape, run.step.rows_per_example)
            return measure_memory(run.step, targets, whole, signals=True)

        self._memory = run.measured(measure)
        run.replicas.changed(targets, self._step)
        if self._recomputation:
            self._recomputation.memory = self._memory
            self._settle()

    def _settle(self) -> bool:
        """Let the fewest layers run again with which the plan fits; whether it does now."""
        controller = self._controller
        if self._recomputation:
            self._recomputation.take(self._fewest(controller.ranks))
            self._memory = self._recomputation.memory_now()
            controller.reprice(self._cost_of_shape(self.shape))
        return controller.fits()

    def _fewest(self, ranks: IntArray) -> tuple[str, ...]:
        """The layers that must run again under a plan."""
        assert self._recomputation
        controller = self._controller
        # After the last decision signals take nothing, and the byte model counts them still.
        buffers = signal_buffer_bytes(controller.targets) @ ranks if controller.finished else 0.0
        room = controller.limit - self._underestimate + float(buffers)
        return self._recomputation.fewest(ranks, room, self.shape)

    def _relieved(self, reason: str) -> bool:
        """Whether the plan fits, because other layers run again from now on."""
        before = self.recomputed
        if self._recomputation is None or not self._settle():
            return False
        if before != self.recomputed:
            self._measure_next()
            self._warn("%s Now %s, and the plan stays.", reason, self._recomputation)
        return True

    def _check_possible(self, context: str) -> None:
        """Raise BudgetError, with its context, if no plan with an adapter fits."""
        try:
            check_budget(self._controller.problem_now(), list(self._controller.names))
        except BudgetError as error:
            raise BudgetError(f"{context} {error}") from error

    def _correct(self, reason: str, wanted: IntArray) -> None:
        """Bring the ranks within the limit, as near to the wanted ranks as it allows."""
        controller, step = self._controller, self._step
        observation = controller.observation_now(step)
        plan = controller.correct(wanted, step, self._run.optimizer)
        self._settle()
        self._before = None
        self._measure_next()
        self._corrected(Correction(step, reason, wanted, observation, plan))
