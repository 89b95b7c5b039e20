"""A budget that follows the free memory of the device, or the value of a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..common.checks import finite
from ..cost.batch_shape import Batch
from ..cost.budget import Budget, GivenBudget, Limit, budget_now, free_bytes
from ..cost.record.calibration import beside_model
from ..decide.applier import PlanApplier
from ..lora.adapters import PeftAdapters
from .step.peak_guard import PeakGuard
from .step.run import Participant, TrainingRun


def held_bytes(device: torch.device) -> int:
    """Return the bytes held by this process: on CUDA in tensors on the device, else in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


class ElasticBudget(Participant):
    """Current limit on the cost of a run's plan.

    "auto" is a share of the memory available to the run: the free memory now, plus the run's own since it began. Memory
    taken by another process thus lowers it, and the run's own steps do not.

    Args:
        run: the run about to begin.
        budget: the user's budget, or a function that returns it before each step.
        guard: brings the plan within the limit.

    Attributes:
        budget: the last budget read.
        given: True if the user has since set another budget.
        now: the limit set by the budget, in bytes or parameters. While a plan waits to grow, its own limit is lower.
    """

    def __init__(self, run: TrainingRun, budget: GivenBudget, guard: PeakGuard) -> None:
        self._run, self._given, self._guard = run, budget, guard
        self._held: float = held_bytes(run.device)
        self.now: float = 0.0
        self._whole: float = 0.0
        self.budget: Budget = budget_now(self._given)
        self.given: bool = False

    @property
    def moves(self) -> bool:
        """True if the budget may change by itself; with several processes, which must agree, it does not."""
        alone = self._run.replicas.processes.count == 1
        return alone and (callable(self._given) or self.budget.kind == "auto")

    def give(self, budget: GivenBudget, applier: PlanApplier[PeftAdapters]) -> None:
        """Set another budget from the next step on.

        Raises:
            BudgetError: its unit differs from the run's.
        """
        if not callable(budget):
            Budget.parse(budget).resolve(applier.cost, applier.reference, self._run.device)
        self._given, self.given = budget, True

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Restore the budget and the limit of a resumed run, which then holds the same memory again."""
        if state is None:
            return
        budget, elastic = state["settings"]["budget"], state["elastic"]
        if budget != str(self.budget):
            self.budget = Budget.parse(budget)
        self.now, self._whole = finite(elastic["limit"]), finite(elastic["whole"])
        self._held -= finite(elastic["own"])

    def first_limit(self, limit: Limit) -> None:
        """Record the limit of the first plan, and the cost that relative budgets refer to."""
        self.now, self._whole = limit.value, limit.whole

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Bring the plan within the current limit, if it may have moved."""
        shortage = self._guard.shortage
        if self.given or self.moves or shortage.follows:
            shortage.follow(self.limit(self._guard.plan.applier), step)

    def state(self) -> dict[str, Any]:
        """Return the limit, the cost that relative budgets refer to, and the run's own bytes, as JSON values."""
        own = held_bytes(self._run.device) - self._held
        return {"elastic": {"limit": self.now, "whole": self._whole, "own": own}}

    def limit(self, applier: PlanApplier[PeftAdapters]) -> float:
        """Return the current limit of plans, in the unit of the applier's costs.

        Raises:
            BudgetError: the budget cannot be parsed, or its unit differs from the run's.
            ConfigError: the function fails.
        """
        self.given = False
        (least,) = self._run.replicas.processes.least(self._limit_here(applier))
        return least

    def _limit_here(self, applier: PlanApplier[PeftAdapters]) -> float:
        """Return the same limit, before several processes agree on the lowest."""
        before, self.budget = self.budget, budget_now(self._given)
        if self.budget != before:  # another unit is rejected
            budget = beside_model(self.budget, self._run.model)
            self.now = budget.resolve(applier.cost, applier.reference, self._run.device).value
        if self.budget.kind == "auto":
            own = max(held_bytes(self._run.device) - self._held, 0)
            return self.budget.value * (free_bytes(self._run.device) / self._run.replicas.on_this_device + own)
        if self.budget.kind == "share":  # costs may by now be those of checkpointed layers
            self.now = self.budget.value * self._whole
        return self.now
