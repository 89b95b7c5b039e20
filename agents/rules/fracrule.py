"""Hand-written policies: what a learned one starts from and is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..env.observation import Observation
from ..errors import UnknownNameError
from .policy import Decision, Policy, decision_from_scores, signal_score


@dataclass(frozen=True)
class FracRule:
    """Equal ranks on the top layers: as many layers as can have the floor rank, the lowest in part."""

    name: str = "fracrule"

    def decide(self, observation: Observation) -> Decision:
        """Equal scores."""
        return decision_from_scores(observation, np.zeros(len(observation.modules)), 0.0)


@dataclass(frozen=True)
class SignalRule:
    """fracrule's placement, and inside it ranks by heur3: the mean of the three centred log signals.

    Attributes:
        gain: exponent of the ranks in the score; the default was the best on training tasks.
    """

    name: str = "heur3"
    gain: float = 0.5

    def decide(self, observation: Observation) -> Decision:
        """Scores from the signals alone."""
        return decision_from_scores(observation, self.gain * signal_score(observation), 0.0)


RULES: dict[str, Policy] = {rule.name: rule for rule in (FracRule(), SignalRule())}


def find_rule(name: str) -> Policy:
    """The rule of that name; UnknownNameError if there is none."""
    if name not in RULES:
        raise UnknownNameError.of("rule", name, RULES, "A trained policy is given by its folder.")
    return RULES[name]
