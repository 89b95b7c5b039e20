"""Gradient checkpointing of as few layers as a budget needs, under a static plan: less memory, more time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....common.arrays import IntArray
from ..method import Group, StaticMethod
from ..ranks import plan_text
from ..study import DoesNotFitError, Outcome, Study, gather
from ..tasks import Cell
from ..work import Work
from .all_linear import ALL_LINEAR as EVERY
from .modules import depth, window
from .simple import RANKS, best_plan
from .top_half import TOP_HALF as UPPER


def _step(cell: Cell, plan: IntArray) -> Work:
    """The timed step of a plan with as few layers checkpointed as the budget of a cell needs."""
    return Work.of("recompute", cell.task, plan=plan_text(plan), budget=cell.budget)


def _with_step(study: Study, cell: Cell, plan: IntArray, outcome: Outcome) -> Outcome:
    """What a plan did, at the bytes and the time of its step with layers checkpointed."""
    step = _step(cell, plan)
    return replace(outcome, bytes=(study.result(step)["predicted"],) * len(outcome.rows), step=step)


@dataclass(frozen=True)
class Checkpointed:
    """A static plan that fits because layers run again; losses are those of the plan without that, bit for bit.

    Attributes:
        name: see `Method`.
        description: see `Method`.
        plain: the plan without checkpointing.
        group: see `Method`.
        quick: see `Method`.
    """

    name: str
    description: str
    plain: StaticMethod
    group: Group = "static"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        ranks = self.plain.plan(study.modules(cell.task), cell.budget)
        study.result(_step(cell, ranks))  # fits, or there is nothing to train
        outcome = study.outcome(cell, lambda rate, seed: study.plan_run(cell.task, ranks, rate, seed))
        return _with_step(study, cell, ranks, outcome)


@dataclass(frozen=True)
class SimpleCheckpointed:
    """The best of all layers and the top half at rank 8, 16 and 32, chosen on tuning seeds, checkpointed to fit."""

    name: str = "simple-ckpt"
    description: str = "the best of all layers and the top half at rank 8, 16, 32, as few layers checkpointed as fit"
    group: Group = "static"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        layers = depth(modules)
        plans = [window(modules, count, rank) for rank in RANKS for count in (layers, (layers + 1) // 2)]

        def fits(plan: IntArray) -> bool:
            try:
                study.result(_step(cell, plan))
            except DoesNotFitError:
                return False
            return True

        fitting = [plan for plan, fit in zip(plans, gather(fits, plans), strict=True) if fit]
        return _with_step(study, cell, *best_plan(study, cell, fitting))


ALL_LINEAR = Checkpointed(
    "all-linear-8-ckpt", "rank 8 on all linear modules, as few layers checkpointed as fit", EVERY, quick=True
)
TOP_HALF = Checkpointed("top-half-16-ckpt", "rank 16 on the top half, as few layers checkpointed as fit", UPPER)
SIMPLE = SimpleCheckpointed()
