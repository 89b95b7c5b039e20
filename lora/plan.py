"""From wishes to a plan: ranks that fit the budget and spend all of it.

Two steps, shared by the environment and the Trainer callback:

* `pack` turns scores into the ranks that they ask for: how many layers are adapted follows from a rank floor
  (fewer layers at a useful rank beat all layers at a thin one, since depth is what costs bytes), and inside them ranks
  go as exp(score);
* `project` turns rank deltas into a plan: clipped to the ladder, over budget repaired, under budget filled.

Both move along the ladder in the order of log(rank) - score, so equal scores give equal ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError
from .budget import format_bytes
from .draft import Draft
from .ladder import IntArray, RankLadder
from .memory import Cost, FloatArray, ParameterCost, total_cost
from .pricing import fixed_price
from .targets import TargetModule


@dataclass(frozen=True, eq=False)
class PlanProblem:
    """Everything that decides which plans are possible.

    Attributes:
        ranks: current ranks, int64 (modules,).
        max_ranks: the largest useful rank of each module, int64 (modules,).
        blocks: layer of each module, 0 at the bottom, int64 (modules,).
        cost: price of a plan.
        limit: what a plan may cost, in the unit of `cost`.
        ladder: allowed ranks.
        max_step: how many rungs a module may move at this decision; None for any number.
        held: modules that must keep their rank or be dropped, bool (modules,); None for no module.
    """

    ranks: IntArray
    max_ranks: IntArray
    blocks: IntArray
    cost: Cost
    limit: float
    ladder: RankLadder
    max_step: int | None = None
    held: NDArray[np.bool_] | None = None

    @property
    def tops(self) -> IntArray:
        """The highest rung that each module may reach, (modules,)."""
        return self.ladder.rung(self.max_ranks)

    def price(self, ranks: IntArray) -> float:
        """What a plan costs."""
        return total_cost(self.cost, ranks)

    def fits(self, ranks: IntArray) -> bool:
        """Whether a plan keeps to the budget."""
        return self.price(ranks) <= self.limit

    def unbounded(self) -> PlanProblem:
        """The same problem without the limit on steps."""
        return replace(self, max_step=None)


def problem_of(
    targets: Sequence[TargetModule],
    cost: Cost,
    limit: float,
    *,
    ladder: RankLadder | None = None,
    max_step: int | None = None,
) -> PlanProblem:
    """The plans that are possible for these modules at their current ranks."""
    return PlanProblem(
        ranks=np.array([target.rank for target in targets], dtype=np.int64),
        max_ranks=np.array([target.max_rank for target in targets], dtype=np.int64),
        blocks=np.array([target.block for target in targets], dtype=np.int64),
        cost=cost,
        limit=limit,
        ladder=ladder or RankLadder(),
        max_step=max_step,
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """A feasible plan.

    Attributes:
        asked: ranks that the deltas asked for, after the ladder and before the budget, int64 (modules,).
        ranks: ranks that fit, int64 (modules,).
        cost: what they cost, in the unit of the problem.
    """

    asked: IntArray
    ranks: IntArray
    cost: float


def check_budget(problem: PlanProblem, names: list[str]) -> None:
    """Make sure that at least one module fits at the lowest rank above 0.

    Raises:
        BudgetError: nothing fits; names the smallest budget that works and what takes it.
    """
    lowest = problem.ladder.ranks[1]
    nothing = fixed_price(problem.cost, np.zeros(len(names), dtype=np.bool_))
    alone = np.array([nothing.having(module) for module in range(len(names))])
    prices = np.where(problem.tops > 0, alone + problem.cost.per_rank * lowest, np.inf)
    cheapest = int(np.argmin(prices))
    if prices[cheapest] <= problem.limit:
        return
    if isinstance(problem.cost, ParameterCost):
        needed, given = f"{prices[cheapest]:.0f} parameters", f"{problem.limit:.0f}"
        hint = ""
    else:
        needed, given = format_bytes(prices[cheapest], up=True), format_bytes(problem.limit)
        kept = format_bytes(nothing.value)
        hint = (
            f" {kept} of it goes to what trains outside the adapter; the rest is mostly saved for backward. A smaller "
            "per-device batch, shorter sequences or gradient checkpointing lower it."
        )
    raise BudgetError(
        f"The budget of {given} fits no adapter at all. The smallest that works is {needed} "
        f"(rank {lowest} on {names[cheapest]!r} alone).{hint}"
    )


def uniform_ranks(problem: PlanProblem) -> IntArray:
    """The best plan with one rank: on all modules if rank 1 fits there, else on as many top layers as fit.

    Not tied to the ladder: the largest whole rank up to the ladder's end.
    """
    for lowest in range(int(problem.blocks.max()) + 1):
        chosen = problem.blocks >= lowest
        best = np.zeros_like(problem.ranks)
        for rank in range(1, problem.ladder.ranks[-1] + 1):
            ranks = np.where(chosen, np.minimum(rank, problem.max_ranks), 0)
            if not problem.fits(ranks):
                break
            best = ranks
        if best.any():
            return best
    return pack(problem, np.zeros(len(problem.ranks)), floor=1.0)


def pack(problem: PlanProblem, scores: FloatArray, floor: float) -> IntArray:
    """The ranks that a set of scores asks for, as if every module were free to move.

    Layers are taken from the top down as long as each of their modules can have the floor rank (the lowest layer
    in part, best scores first); then every adapted module starts at rank 1 and ranks rise in the order of
    log(rank) - score until the budget is spent. With equal scores this is "fracrule" of docs/design.md.

    Args:
        problem: the current state; its `max_step` and `held` are ignored.
        scores: log rank relative to the other modules, float (modules,).
        floor: rank that an adapted module should at least be able to have, > 0.

    Returns:
        Ranks on the ladder, int64 (modules,); all zero if nothing fits.
    """
    for rung in range(int(np.clip(problem.ladder.rung(round(max(floor, 1))), 1, problem.ladder.top)), 0, -1):
        rungs = np.minimum(_admit(problem, scores, rung), 1)
        if rungs.any():
            break
    draft = _draft(problem, scores, rungs)
    if rungs.any():
        draft.raise_adapted(problem.tops)
    else:  # no module of the top layer fits, but a smaller one further down may
        draft.fill(problem.tops)
    return draft.ranks


def _draft(problem: PlanProblem, scores: FloatArray, rungs: IntArray) -> Draft:
    return Draft(problem.cost, problem.limit, problem.ladder, problem.blocks, scores, rungs)


def _admit(problem: PlanProblem, scores: FloatArray, rung: int) -> IntArray:
    """Rungs with as many modules at `rung` as fit, whole layers from the top, the lowest one in part."""
    draft = _draft(problem, scores, np.zeros_like(problem.ranks))
    rungs = np.minimum(rung, problem.tops)
    by_block = np.argsort(problem.blocks, kind="stable")
    for members in np.split(by_block, np.flatnonzero(np.diff(problem.blocks[by_block])) + 1)[::-1]:
        able = members[rungs[members] > 0]
        if not draft.adapt_all(able, rungs[able]):
            for member in able[np.argsort(-scores[able], kind="stable")].tolist():
                draft.adapt(member, int(rungs[member]))
            break
    return draft.rungs


def project(problem: PlanProblem, deltas: IntArray, scores: FloatArray) -> Plan:
    """The plan nearest to the wished deltas that keeps to the budget and leaves nothing of it unspent.

    Args:
        problem: the current state.
        deltas: rungs to move, int (modules,); clipped to `max_step` and to the ladder.
        scores: decide who gives way and who is filled up first, float (modules,).

    Returns:
        The plan. It exceeds `max_step` downwards, and drops held modules, if the budget leaves no other way.
    """
    now = problem.ladder.rung(problem.ranks)
    reach = problem.ladder.top if problem.max_step is None else problem.max_step
    upper = np.minimum(now + reach, problem.tops)
    lower = np.minimum(np.maximum(now - reach, 0), upper)
    held = np.zeros(len(now), dtype=bool) if problem.held is None else problem.held
    upper, lower = np.where(held, now, upper), np.where(held, now, lower)
    wished = np.clip(now + np.asarray(deltas, dtype=np.int64), lower, upper)
    draft = _draft(problem, scores, wished)
    draft.lower(lower)
    draft.lower(np.where(held, now, 0))
    if not draft.fits():
        draft.drop(np.flatnonzero(held & (now > 0)))
        upper = np.where(held, 0, upper)
    draft.fill(upper)
    return Plan(problem.ladder.array[wished], draft.ranks, problem.price(draft.ranks))
