"""One episode as an environment sees it: its reward, `info` and picture, whatever trains the adapters."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..allocation.controller import RankController
from ..allocation.observation import Observation
from ..allocation.problem import AllocationProblem
from ..memory.cost import plan_cost
from .rendering import EpisodeTrace
from .reward import REWARD_BOUND, Reward, churn_cost, terminal_improvement
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
    """

    def __init__(
        self, task: str, reference: Reference, controller: RankController[Any], observation: Observation
    ) -> None:
        self.task, self.reference, self.observation = task, reference, observation
        self._controller = controller
        self._churn = 0.0
        self._steps: list[int] = []
        self._ranks: list[Any] = []
        self._costs: list[float] = []
        self._losses: list[tuple[int, float]] = []
        self._held_out: float | None = None

    def decided(self, step: int) -> None:
        """The controller has applied a decision before this step."""
        problem = self._controller.problem()
        before, after = self.observation.problem.rungs, problem.rungs
        self._churn = churn_cost(before, after) if self._steps else 0.0
        self._steps.append(step)
        self._ranks.append(problem.ranks)
        self._costs.append(plan_cost(problem.cost, problem.ranks))

    def improvement(self, held_out_loss: float | None) -> float:
        """How much better the run ended than the uniform one; None is a failed run."""
        return terminal_improvement(self.reference, held_out_loss)

    def close_interval(
        self,
        step: int,
        loss: float | None,
        *,
        ended: bool,
        held_out_loss: float | None = None,
        observation: Observation | None = None,
        group_mean: float = 0.0,
    ) -> tuple[float, dict[str, Any]]:
        """Training has gone on to a step; returns the reward and `info`.

        Args:
            step: optimiser steps done.
            loss: mean training loss of the interval; None if it was not finite.
            ended: whether the episode is over.
            held_out_loss: at the end, unless the run failed.
            observation: the next one, before the end.
            group_mean: mean improvement of the group, at the end.
        """
        if observation is not None:
            self.observation = observation
        self._losses.append((step, np.nan if loss is None else loss))
        self._held_out = held_out_loss
        reward = Reward(0.0, 0.0, self._churn)
        if ended:
            reward = Reward(self.improvement(held_out_loss), group_mean, self._churn)
        if ended and (held_out_loss is None or not np.isfinite(held_out_loss)):
            # A failed run gets the worst reward, whatever the rest of its group did.
            reward = Reward(-REWARD_BOUND)
        return reward.value, self.info(step, loss, reward)

    def info(self, step: int, loss: float | None = None, reward: Reward | None = None) -> dict[str, Any]:
        """The same keys at each step; see the environment's manual."""
        problem: AllocationProblem = self._controller.problem()
        reward = reward or Reward()
        return {
            "task": self.task,
            "step": step,
            "loss": loss,
            "held_out_loss": self._held_out,
            "uniform_loss": self.reference.uniform,
            "cost": plan_cost(problem.cost, problem.ranks),
            "limit": problem.limit,
            "ranks": tuple(problem.ranks.tolist()),
            "non_finite": bool(self._losses) and loss is None,
            "improvement": reward.improvement,
            "group_mean": reward.group_mean,
            "churn": reward.churn,
        }

    @property
    def trace(self) -> EpisodeTrace:
        """What has happened so far, for a picture."""
        controller, problem = self._controller, self.observation.problem  # others may train the adapters since
        # Before the first decision: the probe's rank 1 everywhere.
        first = not self._steps
        return EpisodeTrace(
            title=self.task,
            names=controller.names,
            blocks=problem.blocks,
            total_steps=controller.total_steps,
            steps=(0,) if first else tuple(self._steps),
            ranks=np.stack([problem.ranks] if first else self._ranks),
            costs=(plan_cost(problem.cost, problem.ranks),) if first else tuple(self._costs),
            limit=problem.limit,
            unit=controller.cost.unit,
            losses=tuple(self._losses),
            held_out_loss=self._held_out,
            uniform_loss=self.reference.uniform,
        )
