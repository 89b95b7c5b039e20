"""What can be read from a `RankPilot` while its run lasts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..allocation.controller import RankController
from ..allocation.policy import Policy
from ..allocation.schedule import DecisionSchedule
from ..errors import ConfigError
from ..lora.adapters import PeftAdapters
from ..lora.scaling_names import Scaling
from ..memory.budget import Budget, TimeBudget
from .journal import Journal
from .peak_guard import PeakGuard
from .run_settings import run_settings


class Readings:
    """What can be read from a `RankPilot` while its run lasts.

    Attributes:
        controller: observes the adapters and changes their ranks; None before the run.
        journal: writes down the decisions.
        recompute: whether the layers that run again are chosen with each plan.
        seed: of all that is drawn.
        fresh: whether adapters begin anew.
        bounds: on the ranks of single modules.
        budget: what a plan may cost.
        time: what a step may take in time; None without a limit.
        policy: decides.
        schedule: when it does.
        scaling: what stays when a rank changes.
    """

    controller: RankController[PeftAdapters] | None
    journal: Journal
    recompute: bool
    seed: int
    fresh: bool
    bounds: dict[str, int | tuple[int, int]]
    budget: Budget
    time: TimeBudget | None
    policy: Policy
    schedule: DecisionSchedule
    scaling: Scaling
    _guard: PeakGuard
    _step: int
    _shown: int

    @property
    def predictions(self) -> list[tuple[int, float]]:
        """(step, cost of the plan) of each decision and correction."""
        return self.journal.predictions

    @property
    def peaks(self) -> list[tuple[int, int]]:
        """(step, bytes at its peak) of each measured step; the highest of all processes."""
        return self._guard.meter.history

    @property
    def checks(self) -> list[tuple[int, float, int]]:
        """(step, predicted bytes, measured bytes) of the first measured step after each change of ranks."""
        return self._guard.checks

    @property
    def limit(self) -> float:
        """What a plan may cost, in bytes or parameters. It is known from `begin` on."""
        return float(self._controller.limit)

    def evaluation(self) -> AbstractContextManager[None]:
        """Measure the evaluation that runs inside the block; see `evaluation_share`."""
        self._check_begun()
        return self._guard.evaluation()

    @property
    def evaluation_share(self) -> float:
        """The peak of the latest evaluation as a share of the budget; above 1 its batch is too large."""
        return self._guard.evaluation_share

    def figures(self) -> dict[str, float]:
        """What a training log shows of the ranks: mean rank, adapted modules, cost of the plan and limit.

        The highest peak is among them if a step was measured since the last call.
        """
        fresh, self._shown = self.peaks[self._shown :], len(self.peaks)
        controller, predictions = self._controller, self.predictions
        ranks, unit = controller.ranks, controller.cost.unit
        figures = {
            "rank_mean": float(ranks.mean()),
            "rank_modules": float((ranks > 0).sum()),
            f"plan_{unit}": predictions[-1][1],
            f"budget_{unit}": float(controller.limit),
            "rank_decisions": float(len(predictions)),
        }
        if self.recompute:
            figures["recomputed_layers"] = float(len(self._guard.recomputed))
        if controller.time:
            figures["plan_seconds"] = controller.time.of(ranks)
            if controller.time.beside is None:
                figures["budget_seconds"] = controller.time.seconds
        if fresh:
            figures["peak_bytes"] = float(max(peak for _, peak in fresh))
        return figures

    @property
    def _controller(self) -> RankController[PeftAdapters]:
        self._check_begun()
        assert self.controller is not None
        return self.controller

    def _settings(self) -> dict[str, Any]:
        limits = self.budget, self.time
        return run_settings(*limits, self.policy, self.schedule, self.bounds, self.recompute, self.scaling)

    def _is_due(self) -> bool:
        return self._controller.due(self._step) and self._step < self._controller.total_steps

    def _check_begun(self) -> None:
        if self.controller is None:
            raise ConfigError("The run has not begun: call `begin` first, or `rankpilot.load_checkpoint`.")
