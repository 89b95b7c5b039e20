"""Rules: hand-written policies, from which a learned one starts and with which it is compared.

| rule | its plan | reads signals |
|---|---|---|
| uniform | one rank on as many top layers as can have rank 8 (rank 1 under a budget of parameters) | no |
| top-half | one rank on the top half of the layers | no |
| top-down | one rank on as many top layers as can have rank 16, and on some modules of the next one | no |
| random | random scores, the rank floor of top-down | no |
| gradient-norm | the modules of top-down, ranks by one signal | yes |
| signal-mean | the modules of top-down, ranks by the mean of three signals | yes |

Rules that read signals make a new plan at every decision. So does top-down, but from the same scores. The others keep
the plan of the first decision. A new rule is a policy (`agents/policy.py`) and an entry here. A plan that a person
wrote is a policy too: `given_plan.PlanFile`.

The rules: plans without signals, plans by signals, and random ones.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..errors import UnknownNameError
from ..plan.plan import uniform_ranks
from ..plan.problem import AllocationProblem
from .observation import Observation, mean_feature
from .policy import Decision, Policy, decision_from_plan, decision_from_scores, decision_to_keep, is_first

MEAN_SIGNALS = ("sensitivity", "snr", "relative_change")
"""The signals whose mean the rule signal-mean takes as scores."""


@dataclass(frozen=True)
class TopDown:
    """Equal ranks on as many top layers as can have the rank floor, and on some modules of the next layer down.

    Attributes:
        name: the name in logs and tables.
    """

    name: str = "top-down"

    def decide(self, observation: Observation) -> Decision:
        """Equal scores, and the usual rank floor."""
        return decision_from_scores(observation, np.zeros(len(observation.modules)))


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


def signal_mean(observation: Observation) -> FloatArray:
    """The mean of the three signals of signal-mean, each as a log minus its mean, (modules,)."""
    return mean_feature(observation, MEAN_SIGNALS)


@dataclass(frozen=True)
class FixedPlan:
    """One plan for the whole run, made at the first decision without signals.

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


@dataclass(frozen=True)
class Window:
    """The largest rank that fits on neighbouring layers, the window, while no other layer is adapted.

    Attributes:
        start: where the window begins, as a share of the layers from the bottom up, 0 to 1. It is rounded to layers.
        end: where it ends, likewise; a window has at least one layer.
    """

    start: float
    end: float = 1.0

    def __call__(self, problem: AllocationProblem) -> IntArray:
        """Any whole ranks, int64 (modules,); where not even rank 1 fits on the window, those of `uniform_ranks`.

        Args:
            problem: the plans that are possible; current ranks play no part.
        """
        layers = np.unique(problem.blocks)
        first = min(round(self.start * len(layers)), len(layers) - 1)
        chosen = np.isin(problem.blocks, layers[first : max(round(self.end * len(layers)), first + 1)])

        def on_window(rank: int) -> IntArray:
            return np.where(chosen, problem.uniform(rank), problem.uniform(0))

        ranks = range(1, problem.ladder.ranks[-1] + 1)
        rank = bisect_left(ranks, True, key=lambda r: not problem.fits(on_window(r)))
        return on_window(rank) if rank else uniform_ranks(problem)


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


__all__ = [
    "MEAN_SIGNALS",
    "RULES",
    "FixedPlan",
    "RandomScores",
    "SignalRule",
    "TopDown",
    "Window",
    "find_rule",
    "signal_mean",
]

_RULES: tuple[Policy, ...] = (
    TopDown(),
    SignalRule(),
    FixedPlan("uniform", uniform_ranks),
    FixedPlan("top-half", Window(1 / 2)),
    RandomScores(),
    SignalRule("gradient-norm", signals=("gradient_norm",)),
)
RULES: dict[str, Policy] = {rule.name: rule for rule in _RULES}


def find_rule(name: str) -> Policy:
    """The rule of that name; UnknownNameError if there is none."""
    if name not in RULES:
        raise UnknownNameError.of(
            "rule", name, RULES, "A trained policy is given by its folder, a plan by its .yaml file."
        )
    return RULES[name]
