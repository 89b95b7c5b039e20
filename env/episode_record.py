"""One episode as an environment sees it: its reward, `info` and picture, whatever trains the adapters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..allocation.controller import RankController
from ..allocation.observation import Observation
from ..allocation.problem import AllocationProblem
from ..common.arrays import IntArray
from ..memory.cost import plan_cost
from .rendering import EpisodeTrace
from .reward import Comparison, churn_cost
from .tasks.finetune import Reference


class EpisodeRecord:
    """The story of one episode.

    Args:
        task: id of what is fine-tuned.
        reference: what fixed allocations achieve.
        controller: link to the adapters.
        observation: the first one.

    Attributes:
        observation: the latest one, with the plans that it allows.
        churn: cost of the rungs that were moved after the first decision, so far.
    """

    reference: Reference
    task: str
    observation: Observation

    def __init__(
        self, task: str, reference: Reference, controller: RankController[Any], observation: Observation
    ) -> None:
        self.task, self.reference, self.observation = task, reference, observation
        self.churn: float = 0.0
        self._controller = controller
        self._step = 0
        self._loss: float | None = None
        self._failed = False
        self._decision_steps: list[int] = []
        self._ranks: list[IntArray] = []
        self._costs: list[float] = []
        self._losses: list[tuple[int, float]] = []
        self._held_out: float | None = None
        self._comparison: Comparison | None = None

    @property
    def loss(self) -> float | None:
        """Mean training loss of the latest interval; None before the first one, and where it was not finite."""
        return self._loss

    def decided(self) -> None:
        """The controller has applied a decision."""
        problem = self._controller.problem()
        if self._decision_steps:
            self.churn += churn_cost(self.observation.problem.rungs, problem.rungs)
        self._decision_steps.append(self._step)
        self._ranks.append(problem.ranks)
        self._costs.append(plan_cost(problem.cost, problem.ranks))

    def close_interval(self, step: int, loss: float | None, observation: Observation | None = None) -> None:
        """Training has gone on to a step.

        Args:
            step: optimiser steps done.
            loss: mean training loss of the interval; None if it was not finite.
            observation: the next one, before the end.
        """
        self._step, self._loss, self._failed = step, loss, loss is None
        self._losses.append((step, np.nan if loss is None else loss))
        if observation is not None:
            self.observation = observation

    def end(self, held_out_loss: float | None, comparison: Comparison) -> float:
        """The episode is over; returns its reward.

        Args:
            held_out_loss: in nats; None if the run failed.
            comparison: with what.
        """
        self._held_out, self._comparison = held_out_loss, comparison
        return self._improvement - self.churn

    @property
    def _improvement(self) -> float:
        return self._comparison.improvement(self._held_out) if self._comparison else 0.0

    def info(self) -> dict[str, Any]:
        """The same keys at each step; see the environment's manual."""
        problem: AllocationProblem = self._controller.problem()
        return {
            "task": self.task,
            "step": self._step,
            "loss": self._loss,
            "held_out_loss": self._held_out,
            "uniform_loss": self.reference.uniform,
            "other_loss": self._comparison.loss if self._comparison else None,
            "cost": plan_cost(problem.cost, problem.ranks) if self._decision_steps else math.nan,
            "limit": problem.limit,
            "ranks": tuple(problem.ranks.tolist()),
            "non_finite": self._failed,
            "improvement": self._improvement,
            "churn": self.churn,
        }

    @property
    def trace(self) -> EpisodeTrace:
        """What has happened so far, for a picture."""
        controller, problem = self._controller, self.observation.problem  # others may train the adapters since
        # Before the first decision: the probe's rank 1 everywhere.
        first = not self._decision_steps
        return EpisodeTrace(
            title=self.task,
            names=controller.names,
            blocks=problem.blocks,
            total_steps=controller.total_steps,
            steps=(0,) if first else tuple(self._decision_steps),
            ranks=np.stack([problem.ranks] if first else self._ranks),
            costs=() if first else tuple(self._costs),
            limit=problem.limit,
            unit=controller.cost.unit,
            losses=tuple(self._losses),
            held_out_loss=self._held_out,
            uniform_loss=self.reference.uniform,
        )
