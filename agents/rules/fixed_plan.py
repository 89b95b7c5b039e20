"""Rules that make a plan without signals at the first decision, and keep it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...allocation.observation import Observation
from ...allocation.plan import uniform_ranks
from ...allocation.policy import Decision, decision_from_plan, decision_to_keep, is_first
from ...allocation.problem import AllocationProblem
from ...common.arrays import IntArray


@dataclass(frozen=True)
class FixedPlan:
    """One plan for the whole run.

    Attributes:
        name: the name in logs and tables.
        ranks: makes the plan, int64 (modules,). Ranks between two rungs are rounded down, and what is then left is
            spent.
    """

    name: str
    ranks: Callable[[AllocationProblem], IntArray]

    def decide(self, observation: Observation) -> Decision:
        """The plan at the first decision, and no change at later ones."""
        if not is_first(observation):
            return decision_to_keep(observation)
        return decision_from_plan(self.ranks(observation.problem))


def window_ranks(problem: AllocationProblem, start: float, end: float) -> IntArray:
    """The largest rank that fits on neighbouring layers, the window, while no other layer is adapted.

    Args:
        problem: the plans that are possible; current ranks play no part.
        start: where the window begins, as a share of the layers from the bottom up, 0 to 1. It is rounded to layers.
        end: where it ends, likewise; a window has at least one layer.

    Returns:
        Any whole ranks, int64 (modules,). Where not even rank 1 fits, those of `uniform_ranks`.
    """
    layers = np.unique(problem.blocks)
    first = min(round(start * len(layers)), len(layers) - 1)
    chosen = np.isin(problem.blocks, layers[first : max(round(end * len(layers)), first + 1)])

    def on_window(rank: int) -> IntArray:
        return np.where(chosen, problem.uniform(rank), problem.uniform(0))

    ranks = range(1, problem.ladder.ranks[-1] + 1)
    rank = bisect_left(ranks, True, key=lambda r: not problem.fits(on_window(r)))
    return on_window(rank) if rank else uniform_ranks(problem)


@dataclass(frozen=True)
class Window:
    """`window_ranks` for one window, as a function that can be pickled.

    Attributes:
        start: see `window_ranks`.
        end: see `window_ranks`.
    """

    start: float
    end: float = 1.0

    def __call__(self, problem: AllocationProblem) -> IntArray:
        """The ranks."""
        return window_ranks(problem, self.start, self.end)
