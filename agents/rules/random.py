"""Random scores: what any rule has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ...allocation.observation import Observation
from ...allocation.policy import Decision, decision_from_scores, decision_to_keep, is_first


@dataclass(frozen=True)
class RandomScores:
    """Normal scores with a standard deviation of 1, drawn at the first decision; its plan is kept.

    Deterministic: the draw depends on what is observed, to two decimals, and on nothing else.

    Attributes:
        name: what logs and tables call it.
        draw: which of many draws.
    """

    name: str = "random"
    draw: int = 0

    def decide(self, observation: Observation) -> Decision:
        """A random plan at first, and no change after it."""
        if not is_first(observation):
            return decision_to_keep(observation)
        seen = np.concatenate([observation.run, observation.modules.ravel()]).round(2) + np.float32(0)  # no -0
        digest = hashlib.sha256(seen.tobytes()).digest()
        generator = np.random.default_rng([self.draw, *digest])
        return decision_from_scores(observation, generator.normal(size=len(observation.modules)))
