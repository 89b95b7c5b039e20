"""A change of ranks that no policy asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..allocation.policy import Decision, decision_from_plan
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

    @property
    def decision(self) -> Decision:
        """What is logged as the decision: the ranks that were wanted."""
        return decision_from_plan(self.wanted)

    @property
    def notes(self) -> dict[str, str]:
        """The reason, for each module that has another rank now."""
        moved = np.flatnonzero(self.plan.ranks != self.observation.problem.ranks)
        return {self.observation.names[module]: self.reason for module in moved.tolist()}
