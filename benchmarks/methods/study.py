"""From stored rows to what each method did in each cell; tells which rows are missing for that.

Everything here is a function of rows: the run asks it what is to be done next, and the report what came out. Whatever
needs a row that is not there raises `MissingRowsError` with the work that leads to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from rankpilot.common.arrays import IntArray
from rankpilot.cost.budget import Budget
from rankpilot.cost.cost import Cost, cost_from_state, plan_cost
from rankpilot.lora.spec import REFERENCE_RANK, ModuleSpec
from rankpilot.plan.problem import AllocationProblem

from .rows import RowStore, Work, plan_ranks, plan_text
from .tasks import Cell, MethodTask, Suite

FACTORS = (-1, 0, 1)
"""Powers of 2 around a task's rate that are tried first."""

MOST_FACTOR = 6
"""While the best rate is at an edge, the next power of 2 is tried, up to this one."""

T = TypeVar("T")
Item = TypeVar("Item")
Before = Callable[[float, int], Work]


class MissingRowsError(Exception):
    """Rows that are not there yet.

    Args:
        works: that lead to them.
    """

    def __init__(self, works: Iterable[Work]) -> None:
        self.works: tuple[Work, ...] = tuple(dict.fromkeys(works))
        super().__init__(f"{len(self.works)} rows are missing, such as {self.works[0]}")


class DoesNotFitError(Exception):
    """The method has no plan within the budget of a cell."""


@dataclass(frozen=True, eq=False)
class Modules:
    """The modules of a task, and what plans of plain LoRA cost.

    Attributes:
        specs: the modules.
        cost: bytes of a plan.
        reference: bytes of all-linear rank 8.
    """

    specs: tuple[ModuleSpec, ...]
    cost: Cost
    reference: float

    @property
    def names(self) -> list[str]:
        """Of the modules."""
        return [spec.name for spec in self.specs]

    def problem(self, budget: str) -> AllocationProblem:
        """The plans that fit a share of the reference."""
        return AllocationProblem.of(self.specs, self.cost, Budget.parse(budget).value * self.reference)

    def bytes_of(self, ranks: IntArray) -> float:
        """The bytes of a plan."""
        return plan_cost(self.cost, ranks)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method did in a cell.

    Attributes:
        rate: the rate that tuning chose.
        rows: of the result seeds, in their order.
        works: that led to them.
        tuning: what was run to choose rate and plan.
        bytes: predicted peak of each run; None where no model predicts it.
        setup_s: CPU seconds before the first step of each run.
        step: the timed and measured step that stands for the runs, where it is no step of theirs; see `Study.steps`.
    """

    rate: float
    rows: tuple[dict[str, Any], ...]
    works: tuple[Work, ...]
    tuning: frozenset[Work]
    bytes: tuple[float | None, ...]
    setup_s: tuple[float, ...]
    step: Work | None = None


@dataclass(eq=False)
class Study:
    """A suite, seen through the rows that there are.

    Attributes:
        rows: the store.
        suite: cells and seeds.
        used: the work of each row that was asked for.
    """

    rows: RowStore
    suite: Suite
    used: set[Work] = field(default_factory=set)
    _modules: dict[str, Modules] = field(default_factory=dict)

    def result(self, work: Work) -> dict[str, Any]:
        """The row of a piece of work; MissingRowsError without one, DoesNotFitError if the budget was too small."""
        self.used.add(work)
        row = self.rows.get(work)
        if row is None:
            raise MissingRowsError([work])
        if "refused" in row:
            raise DoesNotFitError
        return row

    def modules(self, task: MethodTask) -> Modules:
        """The modules of a task, and the cost of plans."""
        work = Work.of("costs", task)
        row = self.result(work)
        if task.key not in self._modules:
            specs = tuple(ModuleSpec(*fields) for fields in row["modules"])
            self._modules[task.key] = Modules(specs, cost_from_state(row["cost"]), row["reference"])
        return self._modules[task.key]

    def fits(self, cell: Cell, ranks: IntArray) -> bool:
        """Whether a plan fits the budget of a cell."""
        return self.modules(cell.task).problem(cell.budget).fits(ranks)

    def plan_run(self, task: MethodTask, ranks: IntArray, rate: float, seed: int, trainer: str = "lora") -> Work:
        """The training of plain LoRA at given ranks."""
        return self.training(task, trainer, rate, seed, plan=plan_text(ranks))

    def training(self, task: MethodTask, trainer: str, rate: float, seed: int, **arguments: Any) -> Work:
        """The training by a method; on tuning seeds it is judged on the rows for tuning."""
        tuning = True if seed in self.suite.tuning_seeds else None
        return Work.of("train", task, trainer=trainer, rate=rate, seed=seed, tuning=tuning, **arguments)

    def tuned(
        self, task: MethodTask, make: Callable[[float, int], Work], factors: Sequence[int] = FACTORS
    ) -> tuple[float, float, frozenset[Work]]:
        """The best rate for what `make` gives, its mean loss on tuning seeds, and all work that was done for it.

        Args:
            task: gives the rate around which is searched.
            make: the work at a rate and a seed.
            factors: powers of two, times that rate, with which the search begins.
        """
        losses: dict[int, float] = {}
        works: set[Work] = set()

        def loss_of(factor: int) -> float:
            made = gather(lambda seed: make(task.rate * 2.0**factor, seed), self.suite.tuning_seeds)
            works.update(made)
            return float(np.mean([loss_or_inf(row) for row in gather(self.result, made)]))

        wanted = list(factors)
        while wanted:
            losses |= dict(zip(wanted, gather(loss_of, wanted), strict=True))
            best = min(losses, key=lambda factor: losses[factor])
            edges = (min(losses), max(losses))
            step = {edges[0]: -1, edges[1]: 1}.get(best, 0)
            wanted = [best + step] if step and abs(best + step) <= MOST_FACTOR else []
        return task.rate * 2.0**best, losses[best], frozenset(works)

    def outcome(
        self,
        cell: Cell,
        make: Callable[[float, int], Work],
        before: Before | None = None,
        factors: Sequence[int] = FACTORS,
    ) -> Outcome:
        """What came of training at the best rate.

        Args:
            cell: of a suite.
            make: the work at a rate and a seed.
            before: what was done before that training, at the same rate and seed.
            factors: see `tuned`.
        """
        rate, _, tuning = self.tuned(cell.task, make, factors)
        return self.runs(cell, make, rate, tuning, before)

    def runs(
        self,
        cell: Cell,
        make: Callable[[float, int], Work],
        rate: float,
        tuning: frozenset[Work],
        before: Before | None = None,
    ) -> Outcome:
        """What came of training on the result seeds at some rate."""
        works = tuple(gather(lambda seed: make(rate, seed), self.suite.seeds))
        rows = tuple(gather(self.result, works))
        setup = tuple(row.get("setup_s", 0.0) for row in rows)
        if before is not None:
            setup = tuple(self.result(before(rate, seed))["cpu_s"] for seed in self.suite.seeds)
        modules = self.modules(cell.task)
        costs = tuple(_bytes(row, work, modules) for row, work in zip(rows, works, strict=True))
        return Outcome(rate, rows, works, tuning, costs, setup)

    def steps(self, outcome: Outcome) -> tuple[dict[str, Any], ...]:
        """The row of the timed and measured step that stands for each run: at its final ranks, once for equal ones.

        A run of rankpilot that diverged tells no ranks; it stands with all-linear rank 8.
        """
        if outcome.step is not None:
            works = [outcome.step] * len(outcome.works)
        else:
            works = [self._step(work, row) for work, row in zip(outcome.works, outcome.rows, strict=True)]
        return tuple(gather(self.result, works))

    def _step(self, work: Work, row: dict[str, Any]) -> Work:
        if work.get("trainer") == "pilot":
            ranks = row.get("ranks") or f"{REFERENCE_RANK}x{len(self.modules(work.task).specs)}"
            if work.get("recompute"):
                return Work.of("recompute", work.task, plan=ranks, budget=work.get("budget"))
            return Work.of("step", work.task, trainer="lora", plan=ranks, seed=0)
        kept = {name: work.get(name) for name in ("trainer", "plan", "target")}
        return Work.of("step", work.task, seed=0, **kept)


def _bytes(row: dict[str, Any], work: Work, modules: Modules) -> float | None:
    """The predicted peak of a run; that of its plan where the run does not tell."""
    if "predicted" in row:
        return None if row["predicted"] is None else float(row["predicted"])
    plan = work.get("plan")
    return None if plan is None else modules.bytes_of(plan_ranks(plan))


def gather(work: Callable[[Item], T], items: Sequence[Item] | Iterable[Item]) -> list[T]:
    """What a function gives for each item; where rows are missing, all of them are told at once."""
    results: list[T] = []
    missing: list[Work] = []
    for item in items:
        try:
            results.append(work(item))
        except MissingRowsError as error:
            missing += error.works
    if missing:
        raise MissingRowsError(missing)
    return results


def loss_or_inf(row: dict[str, Any]) -> float:
    """The held-out loss of a row; infinite if the run diverged."""
    return math.inf if row["loss"] is None else float(row["loss"])


Group = Literal["static", "adaptive", "search", "ours", "peer", "saving"]


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
        if not modules.problem(cell.budget).fits(ranks):
            raise DoesNotFitError
        return study.outcome(cell, lambda rate, seed: study.plan_run(cell.task, ranks, rate, seed, self.trainer))
