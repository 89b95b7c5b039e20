"""fracrule's placement, and inside it ranks by what the gradients tell; decided anew at every decision."""

from __future__ import annotations

from dataclasses import dataclass

from ...allocation.observation import Observation, mean_feature, module_feature
from ...allocation.policy import Decision, decision_from_scores
from ...common.arrays import FloatArray

HEUR3 = ("sensitivity", "snr", "relative_change")
"""The signals whose mean is heur3."""


@dataclass(frozen=True)
class SignalRule:
    """fracrule's placement, and inside it ranks by signals; by heur3, the mean of three centred log signals.

    Under a parameter budget, where depth is free and the floor is rank 1, that is heur3 over all modules.

    Attributes:
        name: what logs and tables call it.
        gain: exponent of the ranks in the score; the default was the best on training tasks for heur3.
        signals: features whose mean is the score.
    """

    name: str = "heur3"
    gain: float = 0.5
    signals: tuple[str, ...] = HEUR3

    def decide(self, observation: Observation) -> Decision:
        """Scores from the signals alone."""
        return decision_from_scores(observation, self.gain * mean_feature(observation, self.signals))


@dataclass(frozen=True)
class UtilityPerPrice:
    """heur3 over the price of a rank: what a module promises for each byte, or for each parameter."""

    name: str = "utility-per-byte"

    def decide(self, observation: Observation) -> Decision:
        """Scores are log signal minus log price."""
        return decision_from_scores(observation, signal_score(observation) - module_feature(observation, "price"))


def signal_score(observation: Observation) -> FloatArray:
    """heur3: the mean of the three centred log signals, (modules,); see docs/design.md."""
    return mean_feature(observation, HEUR3)
