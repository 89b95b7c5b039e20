"""What a careful user does: tries a few windows of top layers on other seeds, and takes the best."""

from __future__ import annotations

from dataclasses import dataclass

from ....common.arrays import IntArray
from ..method import Group
from ..ranks import plan_text
from ..study import DoesNotFitError, Modules, Outcome, Study, gather
from ..tasks import Cell
from .modules import deepest, window

RANKS = (8, 16, 32)


def candidates(modules: Modules, budget: str) -> list[IntArray]:
    """At each rank as many top layers as fit, and half as many."""
    plans = {}
    for rank in RANKS:
        most = deepest(modules, budget, rank)
        for layers in {most, (most + 1) // 2} - {0}:
            plan = window(modules, layers, rank)
            plans[plan_text(plan)] = plan
    return list(plans.values())


def best_plan(study: Study, cell: Cell, plans: list[IntArray]) -> tuple[IntArray, Outcome]:
    """The plan with the lowest loss on tuning seeds, each at its own rate, and what it did.

    Raises:
        DoesNotFitError: there are no plans.
    """
    if not plans:
        raise DoesNotFitError
    tried = gather(
        lambda plan: study.tuned(cell.task, lambda rate, seed: study.plan_run(cell.task, plan, rate, seed)), plans
    )
    best = min(range(len(plans)), key=lambda index: tried[index][1])
    works = frozenset(work for _, _, each in tried for work in each)
    plan, rate = plans[best], tried[best][0]
    return plan, study.runs(cell, lambda r, seed: study.plan_run(cell.task, plan, r, seed), rate, works)


@dataclass(frozen=True)
class Simple:
    """The best of windows of top layers at rank 8, 16 and 32, each at its own rate."""

    name: str = "simple"
    group: Group = "static"
    description: str = "the best of windows of top layers at rank 8, 16, 32, chosen on tuning seeds"
    quick: bool = True

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        return best_plan(study, cell, candidates(study.modules(cell.task), cell.budget))[1]


SIMPLE = Simple()
