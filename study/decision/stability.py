"""How far a decision depends on noise in the signals: it is taken again with noise added to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...allocation.log import DecisionRecord
from ...allocation.policy import Policy
from ...common.arrays import BoolArray, FloatArray
from ...errors import ConfigError
from ...lora.signals import SIGNALS
from .case import Case, with_signals

PROBE_NOISE = 0.3
"""The noise that signals have: two probes of one task on other batches differ so much (docs/experiments.md)."""

SURE = 0.9
"""A module is sure whose rank stays within a rung in this share of the draws."""


@dataclass(frozen=True, eq=False)
class Stability:
    """What noise leaves of a decision.

    Attributes:
        noise: standard deviation of what was added to each signal of each module, in log.
        draws: how often.
        same: share of the draws with the same plan.
        near: share of the draws in which a module's rank stays within one rung, float64 (modules,).
    """

    noise: float
    draws: int
    same: float
    near: FloatArray

    @property
    def sure(self) -> BoolArray:
        """The modules whose rank noise does not move, bool (modules,)."""
        return self.near >= SURE

    def sentence(self) -> str:
        """The same in words."""
        return (
            f"Noise of {self.noise:g} in the log of every signal leaves the plan as it is in {self.same:.0%} of "
            f"{self.draws} draws; {int(self.sure.sum())} of {len(self.near)} modules stay within one rung in at least "
            f"{SURE:.0%} of them."
        )

    def to_json(self) -> dict[str, Any]:
        """What pages read, as JSON values."""
        return {"same": self.same, "noise": self.noise, "sure": self.sure.tolist()}


def stability(logged: DecisionRecord, policy: Policy, noise: float = 0.05, draws: int = 50) -> Stability:
    """Take a decision again with normal noise on the signals.

    Args:
        logged: the decision.
        policy: takes it again.
        noise: standard deviation, in log; at least 0.
        draws: how often, at least 1. They are the same each time.

    Raises:
        ConfigError: noise or draws out of range, or no policy decided there.
    """
    if not noise >= 0 or draws < 1:
        raise ConfigError(f"noise is at least 0 and draws are at least 1; got {noise} and {draws}.")
    case, generator = Case(logged, policy), np.random.default_rng(0)
    ladder, shape = logged.problem.ladder, (len(case.plan), len(SIGNALS))
    shifts = (generator.normal(0, noise, shape) for _ in range(draws))
    plans = np.stack([case.decide(with_signals(case.observation, shift)) for shift in shifts])
    rungs = np.abs(ladder.rung(plans) - ladder.rung(case.plan))
    return Stability(noise, draws, float((plans == case.plan).all(axis=1).mean()), (rungs <= 1).mean(axis=0))
