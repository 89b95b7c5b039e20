"""What a method of the benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from ...common.arrays import IntArray
from .study import DoesNotFitError, Modules, Outcome, Study
from .tasks import Cell

Group = Literal["static", "adaptive", "search", "ours", "peer", "bound", "check", "saving"]


class Method(Protocol):
    """A way to give ranks, or something in place of LoRA.

    Attributes:
        name: in rows and tables.
        group: beside which methods it stands.
        description: one line.
        quick: whether it takes part in the quick suite.
    """

    @property
    def name(self) -> str:
        """In rows and tables."""

    @property
    def group(self) -> Group:
        """Beside which methods it stands."""

    @property
    def description(self) -> str:
        """One line."""

    @property
    def quick(self) -> bool:
        """Whether it takes part in the quick suite."""

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """What it did in a cell.

        Raises:
            MissingRowsError: something has yet to be run.
            DoesNotFitError: it has no plan within the budget.
        """


@dataclass(frozen=True)
class StaticMethod:
    """Plain LoRA at ranks that depend on the modules and the budget alone.

    Attributes:
        name: see `Method`.
        description: see `Method`.
        plan: the ranks, int64 (modules,), from the modules and the budget.
        group: see `Method`.
        quick: see `Method`.
        trainer: another way to train at these ranks.
    """

    name: str
    description: str
    plan: Callable[[Modules, str], IntArray]
    group: Group = "static"
    quick: bool = False
    trainer: str = "lora"

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        ranks = self.plan(modules, cell.budget)
        if self.group != "check" and not modules.problem(cell.budget).fits(ranks):
            raise DoesNotFitError
        return study.outcome(cell, lambda rate, seed: study.plan_run(cell.task, ranks, rate, seed, self.trainer))
