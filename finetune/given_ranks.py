"""Ranks that somebody gives in the middle of a run, whatever the policy says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..agents.rules.given_plan import GivenPlan
from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..allocation.policy import Decision, decided_plan
from ..common.arrays import IntArray
from ..errors import ConfigError


def given_ranks(observation: Observation, ranks: Mapping[str, int]) -> tuple[Decision, Plan]:
    """The decision for given ranks, and the plan that it leads to.

    Args:
        observation: of the run.
        ranks: of all target modules, by full name.

    Returns:
        The decision, whose ranks are those given, and the plan, which may be lower where they are above the budget.

    Raises:
        UnknownNameError, ConfigError: a module is unknown or missing, or cannot have its rank.
    """
    first = replace(observation, problem=observation.problem.fresh())
    decision = GivenPlan("given", ranks).decide(first)
    _check_allowed(first, decision.ranks)
    return decision, decided_plan(first.problem, decision)


def _check_allowed(observation: Observation, ranks: IntArray) -> None:
    """Raise ConfigError if a rank is not on the ladder, or above what its module can have; ranks int64 (modules,)."""
    problem = observation.problem
    most = np.minimum(ranks, problem.max_ranks)
    wrong = np.flatnonzero(problem.ladder.array[problem.ladder.rung(most)] != ranks)
    if len(wrong):
        module = int(wrong[0])
        allowed = [rank for rank in problem.ladder.ranks if rank <= problem.max_ranks[module]]
        raise ConfigError(
            f"{observation.names[module]!r} cannot have rank {ranks[module]}. Allowed: {', '.join(map(str, allowed))}."
        )
