"""The policy interface, for rules and learned policies: an observation leads to a decision, a decision to a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.errors import ConfigError, shown
from ..common.text import part_of, plural
from .choice import Choice
from .observation import Observation
from .plan.plan import Plan, base_placement, pack, project
from .plan.problem import AllocationProblem
from .rate_control import KEEP


@dataclass(frozen=True, eq=False)
class Decision:
    """Output of a policy.

    Attributes:
        ranks: the wanted ranks, int64 (modules,); `project` rounds them down onto the ladder.
        scores: log of each module's rank relative to the others, (modules,). If the wanted ranks exceed the budget,
            modules with low scores give way first.
        rank_floor: rank floor behind the wanted ranks; 0 if they do not follow from scores.
        depth_bias: depth bias behind the wanted ranks; 0 if they do not follow from scores.
        exact: take exactly the wanted ranks, and leave the rest of the budget unused.
        choice: the choice behind the decision; None for a policy without predictions about plans.
        change: change of the learning rate, as an index into `rate_control.CHANGES`.
    """

    ranks: IntArray
    scores: FloatArray
    rank_floor: float = 0.0
    depth_bias: float = 0.0
    exact: bool = False
    choice: Choice | None = None
    change: int = KEEP


class Policy(Protocol):
    """Decides ranks, for any number of modules with any names."""

    @property
    def name(self) -> str:
        """The name in logs and tables."""

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation."""


def reads_signals(policy: Policy) -> bool:
    """True if a policy reads module signals, so they must be probed; the default unless the policy opts out."""
    return bool(getattr(policy, "reads_signals", True))


def steers_rate(policy: Policy) -> bool:
    """True if a policy's decisions also change the learning rate, see `Decision.change`; policies opt in."""
    return bool(getattr(policy, "steers_rate", False))


def decision_from_plan(ranks: IntArray) -> Decision:
    """Return a decision for these ranks, integers >= 0, (modules,), with no preference among modules.

    Raises:
        ConfigError: they are invalid.
    """
    if not are_ranks(ranks):
        raise ConfigError(f"Ranks must be whole numbers of at least 0, one per module; got {shown(ranks)}.")
    return Decision(np.asarray(ranks).astype(np.int64), np.zeros(len(ranks)))


def are_ranks(given: Any) -> bool:
    """True if the argument holds integers >= 0, (modules,)."""
    values = np.asarray(given)
    numbers = values.ndim == 1 and values.dtype.kind in "iuf"
    return numbers and bool(np.all((values >= 0) & (values == np.floor(values))))


def asked(policy: Policy, observation: Observation) -> Decision:
    """Return a policy's decision, checked.

    Raises:
        ConfigError: it is not a decision, or its ranks do not match these modules, or are all 0.
    """
    decision, names = policy.decide(observation), observation.names
    wanted = decision.ranks if isinstance(decision, Decision) else decision
    if not isinstance(decision, Decision) or not are_ranks(wanted) or len(wanted) != len(names) or not np.any(wanted):
        raise ConfigError(
            f"Policy {policy.name!r} decided {shown(wanted)}. A rankpilot Decision needs a whole number of at "
            f"least 0 as rank for each of {len(names)} modules, at least one above 0, or nothing would be "
            "trained."
        )
    return replace(decision, ranks=np.asarray(wanted).astype(np.int64))


def rounding(policy: Policy, observation: Observation, decision: Decision) -> str:
    """Message on wanted ranks between two rungs of the ladder, ignoring modules already at that rank."""
    ladder, wanted = observation.problem.ladder, decision.ranks
    between = (ladder.array[ladder.rung(wanted)] != wanted) & (wanted != observation.problem.ranks)
    if not between.any():
        return ""
    ranks, rungs = (", ".join(map(str, each)) for each in (np.unique(wanted[between])[:3], ladder.ranks))
    return f"{policy.name} requests rank {ranks}, rounded down to the ladder {rungs}."


def decision_to_keep(observation: Observation) -> Decision:
    """Return the decision to keep all ranks, even if the budget has room for more."""
    ranks = observation.problem.ranks
    return Decision(ranks, np.zeros(len(ranks)), exact=True)


def keeps(observation: Observation, decision: Decision) -> bool:
    """True if a decision keeps all ranks."""
    return decision.exact and bool(np.array_equal(decision.ranks, observation.problem.ranks))


def decided_plan(problem: AllocationProblem, decision: Decision) -> Plan:
    """Return the plan of a decision: `project`, or for an exact decision the wanted ranks as long as they fit."""
    return project(problem, decision.ranks, decision.scores, fill=not decision.exact)


def is_first(observation: Observation) -> bool:
    """True at a run's first decision, free to use the whole ladder."""
    return observation.problem.max_step is None


def decision_from_scores(observation: Observation, scores: FloatArray) -> Decision:
    """Return the decision for a policy's scores.

    Args:
        observation: observation at the decision.
        scores: log of each module's rank relative to the others, (modules,).

    Raises:
        ConfigError: the scores are not finite numbers, one per module.
    """
    problem = observation.problem
    given, scores, count = scores, np.asarray(scores), len(observation.names)
    if scores.shape != (count,) or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all():
        raise ConfigError(f"Scores must be finite numbers, one for each of {count} modules; got {shown(given)}.")
    scores = scores.astype(np.float64)
    rank_floor, depth_bias = base_placement(problem)
    return Decision(pack(problem, scores, rank_floor, depth_bias), scores, rank_floor, depth_bias)


def plan_distance(ranks: IntArray, reference: IntArray) -> FloatArray:
    """Distance of plans from a reference: the mean of abs(log2(1 + rank) - log2(1 + reference)) over the modules.

    Args:
        ranks: (..., modules).
        reference: (modules,).

    Returns:
        Distances, (...).
    """
    return np.asarray(np.abs(np.log2(1.0 + ranks) - np.log2(1.0 + reference)).mean(axis=-1))


def decision_line(step: int, before: IntArray, after: IntArray, cost: float, limit: float, unit: str) -> str:
    """Summarize a decision in one line: "step 28: 9 modules moved, 12.1 of 12.3 GiB, mean rank 9.4".

    Args:
        step: optimizer steps done before the decision.
        before: ranks before it, int (modules,).
        after: ranks of the plan, int (modules,). Their mean counts modules without an adapter as rank 0.
        cost: predicted cost of the plan.
        limit: the budget.
        unit: unit of both: "bytes" or "parameters".
    """
    count = int(np.count_nonzero(np.asarray(before) != np.asarray(after)))
    moved = f"{plural(count, 'module')} changed" if count else "no module changed"
    if step == 0:  # earlier ranks only served for measuring
        moved = f"{np.count_nonzero(after)} of {len(after)} modules adapted"
    return f"step {step}: {moved}, {part_of(cost, limit, unit)}, mean rank {np.mean(after):.1f}"
