"""Gradient checkpointing of as few layers as a budget needs, under a static plan: less memory, more time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ....common.arrays import IntArray
from ..method import Group
from ..ranks import plan_text
from ..study import Modules, Outcome, Study
from ..tasks import Cell
from ..work import Work
from .modules import depth, window


def _all_linear(modules: Modules) -> IntArray:
    return window(modules, depth(modules), 8)


def _top_half(modules: Modules) -> IntArray:
    return window(modules, (depth(modules) + 1) // 2, 16)


@dataclass(frozen=True)
class Checkpointed:
    """A static plan that fits because layers run again; losses are those of the plan without that, bit for bit.

    Attributes:
        name: see `Method`.
        description: see `Method`.
        plan: the ranks.
        group: see `Method`.
        quick: see `Method`.
    """

    name: str
    description: str
    plan: Callable[[Modules], IntArray]
    group: Group = "static"
    quick: bool = False

    def step(self, study: Study, cell: Cell) -> Work:
        """The timed step."""
        plan = plan_text(self.plan(study.modules(cell.task)))
        return Work.of("recompute", cell.task, plan=plan, budget=cell.budget)

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        timed = study.result(self.step(study, cell))
        ranks = self.plan(study.modules(cell.task))
        outcome = study.outcome(cell, lambda rate, seed: study.plan_run(cell.task, ranks, rate, seed))
        return replace(outcome, bytes=(timed["predicted"],) * len(outcome.rows), step=self.step(study, cell))


ALL_LINEAR = Checkpointed(
    "all-linear-8-ckpt", "rank 8 on all linear modules, as few layers checkpointed as fit", _all_linear, quick=True
)
TOP_HALF = Checkpointed("top-half-16-ckpt", "rank 16 on the top half, as few layers checkpointed as fit", _top_half)
