"""A change of ranks that no policy asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..common.arrays import IntArray


@dataclass(frozen=True, eq=False)
class Correction:
    """A change of ranks that no policy asked for.

    Attributes:
        step: the optimiser steps before it.
        reason: why, for the decision log.
        wanted: ranks of the plan before, the current ones where there was none, int64 (modules,).
        observation: the state of the run before it.
        plan: the new plan.
    """

    step: int
    reason: str
    wanted: IntArray
    observation: Observation
    plan: Plan
