"""top-down's placement, and inside it ranks by what the gradients tell; decided anew at every decision."""

from __future__ import annotations

from dataclasses import dataclass

from ...allocation.observation import Observation, mean_feature, module_feature
from ...allocation.policy import Decision, decision_from_scores
from ...common.arrays import FloatArray

MEAN_SIGNALS = ("sensitivity", "snr", "relative_change")
"""The signals whose mean is signal-mean."""


@dataclass(frozen=True)
class SignalRule:
    """top-down's placement, and inside it ranks by signals; by signal-mean, the mean of three centred log signals.

    Under a parameter budget, where depth is free and the floor is rank 1, that is signal-mean over all modules.

    Attributes:
        name: what logs and tables call it.
        gain: exponent of the ranks in the score; the default was the best on training tasks for signal-mean.
        signals: features whose mean is the score.
    """

    name: str = "signal-mean"
    gain: float = 0.5
    signals: tuple[str, ...] = MEAN_SIGNALS

    def decide(self, observation: Observation) -> Decision:
        """Scores from the signals alone."""
        return decision_from_scores(observation, self.gain * mean_feature(observation, self.signals))


@dataclass(frozen=True)
class UtilityPerCost:
    """signal-mean over the cost of a rank: what a module promises for each byte, or for each parameter."""

    name: str = "utility-per-byte"

    def decide(self, observation: Observation) -> Decision:
        """Scores are log signal minus log cost."""
        return decision_from_scores(observation, signal_mean(observation) - module_feature(observation, "rank_cost"))


def signal_mean(observation: Observation) -> FloatArray:
    """signal-mean: the mean of the three centred log signals, (modules,); see docs/design.md."""
    return mean_feature(observation, MEAN_SIGNALS)
