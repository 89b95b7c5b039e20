"""From wishes to a plan: ranks that fit the budget and spend all of it.

Two steps, shared by the environment and the Trainer callback:

* `pack` turns scores into the ranks that they ask for: how many layers are adapted follows from a rank floor
  (fewer layers at a useful rank beat all layers at a thin one, since depth is what costs bytes), and inside them ranks
  go as exp(score);
* `project` turns wanted ranks into a plan: clipped to the ladder and the bounds, over budget repaired, under budget
  filled.

Both move along the ladder in the order of log(rank) - score, so equal scores give equal ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.units import format_bytes
from ..errors import BudgetError
from ..memory.cost import ByteCost, moment_costs, plan_cost
from .fixed_cost import FixedCost
from .plan_builder import PlanBuilder
from .problem import HYSTERESIS, AllocationProblem

__all__ = ["HYSTERESIS", "AllocationProblem", "Plan", "check_budget", "pack", "project", "uniform_ranks"]

TOP_DOWN = 100.0
"""Depth bias with which scores only decide inside a layer."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A feasible plan.

    Attributes:
        clipped: the wanted ranks, rounded down onto the ladder and clipped to the bounds, int64 (modules,).
        ranks: ranks that fit, int64 (modules,).
        cost: what they cost, in the unit of the problem.
    """

    clipped: IntArray
    ranks: IntArray
    cost: float


def check_budget(problem: AllocationProblem, names: list[str]) -> None:
    """Make sure that the lower bounds fit, and with none of them at least one module at the lowest rank above 0.

    Raises:
        BudgetError: they do not; names the smallest budget that works and what takes it.
    """
    ladder = problem.ladder.array
    if problem.bottoms.any():
        least = ladder[problem.bottoms]
        count = np.count_nonzero(least)
        first = names[int(np.argmax(least > 0))]
        cause = f"not the lower bounds on the ranks of {count} modules"
        where = f"(rank {least.max()} at most, {first!r} among them)"
        if count == 1:
            cause, where = f"not the lower bound on the rank of {first!r}", f"(rank {least.max()} on it alone)"
    elif not problem.tops.any():
        raise BudgetError("The upper bounds on the ranks leave no module a rank above 0.")
    else:
        nothing = FixedCost(problem.cost, np.zeros(len(names), dtype=np.bool_))
        alone = nothing.value[:, None] + nothing.additions(np.arange(len(names))) + problem.cost.per_rank * ladder[1]
        cheapest = int(np.argmin(np.where(problem.tops > 0, alone.max(axis=0), np.inf)))
        least = np.where(np.arange(len(names)) == cheapest, ladder[1], 0)
        cause, where = "no adapter at all", f"(rank {ladder[1]} on {names[cheapest]!r} alone)"
    if not problem.fits(least):
        needed, given, reason = _shortfall(problem, least)
        raise BudgetError(f"The budget of {given} fits {cause}. The smallest that works is {needed} {where}.{reason}")


def _shortfall(problem: AllocationProblem, ranks: IntArray) -> tuple[str, str, str]:
    """What a plan needs, what there is, and what takes it and would lower it, for people."""
    cost, needed = problem.cost, plan_cost(problem.cost, ranks)
    if not isinstance(cost, ByteCost):
        return f"{needed:.0f} parameters", f"{problem.limit:.0f}", ""
    costs, adapter = moment_costs(cost, ranks), cost.per_rank @ ranks
    peak = int(np.argmax(costs))
    always = cost.constant.min()
    parts = (
        (always, "to what trains outside the adapter and whatever else is held at all times"),
        (cost.constant[peak] - always, "to what that moment alone holds"),
        (costs[peak] - adapter[peak] - cost.constant[peak], "to what is saved for backward"),
        (adapter[peak], "to the adapter itself"),
    )
    shares = [f"{format_bytes(size)} of it goes {use}" for size, use in parts if size > 0]
    reason = (
        f" The peak is at {cost.moments[peak]}: {', '.join(shares)}. A smaller per-device batch, shorter sequences or "
        "gradient checkpointing lower it."
    )
    return format_bytes(needed, up=True), format_bytes(problem.limit), reason


def uniform_window(problem: AllocationProblem) -> tuple[int, int] | None:
    """The rank, at least 1, and the lowest layer of the best plan with one rank on whole layers; None if none fits."""
    blocks = range(int(problem.blocks.max()) + 1)
    lowest = bisect_left(blocks, True, key=lambda block: problem.fits(problem.uniform(1, block)))
    if lowest not in blocks or not problem.uniform(1, lowest).any():
        return None
    ranks = range(1, problem.ladder.ranks[-1] + 1)
    return bisect_left(ranks, True, key=lambda r: not problem.fits(problem.uniform(r, lowest))), lowest


def uniform_ranks(problem: AllocationProblem) -> IntArray:
    """The best plan with one rank: on all modules if rank 1 fits there, else on as many top layers as fit.

    Not tied to the ladder: the largest whole rank up to the ladder's end; `low` and `high` bound it for each module.
    Where not even the top layer fits at rank 1, as many of its modules as fit, at ranks as equal as may be.
    """
    window = uniform_window(problem)
    if window:
        return problem.uniform(*window)
    return pack(problem.fresh(), np.zeros(len(problem.ranks)), rank_floor=1.0)


def pack(problem: AllocationProblem, scores: FloatArray, rank_floor: float, depth_bias: float = TOP_DOWN) -> IntArray:
    """The ranks that a set of scores asks for, as if every module were free to move between its bounds.

    Modules are admitted as long as they can have the floor rank, in the order of score + depth bias * layer: with a
    large depth bias layers from the top down, the lowest in part; with none the best scores wherever they are, and of
    equal ones those further up. Then every admitted module starts at rank 1 and ranks rise in the order of log(rank) -
    score until the budget is spent. With equal scores and a large depth bias this is "top-down" of docs/design.md.

    Args:
        problem: the current state; its `max_step` and `pinned` are ignored.
        scores: log rank relative to the other modules, float (modules,).
        rank_floor: rank that an adapted module should at least be able to have, > 0.
        depth_bias: how much a module's score counts less than that of one in the next layer up, in log rank.

    Returns:
        Ranks on the ladder, int64 (modules,); no more than the lower bounds if nothing else fits.
    """
    for rung in range(int(np.clip(problem.ladder.rung(round(max(rank_floor, 1))), 1, problem.ladder.top)), 0, -1):
        rungs = _admit(problem, scores, rung, depth_bias)
        if (rungs > problem.bottoms).any():
            break
    draft = PlanBuilder(problem, scores, np.maximum(np.minimum(rungs, 1), problem.bottoms))
    if (rungs > problem.bottoms).any():
        draft.raise_adapted(problem.tops)
    else:  # no module of the top layer fits, but a smaller one further down may
        draft.fill(problem.tops)
    return draft.ranks


def _admit(problem: AllocationProblem, scores: FloatArray, rung: int, depth_bias: float) -> IntArray:
    """Rungs with as many modules at `rung` as fit: neighbours from one layer together, the last in part."""
    draft = PlanBuilder(problem, scores, problem.bottoms)
    rungs = np.clip(rung, problem.bottoms, problem.tops)
    order = np.lexsort((-problem.blocks, -(draft.preference + depth_bias * problem.blocks)))
    for members in np.split(order, np.flatnonzero(np.diff(problem.blocks[order])) + 1):
        able = members[rungs[members] > draft.rungs[members]]
        if not draft.lift_all(able, rungs[able]):
            for member in able.tolist():
                draft.lift(member, int(rungs[member]))
            break
    return draft.rungs


def project(problem: AllocationProblem, wanted: IntArray, scores: FloatArray) -> Plan:
    """The plan nearest to the wanted ranks that keeps to the budget and leaves nothing of it unspent.

    Args:
        problem: the current state.
        wanted: ranks, int (modules,); rounded down onto the ladder, then clipped to `max_step` and to the bounds.
        scores: decide who gives way and who is filled up first, float (modules,).

    Returns:
        The plan. It exceeds `max_step` downwards, and drops pinned modules, if the budget leaves no other way; where
        the lower bounds alone exceed the budget, it is those.
    """
    lower, upper = problem.bounds()
    wished = np.clip(problem.ladder.rung(wanted), lower, upper)
    pinned = problem.is_pinned
    draft = PlanBuilder(problem, scores, wished)
    draft.lower(lower)
    draft.lower(np.where(pinned, lower, problem.bottoms))
    if not draft.fits():
        droppable = pinned & (problem.bottoms == 0)
        draft.drop(np.flatnonzero(droppable & (wished > 0)))
        upper = np.where(droppable, 0, upper)
    draft.fill(upper)
    return Plan(problem.ladder.array[wished], draft.ranks, plan_cost(problem.cost, draft.ranks))
