"""The reward of an episode: how much better it ended than what it is compared with, less the cost of its moves.

    reward = clip((other loss - loss) / headroom, -3, 3) - churn

* *other loss*: the held-out loss of the run that it is compared with: uniform rank, or a rule's run on the same task,
  seed and batches;
* *headroom*: what a better allocation could gain over that run, nearly;
* *churn*: a small cost of rungs moved after the first decision.

All of it comes at the end of the episode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..agents.rules import RULES, find_rule
from ..allocation.policy import Policy
from ..common.arrays import IntArray
from ..errors import ConfigError, UnknownNameError, shown
from .tasks.finetune import Reference

REWARD_BOUND = 3.0
"""Improvements lie between minus and plus this; a loss that is not finite gets the lower end."""

CHURN = 0.002
"""Cost of moving every module by one rung."""

UNIFORM = "uniform"
"""What episodes are compared with, unless a rule is named: the uniform run of their task."""


def rule_to_compare_with(against: str) -> Policy | None:
    """The rule whose runs episodes are compared with; None for the uniform run.

    Raises:
        ConfigError: it is no name.
        UnknownNameError: there is no such rule.
    """
    if not isinstance(against, str):
        raise ConfigError(f"against is {UNIFORM!r} or the name of a rule; got {shown(against)}.")
    if against == UNIFORM:
        return None
    try:
        return find_rule(against)
    except UnknownNameError:
        raise UnknownNameError.of("comparison", against, [*dict.fromkeys([UNIFORM, *RULES])]) from None


@dataclass(frozen=True)
class Comparison:
    """What a run is compared with.

    Attributes:
        loss: held-out loss of the other run, in nats; NaN or infinite if it failed.
        headroom: what a better allocation could gain over it, nearly, in nats, > 0.
    """

    loss: float
    headroom: float

    @classmethod
    def with_uniform(cls, reference: Reference) -> Comparison:
        """With the uniform run of a task."""
        return cls(reference.uniform, reference.headroom)

    @classmethod
    def with_run(cls, loss: float, initial: float, reference: Reference, others: Sequence[float]) -> Comparison:
        """With another run of the same task, seed and batches.

        Args:
            loss: that run's held-out loss. Where it is not finite, the median of the others stands in, or the initial
                loss if there are none.
            initial: held-out loss before training.
            reference: of this task or of one like it; tells how the headroom compares with what uniform gains.
            others: finite losses of the runs that are compared.
        """
        level = loss if math.isfinite(loss) else float(np.median(others)) if len(others) else initial
        gain = max(initial - level, 0.01 * initial, 1e-6)
        return cls(level, gain * reference.headroom / reference.gain)

    def improvement(self, loss: float | None, bound: float = REWARD_BOUND) -> float:
        """How much lower a loss is, as a share of the headroom, from -bound to bound.

        A run that failed (None, NaN or infinite) gets the lower end, and one that is compared with a failed run the
        upper one; where both failed it is 0.
        """
        failed, other_failed = loss is None or not math.isfinite(loss), not math.isfinite(self.loss)
        if failed or other_failed:
            return bound * (other_failed - failed)
        assert loss is not None
        return min(max((self.loss - loss) / self.headroom, -bound), bound)


def churn_cost(before: IntArray, after: IntArray) -> float:
    """Cost of going from some rungs to others, (modules,) each."""
    return CHURN * float(np.abs(after - before).mean())
