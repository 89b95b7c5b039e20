"""Keeps the plan of a run inside its budget: it prices plans, checkpoints layers, and shrinks the plan if needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..common.arrays import IntArray
from ..common.checks import counted, finite
from ..common.text import format_bytes
from ..cost.batch_shape import Batch, reshaped, shape_of
from ..cost.calibration import measure_memory
from ..cost.cost import ByteCost, plan_cost
from ..cost.model import MemoryModel
from ..cost.peak_meter import PeakMeter
from ..cost.recording import BatchShape
from ..data.batches import unknown_lengths
from ..decide.applier import PlanApplier
from ..errors import BudgetError, UnsupportedError
from ..lora.adapters import signal_buffer_bytes
from ..lora.spec import highest_ranks
from ..plan.plan import check_budget, least_cost
from .journal import Journal, PlanChange
from .put_back import CutDirections, LayerCheckpointing
from .run import TrainingRun

logger = logging.getLogger(__name__)

GOOD_STEPS = 20
"""After so many steps without an error a plan comes back, and after twice as many each time that it was no use."""


@dataclass(frozen=True, eq=False)
class PlanReduction:
    """What out-of-memory errors, or a limit that fell, have taken from a plan for a while.

    Attributes:
        ranks: of the plan before the first, int64 (modules,).
        layers: that were checkpointed under it.
        limit: of its cost at that time.
        cost: of that plan, in the unit of the limit.
        saved: what each smaller plan takes less than the one before, in that unit; 0 where none would be a help.
        times: how many times it has shrunk since, 0 to `MOST_TRIES`.
        step: the optimiser steps done at the latest error.
    """

    ranks: IntArray
    layers: tuple[str, ...]
    limit: float
    cost: float
    saved: float
    times: int
    step: int

    def state(self) -> dict[str, Any]:
        """What `from_state` needs, as tensors and JSON values."""
        return {**vars(self), "ranks": torch.from_numpy(self.ranks.copy()), "layers": list(self.layers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PlanReduction:
        """What was taken at the time of `state`."""
        return cls(
            ranks=state["ranks"].numpy().copy(),
            layers=tuple(state["layers"]),
            limit=finite(state["limit"]),
            cost=finite(state["cost"]),
            saved=finite(state["saved"]),
            times=counted(state["times"]),
            step=counted(state["step"]),
        )


@dataclass(frozen=True, eq=False)
class PlanState:
    """How a plan is kept at a moment: all of it is put back with a step that does not pass.

    Attributes:
        wait: the steps before what was taken comes back.
        shape: the largest number of rows and the largest length of a batch so far.
        underestimate: bytes by which measured peaks were above predictions; all plans pay for them.
        unchecked: whether no step has been measured since the ranks changed.
        before: the ranks before the last decision, int64 (modules,), to which a peak above the budget goes back; None
            where there is no way back.
        memory: predicts the bytes of other batch shapes under the layers that are checkpointed; None where it is not
            known.
        reduction: what errors, or a limit that fell, have taken from the plan; None for nothing.
        cuts: the directions that were cut away with that, the oldest first.
    """

    wait: int
    shape: BatchShape
    underestimate: float = 0.0
    unchecked: bool = True
    before: IntArray | None = None
    memory: MemoryModel | None = None
    reduction: PlanReduction | None = None
    cuts: tuple[CutDirections, ...] = ()

    def state(self) -> dict[str, Any]:
        """What `from_state` needs, as tensors and JSON values."""
        return {
            "rows": self.shape.rows,
            "length": self.shape.length,
            "underestimate": self.underestimate,
            "wait": self.wait,
            **({} if self.reduction is None else {"reduction": self.reduction.state()}),
            **({} if self.before is None else {"before": torch.from_numpy(self.before.copy())}),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PlanState:
        """How the plan was kept at the time of `state`, without the byte model and what was cut."""
        return cls(
            counted(state.get("wait", GOOD_STEPS), 1),
            BatchShape(counted(state["rows"]), counted(state["length"])),
            underestimate=finite(state["underestimate"]),
            unchecked=bool(state.get("measure_next", True)),
            before=state["before"].numpy().copy() if "before" in state else None,
            reduction=PlanReduction.from_state(state["reduction"]) if "reduction" in state else None,
        )


class PlanKeeper:
    """Keeps the plan of one run within its limit of bytes or parameters, and of time.

    Where gradient checkpointing may be used, more layers are checkpointed before the plan changes. A plan without any
    adapter is never the result: where nothing else fits, the run stops with `BudgetError`.

    Args:
        meter: measures steps; it is asked to measure the next one after each change.

    Attributes:
        now: how the plan is kept; it is replaced, never changed.
        step: the optimizer steps done.
        run: the run.
        applier: changes the ranks.
        journal: forgets corrections that are put back.
        checkpointing: chooses the layers to checkpoint; None where none is chosen.
    """

    run: TrainingRun
    applier: PlanApplier[Any]
    journal: Journal
    checkpointing: LayerCheckpointing | None = None

    def __init__(self, meter: PeakMeter) -> None:
        self.meter, self.now, self.step = meter, PlanState(GOOD_STEPS, BatchShape(0, 0)), 0

    def attach(
        self,
        run: TrainingRun,
        applier: PlanApplier[Any],
        memory: MemoryModel | None,
        journal: Journal,
        corrected: Callable[[PlanChange], None],
        checkpointing: LayerCheckpointing | None,
        shape: BatchShape | None,
    ) -> None:
        """Begin to keep the plan.

        Args:
            run: the run; its optimizer's state is mapped to new ranks.
            applier: changes the ranks.
            memory: predicts the cost of other batch shapes; if it is None, it is made when it is needed.
            journal: forgets corrections that are put back.
            corrected: called with each correction.
            checkpointing: chooses the layers to checkpoint; `memory` is of the step in which all are.
            shape: with which plans are priced; by default that of the run's largest batch.
        """
        self.run, self.applier, self.journal, self.checkpointing = run, applier, journal, checkpointing
        self._corrected, self.meter.highest = corrected, run.replicas.highest
        if memory:
            # A run that goes on has a shape: a larger batch is met before its step.
            shape = self.now.shape if self.now.shape.rows else shape or memory.shape
            if checkpointing:
                checkpointing.memory, memory = memory, memory.with_checkpointed(checkpointing.layers)
                if applier.time:
                    applier.time.layers = self.layers_of
            self.now = replace(self.now, shape=shape, memory=memory)

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """Names of the layers that were chosen for gradient checkpointing."""
        return self.checkpointing.layers if self.checkpointing else ()

    @property
    def limits_bytes(self) -> bool:
        """Whether the budget counts bytes."""
        return isinstance(self.applier.cost, ByteCost)

    def warn(self, text: str, *values: object) -> None:
        """Log a warning, in the first process: all processes come to the same."""
        if self.run.replicas.processes.first:
            logger.warning(text, *values)

    # Decisions --------------------------------------------------------------------------------------------------------

    def deciding(self, *, checkpointing: bool = True) -> None:
        """Price plans for a decision, where layers may be checkpointed; see `checkpointed_cost`.

        Args:
            checkpointing: whether they may in this decision.
        """
        if self.checkpointing and self.checkpointing.memory:
            applier, targets, now = self.applier, self.applier.targets, self.now
            least = partial(least_cost, targets, applier.low, applier.high) if checkpointing else None
            room = applier.limit - now.underestimate
            unpaid = signal_buffer_bytes(targets) * (not applier.will_measure)
            cost = self.checkpointing.cost(highest_ranks(targets), room, now.shape, applier.ranks, least, unpaid)
            applier.cost = replace(cost, constant=cost.constant + now.underestimate)

    def decided(self, before: IntArray, step: int, *, by_hand: bool = False) -> None:
        """Note that a decision has changed the ranks; those that it changed do not come back with memory.

        Args:
            before: the ranks before it, int64 (modules,).
            step: the optimizer steps before it.
            by_hand: whether a person has given all ranks.
        """
        ranks, reduction = self.applier.ranks, self.now.reduction
        if reduction:
            reduction = replace(reduction, ranks=np.where(by_hand | (ranks != before), ranks, reduction.ranks))
        way_back = before if step > 0 else None  # the first plan follows no plan
        self.now = replace(self.now, before=way_back, cuts=(), reduction=reduction)
        self.checkpoint_fewest()
        if self.limits_bytes:
            self.measure_next()

    # What makes plans cost more ---------------------------------------------------------------------------------------

    def larger_batch(self, batches: Sequence[Batch], shape: BatchShape) -> None:
        """Predict the cost of a shape larger than all before, and shrink the plan if it no longer fits.

        Args:
            batches: of the step that begins; the model has not seen them.
            shape: the largest number of rows and the largest length, with theirs.
        """
        self.now = replace(self.now, shape=shape)
        if not self.limits_bytes:
            return
        self.measure_next()
        try:
            cost = self.cost_of_shape(shape)
        except UnsupportedError:  # the byte model predicts the shape of its calibration alone
            logger.debug("Calibrating again for %s.", shape)
            longest = max(batches, key=lambda batch: shape_of(batch).length, default=None)
            self.measure_again(longest, shape)
            cost = self.cost_of_shape(shape)
        self.applier.cost = cost
        text = f"A batch of {shape} came, larger than the memory was planned for."
        self._fit(text, f"batch of {shape}", unknown_lengths(self.run.dataset))

    def count_gradients(self) -> None:
        """Count gradients all the time from now on, since the loop keeps them."""
        checkpointing, memory = self.checkpointing, self.now.memory
        self.run.keep_gradients()
        if checkpointing and checkpointing.memory:
            checkpointing.memory = replace(checkpointing.memory, accumulates=True)
        if memory:
            self.now = replace(self.now, memory=replace(memory, accumulates=True))
            self.applier.cost = self.cost_of_shape(self.now.shape)
        else:
            self.measure_again(None, self.now.shape)
        text = "Gradients stay while the next step runs forward: optimizer.zero_grad() before that frees their bytes."
        self._fit(text, "gradients stay")

    def above(self, peak: int, cause: str, predicted: float | None = None) -> None:
        """Correct the prediction by a peak above the limit, in bytes, and the plan with it.

        The last change of ranks is rolled back, as far as the plan before it fits the corrected prediction. If there is
        no plan before it, the plan shrinks.

        Args:
            peak: of the step.
            cause: of the difference, for people.
            predicted: of the step, in bytes; by default what the plan costs.

        Raises:
            BudgetError: no plan with an adapter fits the corrected prediction.
        """
        applier, now = self.applier, self.now
        ranks, cost = applier.ranks, applier.cost
        error = max(peak - (plan_cost(applier.cost_now(), ranks) if predicted is None else predicted), 0.0)
        self.now = replace(now, underestimate=now.underestimate + error)
        assert isinstance(cost, ByteCost)
        applier.cost = replace(cost, constant=cost.constant + error)
        before = ranks if now.before is None else now.before
        back = not np.array_equal(before, ranks)
        text = (
            f"The peak of step {self.step} was {format_bytes(peak, up=True)}, above the budget of "
            f"{format_bytes(applier.limit)}"
        )
        text = f"{text}, {cause}" if cause else f"{text}."
        if self.step == applier.total_steps:
            self.warn("%s It was the last step: the plan stays.", text)
        elif not self.relieved(text):
            self.check_possible(f"{text} With the prediction corrected by that, no adapter fits.")
            self.warn("%s The plan is %s.", text, "rolled back" if back else "shrunk by the difference")
            self.correct("rolled back: peak above the budget" if back else "shrunk: peak above the budget", before)

    def new_limit(self, limit: float, step: int) -> None:
        """Take another limit for a run that is resumed, and shrink the plan if it no longer fits.

        Raises:
            BudgetError: no plan fits.
        """
        applier, reason = self.applier, "The budget or the time was changed."
        if limit != applier.limit:
            self.now = replace(self.now, reduction=None)
        applier.limit, self.step = limit, step
        if not self.relieved(reason) and not applier.fits():
            self.check_possible(reason)
            self.correct("shrunk: another budget or time", applier.ranks)

    # How a plan is made to fit ----------------------------------------------------------------------------------------

    def cost_of_shape(self, shape: BatchShape, memory: MemoryModel | None = None) -> ByteCost:
        """What plans cost with batches of a shape.

        Args:
            shape: of the largest batch.
            memory: the byte model to ask; by default that of the layers that are checkpointed now.

        Raises:
            UnsupportedError: no byte model knows this shape.
        """
        memory = memory or self.now.memory
        if memory is None:
            raise UnsupportedError("This run was resumed, and has no byte model.")
        cost = memory.cost(shape)
        return replace(cost, constant=cost.constant + self.now.underestimate)

    def measure_again(self, batch: Batch | None, shape: BatchShape) -> None:
        """Measure the byte model anew.

        Args:
            batch: to measure with, made larger to the shape; None for the run's largest batch.
            shape: of the step that is measured.
        """
        run, targets, checkpointing = self.run, self.applier.targets, self.checkpointing
        if checkpointing:
            checkpointing.all()

        def measure() -> MemoryModel:
            # The largest rows and the largest length so far may be of two batches, or of another process.
            largest = run.largest_batch() if batch is None else run.on_device(batch)
            whole = reshaped(largest, shape, run.step.rows_per_example)
            return measure_memory(run.step, targets, whole, signals=True)

        memory = run.measured(measure)
        self.now = replace(self.now, memory=memory)
        run.replicas.changed(targets, self.step)
        if checkpointing:
            checkpointing.memory = memory
            self.checkpoint_fewest()

    def layers_of(self, ranks: IntArray) -> tuple[str, ...]:
        """Names of the layers that a plan of these ranks, int64 (modules,), needs to checkpoint."""
        if self.checkpointing is None:
            return ()
        return self.checkpointing.fewest(ranks, self.room_for(ranks), self.now.shape)

    def room_for(self, ranks: IntArray) -> float:
        """Bytes that a step of a plan, int64 (modules,), may take by the byte model."""
        return self.applier.limit - self.now.underestimate + self.unpaid(ranks)

    def unpaid(self, ranks: IntArray) -> float:
        """Bytes that the byte model counts of a plan and that a step does not take: where no signals are measured."""
        return 0.0 if self.applier.measures else float(signal_buffer_bytes(self.applier.targets) @ ranks)

    def relieved(self, reason: str) -> bool:
        """Whether the plan fits, because other layers are checkpointed from now on; the reason is told then."""
        before = self.checkpointed
        if self.checkpointing is None or not self.checkpoint_fewest():
            return False
        if before != self.checkpointed:
            self.measure_next()
            self.warn("%s Now %s, and the plan stays.", reason, self.checkpointing)
        return True

    def correct(self, reason: str, wanted: IntArray, *, keeps: bool = False) -> None:
        """Bring the ranks within the limit.

        Args:
            reason: for the decision log.
            wanted: the ranks to come as near to as the limit allows, int64 (modules,).
            keeps: whether what that cuts away is kept in main memory.
        """
        applier = self.applier
        observation = applier.observation_now(self.step)
        pairs = [CutDirections.of(target) for target in applier.targets if target.rank] if keeps else []
        plan = applier.correct(wanted, self.step, self.run.optimizer)
        cuts = tuple(pair.beyond(pair.target.rank) for pair in pairs if pair.target.rank < pair.rows.shape[1])
        self.now = replace(self.now, cuts=self.now.cuts + cuts)
        self.changed(PlanChange.correction(self.step, reason, wanted, observation, plan))

    def _fit(self, text: str, cause: str, hint: str = "") -> None:
        """Make the plan fit the costs of now, which are higher for a cause, and tell it."""
        if self.applier.fits():
            self.warn("%s The plan still fits.", text)
        elif not self.relieved(text):
            self.check_possible(text + hint)
            self.warn("%s The plan is shrunk.", text)
            self.correct(f"shrunk: {cause}", self.applier.ranks)

    def check_possible(self, context: str) -> None:
        """Raise BudgetError, with its context, if no plan with an adapter fits."""
        try:
            check_budget(self.applier.problem_now(), list(self.applier.names))
        except BudgetError as error:
            raise BudgetError(f"{context} {error}") from error

    def changed(self, change: PlanChange) -> None:
        """Settle after a change of ranks, and have it recorded."""
        self.checkpoint_fewest()
        self.now = replace(self.now, before=None)
        self.measure_next()
        self._corrected(change)

    def measure_next(self) -> None:
        """Measure the next step, and hold its peak against the prediction."""
        self.meter.request()
        self.now = replace(self.now, unchecked=True)

    def checkpoint_fewest(self) -> bool:
        """Checkpoint the fewest layers with which the plan fits; whether it does now."""
        self.checkpoint(self.layers_of(self.applier.ranks))
        return self.applier.fits()

    def checkpoint(self, layers: Sequence[str]) -> None:
        """Checkpoint these layers where layers can be chosen, and price plans with them."""
        if self.checkpointing:
            self.checkpointing.take(layers)
            self.now = replace(self.now, memory=self.checkpointing.memory_now())
            self.applier.cost = self.cost_of_shape(self.now.shape)
