"""Convert scores to wanted ranks, and wanted ranks to a plan that uses the whole budget.

Every decision takes these two steps, in an episode and in a real fine-tune:

* `pack` turns scores into wanted ranks. The rank floor determines the number of adapted modules: a few layers at a
  useful rank are worth more than all layers at rank 1, because memory depends mostly on the lowest adapted layer. Among
  the adapted modules, ranks are proportional to exp(score).
* `project` turns wanted ranks into a plan. It clips them to the ladder and the bounds, lowers ranks until they fit,
  and raises ranks until nothing more fits.

Both change one rung at a time in order of log(rank) - score, so equal scores give equal ranks.

Some plans read no signal: one rank, or nearly one, on the top layers, such as `uniform_ranks`. Without gradient
checkpointing, adapting the top layers at a useful rank was better than any other plan with the same bytes
(docs/design.md).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...common.arrays import FloatArray, IntArray
from ...common.errors import BudgetError
from ...common.text import format_bytes, given_bytes
from ...cost.cost import Cost, FixedCost, ParameterCost, moment_costs, plan_cost
from ...lora.spec import REFERENCE_RANK, ModuleSpec
from .problem import AllocationProblem, PlanBuilder

TOP_DOWN = 100.0
"""A depth bias large enough for scores to matter only within a layer."""


STAY_ROOM = 1.001
"""Cost of the configured ranks, as a share of the limit, up to which they stay."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan and its inputs.

    Attributes:
        clipped: the wanted ranks, rounded down onto the ladder and clipped to the bounds, int64 (modules,).
        ranks: the plan, int64 (modules,).
        cost: cost of the plan, in the unit of the problem.
    """

    clipped: IntArray
    ranks: IntArray
    cost: float


def check_budget(problem: AllocationProblem, names: list[str], share: float | None = None) -> None:
    """Check that some plan fits: the lower bounds, or without bounds one module at the lowest rank above 0.

    Args:
        problem: the allowed plans.
        names: names of the modules, for the error.
        share: the limit as a share of plain LoRA's cost, if given this way.

    Raises:
        BudgetError: none fits; the error states the smallest working budget, and the largest contributions to it.
    """
    least = least_ranks(problem)
    if problem.bottoms.any():
        count, first = np.count_nonzero(least), names[int(np.argmax(least > 0))]
        cause = f"the lower bounds on the ranks of {count} modules"
        where = f"(rank {least.max()} at most, including {first!r})"
        if count == 1:
            cause, where = f"the lower bound on the rank of {first!r}", f"(only rank {least.max()} on it)"
    else:
        cause, where = "any adapter", f"(only rank {least.max()} on {names[int(np.argmax(least))]!r})"
    if not problem.fits(least):
        needed, given, reason = _shortfall(problem, least, share)
        raise BudgetError(f"The {given} is too small for {cause}. The smallest that works is {needed} {where}.{reason}")


def least_ranks(problem: AllocationProblem) -> IntArray:
    """Return the cheapest plan with an adapter: the lower bounds, or one module at the lowest rank above 0.

    Returns:
        Ranks, int64 (modules,).

    Raises:
        BudgetError: the upper bounds allow no adapter.
    """
    ladder, modules = problem.ladder.array, np.arange(len(problem.tops))
    if problem.bottoms.any():
        return ladder[problem.bottoms]
    if not problem.tops.any():
        raise BudgetError("The upper bounds leave no module a rank above 0.")
    nothing = FixedCost(problem.cost, np.zeros(len(modules), dtype=np.bool_))
    alone = nothing.value[:, None] + nothing.additions(modules) + problem.cost.per_rank * ladder[1]
    cheapest = int(np.argmin(np.where(problem.tops > 0, alone.max(axis=0), np.inf)))
    return np.where(modules == cheapest, ladder[1], 0)


def least_cost(modules: Sequence[ModuleSpec], low: IntArray | None, high: IntArray | None, cost: Cost) -> float:
    """Cost of the cheapest plan with an adapter; see `least_ranks`, and `AllocationProblem.of` for the arguments."""
    return plan_cost(cost, least_ranks(AllocationProblem.of(modules, cost, math.inf, low=low, high=high)))


def _shortfall(problem: AllocationProblem, ranks: IntArray, share: float | None) -> tuple[str, str, str]:
    """Return, for an error, the cost of a plan, the limit, and the largest contributions with ways to lower them.

    Savings lower the bytes of plain LoRA as well, so they do not help if the limit is a share of them.
    """
    cost, needed = problem.cost, plan_cost(problem.cost, ranks)
    costs, adapter = moment_costs(cost, ranks), cost.per_rank @ ranks
    peak = int(np.argmax(costs))
    held = cost.constant[peak]
    as_share = "" if share is None else f", or {math.ceil(100 * share * needed / problem.limit)}% as a share"
    if cost.unit == "parameters":
        return f"{needed:.0f} parameters{as_share}", f"budget of {problem.limit:.0f}", ""
    parts = (
        (held, "for tensors unrelated to the adapter (such as other trainable parameters)"),
        (costs[peak] - adapter[peak] - held, "for tensors saved or computed for backward (activations, logits)"),
        (adapter[peak], "for the adapter itself"),
    )
    shares = [f"{format_bytes(size)} of it is {use}" for size, use in parts if size > 0]
    advice = " A smaller per-device batch, shorter sequences, or gradient checkpointing if it is off would lower it."
    reason = f" The peak is at {cost.moments[peak]}. {', '.join(shares)}.{advice if share is None else ''}"
    needs = f"'{format_bytes(needed, up=True)} step'{as_share}"
    return needs, f"budget of {given_bytes(problem.limit)} per step", reason


def uniform_ranks(problem: AllocationProblem) -> IntArray:
    """One rank on all modules of as many top layers as can have a useful one, the simple baseline.

    It adapts as many layers as fit at rank 8, the common choice, or at rank 1 under a budget of parameters, where depth
    is free (docs/design.md, "Uniform rank"); at least the top layer. They get the largest integer rank within the
    limit.

    Args:
        problem: the allowed plans; `max_step`, `pinned` and current ranks are ignored.

    Returns:
        Integer ranks up to the ladder's end, within the bounds of each module, int64 (modules,). If not even the top
        layer fits at rank 1, some of its modules are adapted, at ranks as equal as possible.
    """
    least_rank = 1 if isinstance(problem.cost, ParameterCost) else REFERENCE_RANK
    blocks = range(int(problem.blocks.max()) + 1)
    lowest = bisect_left(blocks[:-1], True, key=lambda block: problem.fits(problem.uniform(least_rank, block)))
    ranks = range(1, problem.ladder.ranks[-1] + 1)
    rank = bisect_left(ranks, True, key=lambda rank: not problem.fits(problem.uniform(rank, lowest)))
    if rank and (plan := problem.uniform(rank, lowest)).any():
        return plan
    return pack(problem.fresh(), np.zeros(len(problem.ranks)), rank_floor=1.0)


def pack(problem: AllocationProblem, scores: FloatArray, rank_floor: float, depth_bias: float = TOP_DOWN) -> IntArray:
    """Wanted ranks for these scores, assuming every module may move to any rank within its bounds.

    First, modules are admitted in order of score + depth bias * layer, as long as all of them can have the rank floor.
    With a high depth bias these are the top layers, and part of the next one down; without a bias they are the modules
    with the best scores, ties going to those further up. Then every admitted module starts at rank 1, and ranks rise in
    order of log(rank) - score until the budget is spent. With equal scores and a high depth bias this is the rule
    top-down (docs/design.md).

    Args:
        problem: the allowed plans; `max_step` and `pinned` are ignored.
        scores: log of each module's rank relative to the others, float (modules,).
        rank_floor: rank to reserve for every adapted module, > 0.
        depth_bias: score penalty per layer further down, in log rank.

    Returns:
        Ranks on the ladder, int64 (modules,); the lower bounds if nothing more fits.
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
    """Rungs with as many modules as fit at `rung`; the last layer reached may be partial."""
    rungs, ladder = np.clip(rung, problem.bottoms, problem.tops), problem.ladder.array
    order = np.lexsort((-problem.blocks, -(problem.preference(scores) + depth_bias * problem.blocks)))
    blocks, turns = problem.blocks[order], np.zeros_like(order)
    turns[order[1:]] = np.cumsum(blocks[1:] != blocks[:-1])  # consecutive modules of one layer share a turn

    def admitted(turn: int) -> IntArray:
        return np.where(turns < turn, rungs, problem.bottoms)

    all_turns = range(1, int(turns[order[-1]]) + 2)
    whole = bisect_left(all_turns, True, key=lambda turn: not problem.fits(ladder[admitted(turn)]))
    draft = PlanBuilder(problem, scores, admitted(whole))
    for member in order[(turns[order] == whole) & (rungs[order] > problem.bottoms[order])].tolist():
        draft.lift(member, int(rungs[member]))
    return draft.rungs


def project(problem: AllocationProblem, wanted: IntArray, scores: FloatArray, *, fill: bool = True) -> Plan:
    """Return the plan nearest to the wanted ranks that uses the whole budget.

    Args:
        problem: the allowed plans.
        wanted: wanted ranks, int (modules,). They are rounded down onto the ladder and clipped to `max_step` and the
            bounds.
        scores: modules with low scores are lowered first, those with high scores are raised first, float (modules,).
        fill: raise ranks until nothing more fits. If False, no rank exceeds the wanted one.

    Returns:
        The plan. Only if nothing else fits, it goes below `max_step` and drops pinned modules. If not even the lower
        bounds fit, the plan is the lower bounds.
    """
    lower, upper = problem.bounds()
    clipped = np.clip(problem.ladder.rung(wanted), lower, upper)
    pinned = problem.is_pinned
    draft = PlanBuilder(problem, scores, clipped)
    if not fill and draft.fits():
        return Plan(problem.ladder.array[clipped], draft.ranks, float(draft.costs.max()))
    draft.lower(lower)
    draft.lower(np.where(pinned, lower, problem.bottoms))
    if not draft.fits():
        droppable = pinned & (problem.bottoms == 0)
        draft.drop(np.flatnonzero(droppable & (clipped > 0)))
        upper = np.where(droppable, 0, upper)
    draft.fill(upper if fill else np.minimum(upper, clipped))
    return Plan(problem.ladder.array[clipped], draft.ranks, float(draft.costs.max()))


RANK_FLOOR = 16.0
"""Rank to reserve for every adapted module: about a quarter of the width of the models it was measured on."""


def top_down(problem: AllocationProblem) -> IntArray:
    """Equal ranks on as many top layers as can have `RANK_FLOOR`, and on some modules of the next layer down.

    If the top layer cannot have the rank floor, a lower one is used. The whole budget is spent.

    Args:
        problem: the allowed plans; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.

    Returns:
        Ranks on the ladder, int64 (modules,), none of which can be raised.
    """
    fresh = problem.fresh()
    scores = np.zeros(len(problem.ranks))
    return project(fresh, pack(fresh, scores, RANK_FLOOR), scores).ranks


DEPTH_BIAS = 4.0
"""Depth bias under a budget of bytes."""


def base_placement(problem: AllocationProblem) -> tuple[float, float]:
    """Rank floor and depth bias of a plan from scores; 1 and 0 under a budget of parameters: depth is free."""
    return (1.0, 0.0) if isinstance(problem.cost, ParameterCost) else (RANK_FLOOR, DEPTH_BIAS)


def outcome_text(passed: IntArray, ranks: IntArray) -> str:
    """Describe what became of the ranks of the LoraConfig, in a run that keeps them if it can.

    Args:
        passed: the ranks of the adapter as it was passed, int64 (modules,).
        ranks: the ranks of the first plan, int64 (modules,).
    """
    if np.array_equal(passed, ranks):
        least, most = passed.min(), passed.max()
        return f"The LoRA stays as configured: rank {least if least == most else f'{least} to {most}'}."
    return (
        "The LoRA as configured does not fit this budget, and nothing that keeps the losses makes it fit: the mean "
        f"rank shrinks from {passed.mean():.3g} to {ranks.mean():.3g}."
    )
