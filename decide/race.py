"""Racing of learning rates: which lanes of a run leave, judged by their losses on the same batches.

Lanes are copies of a run that differ in the learning rate alone. Their losses on a batch share its difficulty, so
differences between lanes have little noise. Before the schedule's warm-up ends they say nothing: a rate too high looks
best while it is not reached yet. A lane whose lead shrinks has not won.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray

FIRST_LOOK, LAST_LOOK = 2.0, 3.0
"""A race ends between these multiples of the warm-up's steps."""

LEAST_WARM_UP = 12
"""Shorter warm-ups count as this many steps."""

MOST_TIME = 0.4
"""Steps of all further lanes together, as a share of the run's steps."""

SURE = 2.0
"""Standard errors of a sure difference."""


@dataclass(frozen=True)
class RaceLength:
    """Steps of a race.

    Attributes:
        first: optimizer steps before the first look.
        last: optimizer steps after which it ends in any case.
    """

    first: int
    last: int

    @classmethod
    def of(cls, warm_up: int, total_steps: int, lanes: int) -> RaceLength:
        """Return the length of a race.

        Args:
            warm_up: optimizer steps in which the schedule's rate rises.
            total_steps: optimizer steps of the run.
            lanes: number of lanes.
        """
        warm_up = max(warm_up, LEAST_WARM_UP)
        most = int(MOST_TIME * total_steps / max(lanes - 1, 1))
        last = max(min(math.ceil(LAST_LOOK * warm_up), most), 1)
        return cls(min(math.ceil(FIRST_LOOK * warm_up), last), last)


def lead(losses: FloatArray) -> tuple[float, float, float]:
    """Return by how much one lane is ahead of another, its standard error, and the change of that lead.

    Args:
        losses: logarithms of the losses of the two lanes on the same batches, the leader's first, (2, steps).
    """
    by = losses[1] - losses[0]
    half = len(by) // 2
    error = float(by.std(ddof=1)) / math.sqrt(len(by)) if len(by) > 1 else math.inf
    change = float(by[half:].mean() - by[:half].mean()) if half else 0.0
    return float(by.mean()), error, change


def window(losses: FloatArray) -> FloatArray:
    """Return the later half of the steps, (lanes, steps)."""
    return np.log(np.maximum(losses[:, losses.shape[1] // 2 :], 1e-6))


def staying(losses: FloatArray, start: int, *, ends: bool) -> list[int]:
    """Return the lanes that stay in a race, by index, in ascending order.

    A lane leaves if the one with the lowest loss is surely ahead and its lead does not shrink.

    Args:
        losses: losses of the steps so far, (lanes, steps); NaN and infinity are losses without bound.
        start: index of the lane that stays where there is no evidence.
        ends: True if the race ends here: one lane stays.
    """
    seen = window(np.nan_to_num(losses, nan=1e6, posinf=1e6))
    best = int(seen.mean(axis=1).argmin())
    stay = []
    for lane in range(len(seen)):
        ahead, error, change = lead(seen[[best, lane]])
        if lane == best or ahead <= SURE * error or change < -0.5 * ahead:
            stay.append(lane)
    if not ends:
        return stay
    return [start if start in stay else best]
