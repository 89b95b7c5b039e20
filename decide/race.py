"""Racing of learning rates: which lanes of a run leave, judged by their losses on the same batches.

Lanes are copies of a run that differ in the learning rate alone. Their losses on a batch share its difficulty, so
differences between lanes have little noise. They mean nothing before the end of the schedule's warm-up: too high a rate
looks best until it is reached. Soon after, a higher rate only falls behind further, while a lower one still catches
up; much later, every lower rate looks better than it ends under a schedule that decays. Under one that does not, the
rate that leads then is twice too high at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray

LEAST_WARM_UP = 12
"""Shorter warm-ups count as this many optimizer steps, and so do the steps from the end of one to the first look."""

FIRST_LOOK, END = 1.25, 2.0
"""A race is looked at and ends after these multiples of the warm-up's steps."""

LOOKS = 8
"""Looks per warm-up."""

MOST_TIME = 0.4
"""Steps of all further lanes together, as a share of the run's steps."""

SURELY_BEHIND, SURELY_BETTER = 3.0, 2.0
"""Standard errors: a lane this far behind leaves, and one this far ahead of the start replaces it."""


@dataclass(frozen=True)
class RaceLength:
    """Optimizer steps of a race.

    Attributes:
        warm_up: steps in which the rate rises; their losses are not judged.
        first: steps before the first look.
        last: steps after which the race ends.
    """

    warm_up: int
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
        last = max(min(math.ceil(END * warm_up), int(MOST_TIME * total_steps / max(lanes - 1, 1))), 1)
        first = max(math.ceil(FIRST_LOOK * warm_up), warm_up + LEAST_WARM_UP)
        return cls(warm_up, min(first, last), last)

    def looks(self, step: int) -> bool:
        """Return True if the lanes are judged after this number of steps."""
        every = max(self.warm_up // LOOKS, 1)
        return step >= self.last or (step >= self.first and (step - self.first) % every == 0)


def time_for_one_more(further: int, steps: int, total_steps: int) -> bool:
    """Return True if there is time for one more lane to repeat all steps so far.

    Args:
        further: steps of all further lanes so far.
        steps: optimizer steps so far.
        total_steps: optimizer steps of the run.
    """
    return further + steps + 1 <= MOST_TIME * total_steps


def staying(losses: FloatArray, start: int, length: RaceLength, *, decays: bool = True) -> list[int]:
    """Return the lanes that stay in a race, by index in ascending order; one if it ends.

    A lane leaves if another one is surely ahead, unless it has a lower rate and its distance shrinks.

    Args:
        losses: losses of all steps so far, (lanes, steps), the lanes in ascending order of their rates; NaN and
            infinity are losses without bound.
        start: index of the lane to continue with if nothing is sure.
        length: the length of the race.
        decays: False if the schedule stays at its peak. The run then continues one lane below the leader.
    """
    steps = losses.shape[1]
    begin = max(min(steps - LEAST_WARM_UP, (length.warm_up + steps) // 2), 0)
    seen = np.log(np.clip(np.nan_to_num(losses[:, begin:], nan=1e6, posinf=1e6), 1e-6, 1e6))
    best = int(seen.mean(axis=1).argmin())

    def leaves(lane: int) -> bool:
        if not decays and lane == best - 1:
            return False
        behind = seen[lane] - seen[best]
        half = len(behind) // 2
        catches_up = lane < best and behind[half:].mean() < behind[: half or 1].mean()
        return bool(behind.mean() > SURELY_BEHIND * _error(behind)) and not catches_up

    stay = [lane for lane in range(len(seen)) if lane == best or not leaves(lane)]
    if steps < length.last or len(stay) == 1:
        return stay
    ahead = seen[start] - seen[best]
    leader = start if start in stay and ahead.mean() <= SURELY_BETTER * _error(ahead) else best
    return [leader if decays else stay[max(stay.index(leader) - 1, 0)]]


def _error(differences: FloatArray) -> float:
    """Return the standard error of a mean of differences."""
    return float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
