"""Decisions of a log taken again, by the policy that took them or by another one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ...agents.learned.policy import LearnedPolicy
from ...allocation.log import DecisionRecord
from ...allocation.policy import Decision, Policy, decided_plan, keeps
from ...common.arrays import IntArray
from ...errors import ConfigError
from .case import aimed_as


@dataclass(frozen=True, eq=False)
class Redecision:
    """A logged decision taken again.

    Attributes:
        decision: as it is taken now.
        ranks: of the plan to which it leads, int64 (modules,).
        differences: what differs from the log, in words; empty if all is equal, bit for bit.
    """

    decision: Decision
    ranks: IntArray
    differences: tuple[str, ...]


def redecide(logged: DecisionRecord, policy: Policy) -> Redecision:
    """Take a logged decision again.

    Where the log's policy drew plans at a temperature, this one draws with the same temperature and seed. It has the
    same goal, if its networks tell plans of any cost apart.

    Args:
        logged: the decision, as `DecisionLog.logged` gives it.
        policy: who decides now.

    Raises:
        ConfigError: no policy decided there.
    """
    if logged.correction:
        raise ConfigError(f"At step {logged.step} the guard or a person changed the ranks; no policy decided there.")
    deliberation = logged.deliberation
    if deliberation and deliberation.temperature and isinstance(policy, LearnedPolicy):
        policy = replace(policy, temperature=deliberation.temperature, seed=deliberation.seed)
    decision = aimed_as(policy, logged).decide(logged.observation)
    ranks = decided_plan(logged.problem, decision).ranks
    return Redecision(decision, ranks, tuple(_differences(logged, decision, ranks)))


def _differences(logged: DecisionRecord, decision: Decision, ranks: IntArray) -> list[str]:
    scalars = ("rank_floor", "depth_bias", "log_prob", "expected", "uncertainty")
    found = [name for name in scalars if getattr(logged.decision, name) != getattr(decision, name)]
    if logged.kept != keeps(logged.observation, decision):
        found.append("kept")
    pairs = {
        "score": (logged.decision.scores, decision.scores),
        "rank_wanted": (logged.rank_wanted, decision.ranks),
        "rank_after": (logged.rank_after, ranks),
    }
    found += [name for name, (old, new) in pairs.items() if not np.array_equal(old, new)]
    then, now = logged.deliberation, decision.deliberation
    if then is not None and now is not None:
        names = [each.name for each in fields(then)]
        found += [name for name in names if not _same(getattr(then, name), getattr(now, name))]
    elif (then is None) != (now is None):
        found.append("deliberation")
    return found


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)
