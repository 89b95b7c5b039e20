"""The reward of an episode, in parts.

    reward = clip(improvement - mean of the group, -3, 3) - churn

* *improvement*: at the end, how much lower the held-out loss is than the uniform run's, as a share of the headroom.
* *mean of the group*: of the episodes of the same task, seed and batches that have ended; what is left is the effect of
  the actions (0 for an episode by itself).
* *churn*: a small cost of rungs moved after the first decision.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from ..common.arrays import IntArray
from .tasks.finetune import Reference

REWARD_BOUND = 3.0
"""Improvements, and what is left of them without the group's mean, lie between minus and plus this; a loss that is not
finite gets the lower end."""

CHURN = 0.002
"""Cost of moving every module by one rung."""


@dataclass(frozen=True)
class Reward:
    """The parts of one step's reward, each in the unit of the reward.

    Attributes:
        improvement: over the uniform run, -3 to 3; 0 before the end.
        group_mean: mean improvement of the group's episodes, this one included; 0 before the end.
        churn: cost of the rungs that were moved, at least 0.
    """

    improvement: float = 0.0
    group_mean: float = 0.0
    churn: float = 0.0

    @property
    def value(self) -> float:
        """The reward."""
        relative = self.improvement - self.group_mean
        return _bounded(relative) - self.churn


def terminal_improvement(reference: Reference, held_out_loss: float | None) -> float:
    """How much better a run ended than the uniform one, in shares of the headroom, -3 to 3; None is a failed run."""
    if held_out_loss is None or not math.isfinite(held_out_loss):
        return -REWARD_BOUND
    share = (reference.uniform - held_out_loss) / reference.headroom
    return _bounded(share)


def _bounded(value: float) -> float:
    return min(max(value, -REWARD_BOUND), REWARD_BOUND)


def churn_cost(before: IntArray, after: IntArray) -> float:
    """Cost of going from some rungs to others, (modules,) each."""
    return CHURN * float(np.abs(after - before).mean())


class GroupMeans:
    """Mean improvement of the episodes that a group runs side by side; each slot's n-th episode is of round n."""

    def __init__(self) -> None:
        self._ended: dict[tuple[int, int], list[float]] = defaultdict(list)

    def add(self, group: int, round_: int, improvement: float) -> None:
        """An episode has ended."""
        self._ended.pop((group, round_ - 2), None)
        self._ended[group, round_].append(improvement)

    def mean(self, group: int, round_: int) -> float:
        """Of those of the round that have ended so far."""
        return float(np.mean(self._ended[group, round_]))
