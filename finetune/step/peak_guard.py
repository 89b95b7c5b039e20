"""Monitoring of a run's steps: their peaks, their batches, and gradients kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...common.checks import counted, finite
from ...common.errors import BudgetError, UnsupportedError
from ...common.text import format_bytes
from ...cost.batch_shape import Batch
from ...cost.cost import plan_cost
from ...cost.model import MemoryModel
from ...cost.record.model_states import excess_of_state
from ...cost.record.peak_meter import PeakMeter, StepBatches, likely_cause
from ...cost.recording import BatchShape
from ...cost.savers.checkpointed_layers import LayerCheckpointing, settings_put_back
from ...cost.savers.exact import is_compiled
from ...decide.applier import PlanApplier
from .evaluated_parts import EvaluatedParts
from .journal import Journal, PlanChange
from .parts import StepParts
from .plan_keeper import PlanKeeper, PlanState
from .run import Participant, TrainingRun
from .shortage import Shortage


class PeakGuard(Participant):
    """Watches one run. Under a budget of bytes it corrects the plan.

    A step is measured after each change of ranks, and every `every_steps` steps. A peak above the budget corrects the
    prediction by the error, and the plan with it. The cost of a batch larger than all earlier ones is predicted before
    the model sees it.

    Args:
        every_steps: see `PeakMeter`.
        tell: called with lines of `StepParts`.
        fewest: see `StepParts`.

    Attributes:
        meter: measures the steps.
        plan: keeps the plan inside the budget.
        shortage: shrinks the plan while memory is short, and restores it.
        parts: runs steps in parts.
        evaluated: runs evaluations in parts.
        evaluation_share: the peak of the latest evaluation as a share of the budget; 0 before the first.
        checks: (step, predicted bytes, measured bytes) of the first measured step after each change of ranks.
    """

    def __init__(self, every_steps: int, tell: Callable[[str], None], *, fewest: bool = False) -> None:
        self.meter: PeakMeter = PeakMeter(every_steps)
        self.plan: PlanKeeper = PlanKeeper(self.meter)
        self.shortage: Shortage = Shortage(self.plan)
        self.parts: StepParts = StepParts(self.plan, tell, fewest=fewest)
        self.evaluated: EvaluatedParts = EvaluatedParts(self.parts, tell)
        self.checks: list[tuple[int, float, int]] = []
        self.evaluation_share: float = 0.0
        self._step_shape, self._batches = BatchShape(0, 0), StepBatches(0)
        self._keeps_gradients: bool | None = None  # through the forward pass; None if not checked yet

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state in a resumed run; call this before the plan is attached."""
        if state is None:
            return
        own = state["guard"]
        self.plan.now = PlanState.from_state(own)
        self.meter.history = [(counted(step), counted(peak)) for step, peak in own["peaks"]]
        self.meter.requested = self.plan.now.unchecked
        self.checks = [(counted(step), finite(cost), counted(peak)) for step, cost, peak in own["checks"]]

    def state(self) -> dict[str, Any]:
        """Return the state for `begin`, as tensors and JSON values."""
        measured = {"peaks": list(self.meter.history), "measure_next": self.meter.requested}
        own = {**self.plan.now.state(), **measured, "checks": list(self.checks)}
        return {"guard": own, "checkpointed": list(self.plan.checkpointed)}

    def end(self) -> None:
        """Stop measuring."""
        self.meter.close()

    def attach(
        self,
        run: TrainingRun,
        applier: PlanApplier[Any],
        memory: MemoryModel | None,
        journal: Journal,
        corrected: Callable[[PlanChange], None],
        checkpointing: LayerCheckpointing | None,
    ) -> None:
        """Start keeping the plan, priced with one row if steps run in parts; see `PlanKeeper.attach`."""
        if self.parts.on:
            self.parts.begin_to_keep(run)
        shape = memory.shape if memory else None
        if shape and self.parts.on:
            largest = run.measured(lambda: self.parts.shape_of(run.largest_batch()))
            shape = run.replicas.largest_shape([largest])
        self.plan.attach(run, applier, memory, journal, corrected, checkpointing, shape=shape)

    # A step -----------------------------------------------------------------------------------------------------------

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Inspect the batches of the next step, and measure it if due."""
        run, plan = self.plan.run, self.plan
        plan.step, self._step_shape = step, run.replicas.largest_shape(map(self.parts.shape_of, batches))
        if plan.now.unchecked:
            self._batches = StepBatches.of(batches)
        if self._keeps_gradients is None and plan.now.limits_bytes and self._gradients_stay():
            self._watch_gradients()
        if plan.checkpointing:
            plan.checkpointing.before_step()
        larger = plan.now.shape.joined(self._step_shape)
        if larger != plan.now.shape:
            if plan.now.limits_bytes:
                self.shortage.keep()
            self._larger_batch(batches, larger)
        if self.meter.due(step):
            held, signals = run.replicas.begin_measuring(), plan.applier.adapters.meter
            # Signal buffers are allocated in the first step of an interval, and kept.
            self.meter.begin(run.model, run.optimizer, held, lambda: signals.buffer_bytes)

    def _larger_batch(self, batches: Sequence[Batch], shape: BatchShape) -> None:
        """Make the plan fit a larger shape."""
        try:
            self.plan.larger_batch(batches, shape)
        except BudgetError as error:
            if not self.parts.on:
                raise
            line = self.parts.longest_row(batches)
            raise BudgetError(f"{line} Cut rows to that length, or raise the budget.") from error

    def out_of_memory(self, error: torch.OutOfMemoryError) -> None:
        """Prepare to repeat a step that ran out of memory, in smaller parts if possible.

        Raises:
            torch.OutOfMemoryError, BudgetError: see `Shortage.out_of_memory`.
        """
        if not self.parts.shrink():
            alone = self.parts.alone()
            try:
                self.shortage.out_of_memory(error)
            except torch.OutOfMemoryError as last:
                if alone:
                    last.add_note(alone)
                raise
            return
        self.shortage.drop_step(error)
        self.plan.run.warn("Step %d ran out of memory and is retried in smaller parts.", self.plan.step + 1)

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Note that the forward and backward passes of a step did not run out of memory."""
        self.meter.passed()
        self.shortage.passed()

    def after_step(self, step: int) -> None:
        """Compare the peak of the step with its prediction and with the budget, if measured.

        Rank lost to an out-of-memory error comes back here, once memory is free again.

        Raises:
            BudgetError: the peak is above the budget, and no plan with an adapter fits the corrected prediction.
        """
        plan = self.plan
        plan.step = step
        if self._keeps_gradients and not self.plan.run.step.accumulates:
            self.meter.end(step)
            plan.count_gradients()
        peak = self.meter.end(step)
        if peak is not None and plan.now.limits_bytes:
            predicted = self._predicted()
            cause = self._check(step, peak, predicted) if plan.now.unchecked else ""
            if peak > plan.applier.limit:
                plan.above(peak, cause, predicted if self.parts.on else None)
            elif cause:
                plan.run.warn("The peak of step %d was %s, %s", step, format_bytes(peak, up=True), cause)
        self.shortage.give_back_if_room()

    def _predicted(self) -> float | None:
        """Return the predicted peak bytes of the step; None if its shape is unknown."""
        plan, applier = self.plan, self.plan.applier
        (of_parts,) = plan.run.replicas.processes.most(self.parts.predicted()) if self.parts.on else (0.0,)
        if of_parts:  # from the process whose parts take the most, as for the peak
            return of_parts + plan.now.underestimate - plan.unpaid(applier.ranks)
        cost = applier.cost
        if self._step_shape != plan.now.shape:  # a smaller batch than planned for
            try:
                cost = plan.now.cost_of(self._step_shape)
            except UnsupportedError:
                return None
        return plan_cost(applier.cost_now(cost), applier.ranks)

    def _check(self, step: int, peak: int, predicted: float | None) -> str:
        """Compare the first measured step after a change of ranks with its prediction.

        Returns:
            The prediction and the likely cause if they differ by more than the margin, else nothing.
        """
        plan, applier = self.plan, self.plan.applier
        plan.update(unchecked=False)
        if predicted is None:
            return ""
        if not plan.now.underestimate:  # added to a cost that includes the excess
            predicted -= excess_of_state(applier.targets, self.plan.run.optimizer)
        self.checks.append((step, predicted, peak))
        if peak < predicted and self.parts.on:  # rows without padding, such as a single one, need no mask
            return ""
        return likely_cause(peak, predicted, self._batches, self.plan.run.accumulation)

    # Outside the steps ------------------------------------------------------------------------------------------------

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude code inside from the step, such as generation of answers: no layer is checkpointed there."""
        with settings_put_back(self.plan.run.model), self.meter.aside():
            if self.plan.checkpointing:
                self.plan.checkpointing.pause()
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure an evaluation, and set `evaluation_share` to its share of the budget."""
        if self.plan.now.limits_bytes:
            self.meter.begin(self.plan.run.model, self.plan.run.optimizer, self.plan.run.replicas.begin_measuring())
        try:
            yield
        except BaseException:
            self.meter.close()
            raise
        peak = self.meter.end_other()
        if peak is not None:
            self.evaluation_share = peak / self.plan.applier.limit
            if self.evaluation_share > 1:
                self.evaluated.shrink(self.evaluation_share)

    # Gradients --------------------------------------------------------------------------------------------------------

    def _gradients_stay(self) -> bool:
        """True if the adapters currently hold gradients."""
        targets = self.plan.applier.targets
        return any(p.grad is not None for target in targets for p in target.parameters.values())

    def _watch_gradients(self) -> None:
        """Check whether gradients of the last step are kept into the next forward pass, or cleared before it."""
        run, self._keeps_gradients = self.plan.run, False
        if run.step.accumulates or is_compiled(run.wrapped):  # already counted, or hooks would be compiled
            return

        def seen(*_: Any) -> None:
            handle.remove()
            self._keeps_gradients = self._gradients_stay()

        handle = run.wrapped.register_forward_pre_hook(seen)
