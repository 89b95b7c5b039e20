"""Monitoring of a run's steps: their peaks, their batches, and gradients kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...common.checks import counted, finite
from ...common.errors import BudgetError, UnsupportedError
from ...common.text import format_bytes
from ...cost.batch_shape import Batch, follows_rows, picture_values, reshaped, shape_of
from ...cost.cost import ByteCost, plan_cost
from ...cost.model import MemoryModel
from ...cost.moments import Evaluation
from ...cost.record.calibration import measure_memory
from ...cost.record.model_states import excess_of_state
from ...cost.record.peak_meter import PeakMeter, StepBatches, likely_cause
from ...cost.recording import BatchShape
from ...cost.savers.checkpointed_layers import LayerCheckpointing, settings_put_back
from ...cost.savers.exact import is_compiled
from ...data.batches import unknown_lengths
from ...decide.applier import PlanApplier
from .journal import Journal, PlanChange
from .parts import StepParts
from .plan_keeper import PlanKeeper, PlanState
from .run import Participant, TrainingRun
from .shortage import Shortage


class RisenCosts:
    """Makes the plan fit again after its costs rose.

    Args:
        plan: keeps the plan.
    """

    def __init__(self, plan: PlanKeeper) -> None:
        self._plan = plan

    def larger_batch(self, batches: Sequence[Batch], shape: BatchShape, *, pictures: bool = False) -> None:
        """Predict costs for batches larger than all earlier ones, and shrink the plan if it no longer fits.

        Args:
            batches: the batches of the next step; the model has not seen them.
            shape: the largest number of rows and the largest length of any batch so far, including these.
            pictures: True if one of the batches has more or larger pictures than all earlier ones.
        """
        plan = self._plan
        plan.update(shape=shape)
        if not plan.now.limits_bytes:
            return
        plan.measure_next()
        if pictures:
            self.measure_again(max(batches, key=picture_values), shape)
        try:
            cost = plan.now.cost_of(shape)
        except UnsupportedError:  # the byte model predicts only the shape of its calibration
            longest = max(batches, key=lambda batch: shape_of(batch).length, default=None)
            self.measure_again(longest, shape)
            cost = plan.now.cost_of(shape)
        plan.update(cost=cost)
        text = f"A batch of {shape} is larger than any planned for."
        self._fit(text, f"batch of {shape}", unknown_lengths(plan.run.dataset))

    def count_gradients(self) -> None:
        """Add the bytes of gradients to every moment of a step, because the loop keeps them between steps."""
        plan = self._plan
        plan.run.keep_gradients()
        if recorded := plan.now.recorded:
            plan.reprice(recorded=replace(recorded, accumulates=True))
        else:
            self.measure_again(None, plan.now.shape)
        text = "Gradients are kept during the next forward pass; optimizer.zero_grad() before it frees their memory."
        self._fit(text, "gradients stay")

    def above(self, peak: int, cause: str, predicted: float | None = None) -> None:
        """Correct the prediction after a measured peak above the limit, and make the plan fit again.

        The ranks return to those before the last decision, reduced if necessary to fit the corrected prediction.
        Without an earlier decision, they shrink.

        Args:
            peak: the measured peak of the step, in bytes.
            cause: why the peak exceeds the prediction, for people; empty if unknown.
            predicted: the predicted peak of the step, in bytes; defaults to the cost of the plan.

        Raises:
            BudgetError: no plan with an adapter fits the corrected prediction.
        """
        plan, applier, now = self._plan, self._plan.applier, self._plan.now
        ranks, cost = applier.ranks, applier.cost
        error = max(peak - (plan_cost(applier.cost_now(), ranks) if predicted is None else predicted), 0.0)
        assert isinstance(cost, ByteCost)
        plan.update(underestimate=now.underestimate + error, cost=replace(cost, constant=cost.constant + error))
        before = ranks if now.before is None else now.before
        back = not np.array_equal(before, ranks)
        text = (
            f"The peak of step {plan.step} was {format_bytes(peak, up=True)}, above the budget of "
            f"{format_bytes(applier.limit)}"
        )
        text = f"{text}, {cause}" if cause else f"{text}."
        if plan.step == applier.clock.total_steps:
            plan.run.warn("%s It was the last step, so the plan is kept.", text)
        elif not plan.fits_with_checkpointing(text):
            plan.check_possible(f"{text} With the corrected prediction, no adapter fits.")
            plan.run.warn("%s The plan is %s.", text, "rolled back" if back else "shrunk by the difference")
            plan.correct("rolled back: peak above the budget" if back else "shrunk: peak above the budget", before)

    def _fit(self, text: str, cause: str, hint: str = "") -> None:
        """Make the plan fit after costs rose, and report it.

        Args:
            text: what happened; the beginning of the reported line.
            cause: why costs rose, for the decision log.
            hint: further text if no plan fits.
        """
        plan = self._plan
        if plan.applier.fits():
            plan.run.warn("%s The plan still fits.", text)
        elif not plan.fits_with_checkpointing(text):
            plan.check_possible(text + hint)
            plan.run.warn("%s The plan is shrunk.", text)
            plan.correct(f"shrunk: {cause}", plan.applier.ranks)

    def measure_again(self, batch: Batch | None, shape: BatchShape) -> None:
        """Measure the byte model again, with a step of a given shape; with pictures, the costlier model stays.

        Args:
            batch: the batch to measure with, extended to the shape if its rows can be repeated; None for the run's
                largest batch.
            shape: the shape of the measured step.
        """
        plan, run, targets = self._plan, self._plan.run, self._plan.applier.targets
        if plan.checkpointing:
            plan.checkpointing.all()

        def measure() -> MemoryModel:
            # The largest rows and length so far may come from two batches, or from another process.
            largest = run.largest_batch() if batch is None else run.on_device(batch)
            whole = reshaped(largest, shape, run.step.rows_per_example) if follows_rows(largest) else largest
            return measure_memory(run.step, targets, whole, signals=True)

        found, known, ranks = run.measured(measure), plan.now.recorded, plan.applier.ranks
        if batch is not None and picture_values(batch):  # no batch has both the longest texts and the most pictures
            steps = [step if step.predicts(shape) else step.standing_for(shape) for step in (found, known) if step]
            found = max(steps, key=lambda step: step.peak(ranks))
        plan.update(recorded=found)
        run.replicas.changed(targets, plan.step)
        if plan.checkpointing:
            plan.checkpoint_fewest()


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
        costs: makes the plan fit after its costs rose.
        shortage: shrinks the plan while memory is short, and restores it.
        parts: runs steps in parts.
        evaluation_share: the peak of the latest evaluation as a share of the budget; 0 before the first.
        checks: (step, predicted bytes, measured bytes) of the first measured step after each change of ranks.
    """

    def __init__(self, every_steps: int, tell: Callable[[str], None], *, fewest: bool = False) -> None:
        self.meter: PeakMeter = PeakMeter(every_steps)
        self.plan: PlanKeeper = PlanKeeper(self.meter)
        self.costs: RisenCosts = RisenCosts(self.plan)
        self.shortage: Shortage = Shortage(self.plan)
        self.parts: StepParts = StepParts(self.plan, tell, fewest=fewest)
        self.checks: list[tuple[int, float, int]] = []
        self.evaluation_share: float = 0.0
        self._step_shape, self._batches = BatchShape(0, 0), StepBatches(0)
        self._keeps_gradients: bool | None = None  # through the forward pass; None if not checked yet
        self._pictures: int | None = None  # values in those of the largest batch so far; None if not counted yet

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
        larger, pictures = plan.now.shape.joined(self._step_shape), self._has_more_pictures(batches)
        if larger != plan.now.shape or pictures:
            if plan.now.limits_bytes:
                self.shortage.keep()
            self._larger_batch(batches, larger, pictures=pictures)
        if self.meter.due(step):
            held, signals = run.replicas.begin_measuring(), plan.applier.adapters.meter
            # Signal buffers are allocated in the first step of an interval, and kept.
            self.meter.begin(run.model, run.optimizer, held, lambda: signals.buffer_bytes)

    def _has_more_pictures(self, batches: Sequence[Batch]) -> bool:
        """Return whether a batch has more values in its pictures than all before; False with several processes."""
        most, run = max(map(picture_values, batches), default=0), self.plan.run
        if not most or run.replicas.processes.count > 1 or not self.plan.now.limits_bytes:
            return False
        if self._pictures is None:
            self._pictures = run.measured(lambda: picture_values(run.largest_batch()))
        before, self._pictures = self._pictures, max(self._pictures, most)
        return most > before

    def _larger_batch(self, batches: Sequence[Batch], shape: BatchShape, *, pictures: bool) -> None:
        """Make the plan fit a larger shape, or larger pictures."""
        try:
            self.costs.larger_batch(batches, shape, pictures=pictures)
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
        if not self.parts.ran.shrink():
            alone = self.parts.ran.alone()
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
            self.costs.count_gradients()
        peak = self.meter.end(step)
        if peak is not None and plan.now.limits_bytes:
            predicted = self._predicted()
            cause = self._check(step, peak, predicted) if plan.now.unchecked else ""
            if peak > plan.applier.limit:
                self.costs.above(peak, cause, predicted if self.parts.on else None)
            elif cause:
                plan.run.warn("The peak of step %d was %s, %s", step, format_bytes(peak, up=True), cause)
        self.shortage.give_back_if_room()

    def _predicted(self) -> float | None:
        """Return the predicted peak bytes of the step; None if its shape is unknown."""
        plan, applier = self.plan, self.plan.applier
        (of_parts,) = plan.run.replicas.processes.most(self.parts.ran.predicted()) if self.parts.on else (0.0,)
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

    def expected_evaluation(self, rows: int) -> float:
        """Return the predicted peak of an evaluation in batches of `rows`, as a share of the budget; 0 if unknown.

        Its rows are assumed to be as long as those of training. Models with dropout are not predicted, since their
        recorded passes take more than those of an evaluation, nor are logits kept for `compute_metrics`.
        """
        now, applier = self.plan.now, self.plan.applier
        if any(isinstance(module, torch.nn.Dropout) and module.p for module in self.plan.run.model.modules()):
            return 0.0
        shape = BatchShape(rows, now.shape.length)
        known = now.limits_bytes and now.memory is not None and now.memory.predicts(shape)
        return Evaluation(shape).bytes(now.memory, applier.ranks) / applier.limit if known and now.memory else 0.0

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
