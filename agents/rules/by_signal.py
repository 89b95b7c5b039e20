"""Rules that adapt the modules of top-down and give them ranks by their signals, at every decision anew."""

from __future__ import annotations

from dataclasses import dataclass

from ...allocation.observation import Observation, mean_feature, module_feature
from ...allocation.policy import Decision, decision_from_scores
from ...common.arrays import FloatArray

MEAN_SIGNALS = ("sensitivity", "snr", "relative_change")
"""The signals whose mean the rule signal-mean takes as scores."""


@dataclass(frozen=True)
class SignalRule:
    """Adapts the modules of top-down, and gives more rank to those with larger signals.

    Under a budget of parameters the rank floor is 1, so that all modules are adapted that the budget allows.

    Attributes:
        name: the name in logs and tables.
        gain: by what the mean is multiplied to give the score; the default was the best on training tasks.
        signals: features whose mean is taken; each is the log of a signal minus its mean over the modules.
    """

    name: str = "signal-mean"
    gain: float = 0.5
    signals: tuple[str, ...] = MEAN_SIGNALS

    def decide(self, observation: Observation) -> Decision:
        """Scores are the mean of the signals, times the gain."""
        return decision_from_scores(observation, self.gain * mean_feature(observation, self.signals))


@dataclass(frozen=True)
class UtilityPerCost:
    """As signal-mean, but relative to what a rank costs: by signal for each byte, or for each parameter."""

    name: str = "utility-per-byte"

    def decide(self, observation: Observation) -> Decision:
        """Scores are the mean log signal minus the log cost of a rank."""
        return decision_from_scores(observation, signal_mean(observation) - module_feature(observation, "rank_cost"))


def signal_mean(observation: Observation) -> FloatArray:
    """The mean of the three signals of signal-mean, each as a log minus its mean, (modules,)."""
    return mean_feature(observation, MEAN_SIGNALS)
