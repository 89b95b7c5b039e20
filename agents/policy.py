"""The contract that rules and learned policies share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..env.observation import MODULE_FEATURES, Observation
from ..env.score_actions import decode
from ..lora.cost import FloatArray
from ..lora.ladder import IntArray


@dataclass(frozen=True, eq=False)
class Decision:
    """What a policy wants.

    Attributes:
        deltas: rungs to move, int64 (modules,).
        scores: log rank relative to the other modules, (modules,); orders the projection.
        floor: rank floor that decided how deep the adapters go.
        log_prob: log-probability density of the scores and floor; 0 for a rule.
    """

    deltas: IntArray
    scores: FloatArray
    floor: float
    log_prob: float


class Policy(Protocol):
    """Anything that decides ranks, for any number of modules and with no regard to their names."""

    @property
    def name(self) -> str:
        """What logs and tables call it."""

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation."""


def decision_from_scores(
    observation: Observation, scores: FloatArray, floor_shift: float, log_prob: float = 0.0
) -> Decision:
    """The decision that scores and a floor correction (log2) ask for."""
    deltas, floor = decode(observation.problem, scores, floor_shift)
    return Decision(deltas, scores, floor, log_prob)


def signal_score(observation: Observation) -> FloatArray:
    """heur3: the mean of the three centred log signals, (modules,); see docs/design.md."""
    columns = [MODULE_FEATURES.index(name) for name in ("sensitivity", "snr", "relative_change")]
    return np.asarray(observation.modules[:, columns].mean(axis=1), dtype=np.float64)
