"""What every policy is, hand-written or learned: it decides on an observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..errors import ConfigError, shown
from ..plan.plan import Plan, base_depth_bias, base_rank_floor, pack, project
from ..plan.problem import AllocationProblem
from .deliberation import Deliberation
from .observation import Observation


@dataclass(frozen=True, eq=False)
class Decision:
    """What a policy wants.

    Attributes:
        ranks: the wanted ranks, int64 (modules,); `project` rounds them down onto the ladder.
        scores: the log of each module's rank relative to the others, (modules,). Where the wanted ranks do not fit the
            budget, modules with low scores give way first.
        rank_floor: the rank floor from which the wanted ranks follow; 0 if they do not follow from scores.
        depth_bias: the depth bias from which they follow; 0 if they do not follow from scores.
        log_prob: log-probability of the plan; None for a policy that takes the same plan each time.
        expected: the improvement that the policy expects. With a value ensemble: over uniform rank, and at later
            decisions over no change, in the unit of the votes. Without one: over the rule that the policy started from,
            in shares of the headroom. 0 for a rule.
        uncertainty: standard deviation of `expected` over the members of the ensemble; 0 for a rule.
        exact: no more than the wanted ranks; what is left of the budget is left.
        deliberation: what the decision was chosen from; None for a policy without a value ensemble.
    """

    ranks: IntArray
    scores: FloatArray
    rank_floor: float = 0.0
    depth_bias: float = 0.0
    log_prob: float | None = None
    expected: float = 0.0
    uncertainty: float = 0.0
    exact: bool = False
    deliberation: Deliberation | None = None


class Policy(Protocol):
    """Decides ranks, for any number of modules and whatever their names are."""

    @property
    def name(self) -> str:
        """The name in logs and tables."""

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation."""


def decision_from_plan(ranks: IntArray) -> Decision:
    """The decision that wants these ranks, whole numbers from 0 on, (modules,), and prefers no module to another.

    Raises:
        ConfigError: they are something else.
    """
    values = np.asarray(ranks)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.all((values >= 0) & (values == np.floor(values))):
        raise ConfigError(f"Ranks are whole numbers from 0 on, one for each module; got {shown(ranks)}.")
    return Decision(values.astype(np.int64), np.zeros(len(values)))


def decision_to_keep(observation: Observation) -> Decision:
    """The decision that leaves all ranks as they are, even where the budget has room for more."""
    ranks = observation.problem.ranks
    return Decision(ranks, np.zeros(len(ranks)), exact=True)


def keeps(observation: Observation, decision: Decision) -> bool:
    """Whether a decision leaves all ranks as they are."""
    return decision.exact and bool(np.array_equal(decision.ranks, observation.problem.ranks))


def decided_plan(problem: AllocationProblem, decision: Decision) -> Plan:
    """The plan to which a decision leads: `project`, or if it is exact the wanted ranks as far as they fit."""
    return project(problem, decision.ranks, decision.scores, fill=not decision.exact)


def is_first(observation: Observation) -> bool:
    """Whether this is a run's first decision, which may use the whole ladder."""
    return observation.problem.max_step is None


def decision_from_scores(
    observation: Observation,
    scores: FloatArray,
    placement: Sequence[float] | FloatArray = (0.0, 0.0),
) -> Decision:
    """The decision that a policy's scores and placement lead to.

    Args:
        observation: of the decision.
        scores: the log of each module's rank relative to the others, (modules,).
        placement: log2 of a factor on the rank floor, and what is added to the depth bias; see `PLACEMENT`.

    Raises:
        ConfigError: the scores are no finite numbers, one for each module.
    """
    problem = observation.problem
    given, scores = scores, np.asarray(scores)
    if scores.shape != (len(observation.names),) or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all():
        raise ConfigError(
            f"Scores are finite numbers, one for each of {len(observation.names)} modules; got {shown(given)}."
        )
    scores = scores.astype(np.float64)
    rank_floor = float(base_rank_floor(problem) * 2.0 ** placement[0])
    depth_bias = float(base_depth_bias(problem) + placement[1])
    return Decision(pack(problem, scores, rank_floor, depth_bias), scores, rank_floor, depth_bias)
