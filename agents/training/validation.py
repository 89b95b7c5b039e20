"""How good a policy is while it trains: its runs of validation tasks, and the best network so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...common.arrays import Arrays
from ...env.reward import Comparison
from ...env.tasks.proxy_task import ProxyTask
from .ppo_policy import RankPolicy
from .rollout_env import ProxyVecEnv

BOUND = 1.0
"""Improvements on one task count from minus to plus this, so that no task alone decides which network is best."""


def greedy(policy: RankPolicy) -> Callable[[Arrays], Any]:
    """Mean actions."""

    @torch.no_grad()
    def act(arrays: Arrays) -> Any:
        return policy.get_distribution(policy.obs_to_tensor(arrays)[0]).mode().cpu().numpy()

    return act


class Validation:
    """Measures the policy on validation tasks, and keeps the best one.

    Attributes:
        best: state of the best network so far, and its score.
    """

    def __init__(self, tasks: Sequence[ProxyTask], envs: ProxyVecEnv) -> None:
        self._tasks, self._envs = tasks, envs
        self._start: list[float] = []
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None

    def measure(self, policy: RankPolicy) -> dict[str, float]:
        """Run the tasks; improvements over the untrained policy and over uniform, in shares of the headroom."""
        losses = self._envs.play(self._tasks, greedy(policy))
        self._start = self._start or losses
        headrooms = [task.reference.headroom for task in self._tasks if task.reference]
        uniform = [task.reference.uniform for task in self._tasks if task.reference]
        row = {}
        for name, baseline in (("over_start", self._start), ("over_uniform", uniform)):
            comparisons = [Comparison(*each) for each in zip(baseline, headrooms, strict=True)]
            shares = [other.improvement(loss, BOUND) for other, loss in zip(comparisons, losses, strict=True)]
            row[name] = float(np.mean(shares))
        if self.best is None or row["over_start"] > self.best[0]:
            state = {name: value.clone() for name, value in policy.network.state_dict().items()}
            self.best = row["over_start"], state
        return row

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"start": self._start, "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._start, self.best = state["start"], state["best"]
