"""The contract that rules and learned policies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..common.arrays import FloatArray, IntArray
from .actions import decode
from .observation import Observation


@dataclass(frozen=True, eq=False)
class Decision:
    """What a policy wants.

    Attributes:
        ranks: the ranks that it wants, int64 (modules,); `project` rounds them down onto the ladder.
        scores: log rank relative to the other modules, (modules,); orders the projection.
        rank_floor: rank floor that decided how deep the adapters go; 0 where a plan was made without one.
        depth_bias: how much upper layers went before lower ones; 0 where a plan was made without one.
        log_prob: log-probability density of the scores and steering numbers; 0 for a rule.
        expected: improvement over uniform rank, later over no change, in standard deviations between plans; of a
            policy without plan critics over the rule that it started from, in shares of the headroom; 0 for a rule.
        uncertainty: standard deviation of that among the policy's critics; 0 for a rule.
    """

    ranks: IntArray
    scores: FloatArray
    rank_floor: float = 0.0
    depth_bias: float = 0.0
    log_prob: float = 0.0
    expected: float = 0.0
    uncertainty: float = 0.0


class Policy(Protocol):
    """Anything that decides ranks, for any number of modules and with no regard to their names."""

    @property
    def name(self) -> str:
        """What logs and tables call it."""

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation."""


def decision_from_plan(ranks: IntArray) -> Decision:
    """The decision that asks for these ranks, int64 (modules,); `project` spends what the ladder leaves."""
    return Decision(ranks, np.zeros(len(ranks)))


def decision_to_keep(observation: Observation) -> Decision:
    """The decision that leaves all ranks as they are."""
    return decision_from_plan(observation.problem.ranks)


def is_first(observation: Observation) -> bool:
    """Whether this is a run's first decision, which may use the whole ladder."""
    return observation.problem.max_step is None


def decision_from_scores(
    observation: Observation,
    scores: FloatArray,
    placement: Sequence[float] | FloatArray = (0.0, 0.0),
    log_prob: float = 0.0,
) -> Decision:
    """The decision that scores and corrections of floor and depth bias ask for; see `decode`."""
    ranks, rank_floor, depth_bias = decode(observation.problem, scores, placement)
    return Decision(ranks, scores, rank_floor, depth_bias, log_prob)
