"""Keeps the plan of a run within its budget: predicts costs, checkpoints layers, and shrinks the plan if needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from ...common.arrays import IntArray
from ...common.checks import counted, finite
from ...common.errors import BudgetError, UnsupportedError
from ...cost.cost import ByteCost, Cost
from ...cost.model import MemoryModel, checkpointed_cost, fewest_checkpointed
from ...cost.record.peak_meter import PeakMeter
from ...cost.recording import BatchShape
from ...cost.savers.checkpointed_layers import LayerCheckpointing
from ...decide.applier import PlanApplier
from ...decide.plan.plan import check_budget, least_cost
from ...lora.adapters import signal_buffer_bytes
from .journal import Journal, PlanChange
from .put_back import CutDirections
from .run import TrainingRun

GOOD_STEPS = 20
"""Steps without an error before a shrunken plan grows back; the wait doubles with each further failure."""


@dataclass(frozen=True, eq=False)
class PlanReduction:
    """The plan before memory ran short, to be restored later, and how far it has shrunk.

    Attributes:
        ranks: the ranks of the original plan, int64 (modules,).
        layers: names of its checkpointed layers.
        limit: its limit of costs.
        cost: the cost of the original plan, in the unit of the limit.
        saved: saving of each further reduction, in that unit; 0 if none would help.
        times: how many times the plan has shrunk since, 0 to `MOST_TRIES`.
        step: optimizer steps done at the latest error or drop of the limit.
    """

    ranks: IntArray
    layers: tuple[str, ...]
    limit: float
    cost: float
    saved: float
    times: int
    step: int

    def state(self) -> dict[str, Any]:
        """Return the state for `from_state`, as tensors and JSON values."""
        return {**vars(self), "ranks": torch.from_numpy(self.ranks.copy()), "layers": list(self.layers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PlanReduction:
        """Restore a reduction from the result of `state`."""
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
    """Limit and price of a step, and what keeps it within: one immutable value, restored after a failed step.

    Attributes:
        wait: good steps before a shrunken plan grows back.
        shape: the largest number of rows and the largest length of any batch so far.
        limit: the hard limit of plans, in the unit of `cost`.
        cost: cost of plans, signal buffers included; None before the first plan.
        recorded: the byte model of the step, with all layers checkpointed if they may be chosen; None if unknown.
        layers: names of the layers chosen for gradient checkpointing; None if none may be chosen.
        underestimate: bytes by which measured peaks exceeded predictions, added to the cost of all plans.
        unchecked: True if no step has been measured since the ranks changed.
        before: the ranks before the last decision, int64 (modules,), restored if a peak exceeds the budget; None if
            there are none.
        reduction: how far the plan has shrunk while memory is short; None if it has not.
        cuts: the directions then cut from ranks, oldest first.
    """

    wait: int
    shape: BatchShape
    limit: float = math.inf
    cost: Cost | None = None
    recorded: MemoryModel | None = None
    layers: tuple[str, ...] | None = None
    underestimate: float = 0.0
    unchecked: bool = True
    before: IntArray | None = None
    reduction: PlanReduction | None = None
    cuts: tuple[CutDirections, ...] = ()

    @property
    def limits_bytes(self) -> bool:
        """True if the budget counts bytes."""
        return isinstance(self.cost, ByteCost)

    @cached_property
    def memory(self) -> MemoryModel | None:
        """The byte model of the step with the chosen layers checkpointed; None if unknown."""
        if self.recorded is None or self.layers is None:
            return self.recorded
        return self.recorded.with_checkpointed(self.layers)

    def cost_of(self, shape: BatchShape, memory: MemoryModel | None = None) -> ByteCost:
        """Return the cost of plans for a batch shape, in bytes.

        Args:
            shape: the shape of the largest batch.
            memory: the byte model to use; defaults to that of the chosen layers.

        Raises:
            UnsupportedError: no byte model covers this shape.
        """
        memory = memory or self.memory
        if memory is None:
            raise UnsupportedError("This run was resumed, and has no byte model.")
        cost = memory.cost(shape)
        return replace(cost, constant=cost.constant + self.underestimate)

    def state(self) -> dict[str, Any]:
        """Return the state for `from_state`, as tensors and JSON values."""
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
        """Restore from the result of `state`: without the byte model, its cost and limit, and the cut directions."""
        return cls(
            counted(state.get("wait", GOOD_STEPS), 1),
            BatchShape(counted(state["rows"]), counted(state["length"])),
            underestimate=finite(state["underestimate"]),
            unchecked=bool(state.get("measure_next", True)),
            before=state["before"].numpy().copy() if "before" in state else None,
            reduction=PlanReduction.from_state(state["reduction"]) if "reduction" in state else None,
        )


class PlanKeeper:
    """Keeps the plan of one run within its limit of bytes or parameters.

    If the plan does not fit, more layers are checkpointed first, where allowed, and only then do ranks shrink. The
    result always has at least one adapter: if no such plan fits, the run stops with `BudgetError`.

    Args:
        meter: measures the peak of steps; after each change, the next step is measured.

    Attributes:
        now: the current state; only `update` and `put` replace it, and the applier and the model follow.
        step: the number of optimizer steps done.
        run: the run.
        applier: changes the ranks.
        journal: records decisions and corrections.
        checkpointing: chooses the layers to checkpoint; None if the run may not checkpoint any.
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
        """Start keeping the plan of a run.

        Args:
            run: the run; its optimizer's state is mapped to new ranks.
            applier: changes the ranks.
            memory: the byte model, to predict costs of other batch shapes; None to measure it when needed.
            journal: records decisions and corrections.
            corrected: called with each correction.
            checkpointing: chooses the layers to checkpoint. `memory` then describes a step with all layers
                checkpointed.
            shape: the batch shape used to price plans; defaults to the run's largest batch.
        """
        self.run, self.applier, self.journal, self.checkpointing = run, applier, journal, checkpointing
        self._corrected, self.meter.highest = corrected, run.replicas.highest
        self.update(limit=applier.limit, cost=applier.cost)
        if memory:
            # A resumed run has a shape: a larger batch is handled before its step.
            shape = self.now.shape if self.now.shape.rows else shape or memory.shape
            self.update(shape=shape, recorded=memory, layers=checkpointing and checkpointing.layers)

    def put(self, state: PlanState) -> None:
        """Replace the state, and have the applier and the checkpointed layers follow."""
        self.now = state
        assert state.cost is not None, "the first plan is priced"
        self.applier.price(state.cost, state.limit)
        if self.checkpointing and state.layers is not None:
            self.checkpointing.take(state.layers)

    def update(self, **changes: Any) -> None:
        """Replace some fields of the state."""
        self.put(replace(self.now, **changes))

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """Names of the layers chosen for gradient checkpointing."""
        return self.now.layers or ()

    # Decisions --------------------------------------------------------------------------------------------------------

    def price_for_decision(self) -> None:
        """Set the costs for a decision: each plan with just the checkpointed layers it needs to fit.

        Without selectable layers, costs are unchanged. See `checkpointed_cost`.
        """
        applier, targets, now = self.applier, self.applier.targets, self.now
        if self.checkpointing is None or now.recorded is None:
            return
        unpaid = signal_buffer_bytes(targets) * (not applier.clock.will_measure)
        cost = checkpointed_cost(
            now.recorded,
            applier.reference,
            now.limit - now.underestimate,
            now.shape,
            applier.ranks,
            least=partial(least_cost, targets, applier.low, applier.high),
            whole=self.checkpointing.whole,
            unpaid=unpaid,
        )
        constant = cost.constant + now.underestimate
        self.update(cost=replace(cost, constant=constant, per_rank=cost.per_rank + unpaid))

    def decided(self, before: IntArray, step: int, *, by_hand: bool = False) -> None:
        """Settle after a decision: choose the checkpointed layers, and measure the next step.

        Ranks changed by the decision, or all of them if set by hand, no longer grow back to their values before memory
        ran short.

        Args:
            before: the ranks before the decision, int64 (modules,).
            step: the optimizer steps before it.
            by_hand: True if all ranks were set by hand.
        """
        ranks, reduction = self.applier.ranks, self.now.reduction
        if reduction:
            reduction = replace(reduction, ranks=np.where(by_hand | (ranks != before), ranks, reduction.ranks))
        way_back = before if step > 0 else None  # there is no plan before the first one
        self.update(before=way_back, cuts=(), reduction=reduction)
        self.checkpoint_fewest()
        if self.now.limits_bytes:
            self.measure_next()

    def new_limit(self, limit: float, step: int) -> None:
        """Change the limit of a resumed run, and shrink the plan if it no longer fits.

        Raises:
            BudgetError: no plan fits.
        """
        applier, reason = self.applier, "The budget has changed."
        self.step = step
        self.update(limit=limit, reduction=self.now.reduction if limit == applier.limit else None)
        if not self.fits_with_checkpointing(reason) and not applier.fits():
            self.check_possible(reason)
            self.correct("shrunk: another budget", applier.ranks)

    # Making a plan fit ------------------------------------------------------------------------------------------------

    def reprice(self, **changes: Any) -> None:
        """Replace some fields of the state, and the cost of plans with them."""
        now = replace(self.now, **changes)
        self.put(replace(now, cost=now.cost_of(now.shape)))

    def room_for(self, ranks: IntArray) -> float:
        """Return the bytes that the byte model may predict for a plan, int64 (modules,), within the limit."""
        return self.now.limit - self.now.underestimate + self.unpaid(ranks)

    def unpaid(self, ranks: IntArray) -> float:
        """Return the bytes of signal buffers in the byte model that a run without signals does not use; else 0."""
        return 0.0 if self.applier.clock.measures else float(signal_buffer_bytes(self.applier.targets) @ ranks)

    def fits_with_checkpointing(self, reason: str) -> bool:
        """Try to make the plan fit by checkpointing other layers; True if it fits with unchanged ranks.

        Args:
            reason: why it may not fit, for the warning if the layers change.
        """
        before = self.checkpointed
        if self.checkpointing is None or not self.checkpoint_fewest():
            return False
        if before != self.checkpointed:
            self.measure_next()
            self.run.warn("%s Now %s; the plan is kept.", reason, self.checkpointing)
        return True

    def correct(self, reason: str, wanted: IntArray, *, keeps: bool = False) -> None:
        """Bring the ranks within the limit, as close as possible to some wanted ranks.

        Args:
            reason: for the decision log.
            wanted: the wanted ranks, int64 (modules,).
            keeps: True to keep the cut directions in main memory.
        """
        applier = self.applier
        observation = applier.observation_now(self.step)
        pairs = [CutDirections.of(target) for target in applier.targets if target.rank] if keeps else []
        plan = applier.correct(wanted, self.step, self.run.optimizer)
        cuts = tuple(pair.beyond(pair.target.rank) for pair in pairs if pair.target.rank < pair.rows.shape[1])
        self.update(cuts=self.now.cuts + cuts)
        self.changed(PlanChange.correction(self.step, reason, wanted, observation, plan))

    def check_possible(self, context: str) -> None:
        """Raise BudgetError, with its context, if no plan with an adapter fits."""
        try:
            check_budget(self.applier.problem(now=True), list(self.applier.names))
        except BudgetError as error:
            raise BudgetError(f"{context} {error}") from error

    def changed(self, change: PlanChange) -> None:
        """Settle after a correction of ranks: choose checkpointed layers, measure the next step, record the change."""
        self.checkpoint_fewest()
        self.update(before=None)
        self.measure_next()
        self._corrected(change)

    def measure_next(self) -> None:
        """Measure the peak of the next step, for comparison with the prediction."""
        self.meter.request()
        self.update(unchecked=True)

    def checkpoint_fewest(self) -> bool:
        """Checkpoint the fewest layers with which the plan fits; return True if it then fits."""
        ranks, recorded = self.applier.ranks, self.now.recorded
        if self.checkpointing and recorded is not None:
            room = 0.0 if self.checkpointing.whole else self.room_for(ranks)
            self.checkpoint(fewest_checkpointed(recorded, ranks, room, self.now.shape))
        return self.applier.fits()

    def checkpoint(self, layers: Sequence[str]) -> None:
        """Checkpoint these layers, if layers may be chosen, and update the costs of plans."""
        if self.checkpointing:
            self.reprice(layers=self.checkpointing.ordered(layers))
