"""Random scores, which every other rule should beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ...allocation.observation import Observation
from ...allocation.policy import Decision, decision_from_scores, decision_to_keep, is_first


@dataclass(frozen=True)
class RandomScores:
    """Normal scores with standard deviation 1 at the first decision; the plan is kept at later ones.

    The draw depends only on the observation, rounded to two decimals, so that a decision can be reproduced.

    Attributes:
        name: the name in logs and tables.
        draw: number of the draw; each gives other scores.
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
