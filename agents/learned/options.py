"""All plans between which a policy chooses whose networks tell plans of any cost apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...allocation.observation import Observation
from ...allocation.policy import decided_plan
from ...allocation.problem import AllocationProblem
from ...common.arrays import IntArray
from ...memory.cost import TimedCost
from .candidates import BASIS, FIXED, Candidates
from .cheaper import with_less, with_less_time
from .structures import ALL_LINEAR, all_linear, structure_plans

SHARES = (0.2, 0.4, 0.6, 0.8)
"""Lower limits of the fixed candidates; see `with_less`."""


def all_options(observation: Observation, candidates: Candidates, *, plain_first: bool) -> Candidates:
    """Candidates of a first decision, with others beside them.

    After the fixed ones come plain LoRA, plans that follow from the model's structure, as far as they fit, and the
    fixed candidates under lower limits of the budget and, where it is known, of the time of a step. Those that were
    drawn are the last.

    Args:
        observation: of the first decision.
        candidates: see `candidate_actions`.
        plain_first: put plain LoRA before all others, which are then compared with it.
    """
    problem = observation.problem
    plans = {name: ranks for name, ranks in structure_plans(observation) if ranks.any() and problem.fits(ranks)}
    count, fixed = len(observation.modules), candidates.rows(slice(0, FIXED))
    plain = _without_scores({ALL_LINEAR: all_linear(problem)}, count)
    exact = fixed.with_uniform_plan(problem)
    return Candidates.joined(
        *((plain, exact) if plain_first else (exact, plain)),
        _without_scores(plans, count),
        *_for_less(observation, fixed),
        candidates.rows(slice(FIXED, None)),
    )


def _without_scores(plans: dict[str, IntArray], modules: int) -> Candidates:
    """Candidates that follow from no scores; perhaps none.

    Args:
        plans: by name, ranks (modules,).
        modules: how many there are.
    """
    count = len(plans)
    return Candidates(
        tuple(plans), np.zeros((count, len(BASIS))), np.zeros((count, modules)), np.zeros((count, 2)), plans
    )


def _for_less(observation: Observation, fixed: Candidates) -> list[Candidates]:
    """The fixed candidates under lower limits."""
    problem = observation.problem
    kinds = [(with_less, "of the budget")]
    if isinstance(problem.cost, TimedCost):
        kinds.append((with_less_time, "of the time"))
    found = []
    for limited, of_what in kinds:
        for share in SHARES:
            less = replace(observation, problem=limited(problem, share))
            decisions = fixed.with_uniform_plan(less.problem).decisions(less)
            plans = {
                f"{name} for {share:.0%} {of_what}": decided_plan(less.problem, decision).ranks
                for name, decision in zip(fixed.names, decisions, strict=True)
            }
            found.append(Candidates(tuple(plans), fixed.weights, fixed.scores, fixed.placements, plans))
    return found


def can_take(problem: AllocationProblem, ranks: IntArray) -> bool:
    """Whether a plan fits and keeps the ladder and the bounds; ranks int64 (modules,)."""
    rungs = problem.ladder.rung(ranks)
    on_ladder = (problem.ladder.array[rungs] == ranks).all() and (rungs >= problem.bottoms).all()
    return bool(on_ladder and (rungs <= problem.tops).all() and problem.fits(ranks))
