"""From scores to wanted ranks, and from wanted ranks to a plan that fits the budget and leaves nothing of it unspent.

Every decision takes these two steps, in an episode and in a real fine-tune:

* `pack` turns scores into wanted ranks. The rank floor decides how many modules are adapted: a few layers at a useful
  rank are worth more than all layers at rank 1, because bytes depend on the lowest adapted layer above all. Among the
  adapted modules, ranks are in the ratio exp(score).
* `project` turns wanted ranks into a plan. It clips them to the ladder and the bounds, lowers ranks until they fit,
  and raises ranks until nothing more fits.

Both change one rung at a time in the order of log(rank) - score, so equal scores give equal ranks.

Some plans read no signal: one rank, or nearly one, on the top layers, such as `uniform_ranks`. Without gradient
checkpointing, adapting the top layers at a useful rank was better than any other plan with the same bytes
(docs/design.md). `TimeLimit` keeps the time of a step within its limit, where checkpointed layers take time as well.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.text import format_bytes, given_bytes
from ..cost.cost import Cost, FixedCost, ParameterCost, TimedCost, UntimedCost, moment_costs, plan_cost
from ..cost.step_time import PARTS, StepTime, exact_unit
from ..errors import BudgetError
from ..lora.spec import REFERENCE_RANK, ModuleSpec
from .problem import AllocationProblem, PlanBuilder

TOP_DOWN = 100.0
"""A depth bias so high that scores decide between the modules of one layer alone."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan, and what it was made from.

    Attributes:
        clipped: the wanted ranks, rounded down onto the ladder and clipped to the bounds, int64 (modules,).
        ranks: the plan, int64 (modules,).
        cost: what it costs, in the unit of the problem.
    """

    clipped: IntArray
    ranks: IntArray
    cost: float


def check_budget(problem: AllocationProblem, names: list[str], share: float | None = None) -> None:
    """Check that any plan fits: the lower bounds, or without bounds one module at the lowest rank above 0.

    Args:
        problem: the plans that are possible.
        names: of the modules, for the error.
        share: the share of plain LoRA's cost that the limit is, if that is how it was given.

    Raises:
        BudgetError: none fits; the error tells the smallest budget that works, and what takes it.
    """
    least = least_ranks(problem)
    if problem.bottoms.any():
        count = np.count_nonzero(least)
        first = names[int(np.argmax(least > 0))]
        cause = f"the lower bounds on the ranks of {count} modules"
        where = f"(rank {least.max()} at most, {first!r} among them)"
        if count == 1:
            cause, where = f"the lower bound on the rank of {first!r}", f"(rank {least.max()} on it alone)"
    else:
        cause, where = "any adapter", f"(rank {least.max()} on {names[int(np.argmax(least))]!r} alone)"
    if not problem.fits(least):
        needed, given, reason = _shortfall(problem, least, share)
        raise BudgetError(f"The {given} is too small for {cause}. The smallest that works is {needed} {where}.{reason}")


def least_ranks(problem: AllocationProblem) -> IntArray:
    """The cheapest plan with an adapter: the lower bounds, or without bounds one module at the lowest rank above 0.

    Returns:
        Ranks, int64 (modules,).

    Raises:
        BudgetError: the upper bounds allow no adapter.
    """
    ladder, modules = problem.ladder.array, np.arange(len(problem.tops))
    if problem.bottoms.any():
        return ladder[problem.bottoms]
    if not problem.tops.any():
        raise BudgetError("The upper bounds on the ranks leave no module a rank above 0.")
    nothing = FixedCost(problem.cost, np.zeros(len(modules), dtype=np.bool_))
    alone = nothing.value[:, None] + nothing.additions(modules) + problem.cost.per_rank * ladder[1]
    cheapest = int(np.argmin(np.where(problem.tops > 0, alone.max(axis=0), np.inf)))
    return np.where(modules == cheapest, ladder[1], 0)


def least_cost(modules: Sequence[ModuleSpec], low: IntArray | None, high: IntArray | None, cost: Cost) -> float:
    """What the cheapest plan with an adapter costs; see `least_ranks`, and `AllocationProblem.of` for the arguments."""
    return plan_cost(cost, least_ranks(AllocationProblem.of(modules, cost, math.inf, low=low, high=high)))


def _shortfall(problem: AllocationProblem, ranks: IntArray, share: float | None) -> tuple[str, str, str]:
    """For an error: what a plan takes, the limit, and what takes most of it and would lower it.

    What lowers a plan's bytes lowers those of plain LoRA as well, so it does not help under a share of them.
    """
    cost, needed = problem.cost, plan_cost(problem.cost, ranks)
    costs, adapter = moment_costs(cost, ranks), cost.per_rank @ ranks
    peak = int(np.argmax(costs))
    held = cost.constant[peak]
    if isinstance(cost, TimedCost) and peak == len(costs) - 1:
        least, most, fixed = (value / cost.unit_per_second for value in (needed, problem.limit, held))
        reason = (
            f" {fixed:.3g} s of it go to what every plan takes, the forward pass above all. A smaller per-device batch "
            "or shorter sequences lower it."
        )
        return f"{_rounded_up(least)} s", f"time of {most:.3g} s a step", reason
    as_share = "" if share is None else f", a share of {math.ceil(100 * share * needed / problem.limit)}%"
    if cost.unit == "parameters":
        return f"{needed:.0f} parameters{as_share}", f"budget of {problem.limit:.0f}", ""
    parts = (
        (held, "to what this moment holds even without an adapter (such as what trains outside it)"),
        (costs[peak] - adapter[peak] - held, "to what is saved or computed for backward (activations, logits)"),
        (adapter[peak], "to the adapter itself"),
    )
    shares = [f"{format_bytes(size)} of it goes {use}" for size, use in parts if size > 0]
    reason = f" The peak is at {cost.moments[peak]}. {', '.join(shares)}."
    if share is None:
        reason += (
            " A smaller per-device batch or shorter sequences lower it, and so does gradient checkpointing where it is "
            "off."
        )
    needs = f"'{format_bytes(needed, up=True)} step'{as_share}"
    return needs, f"budget of {given_bytes(problem.limit)} for a step", reason


def _rounded_up(seconds: float) -> str:
    """Seconds > 0 with three digits, rounded up, so that a limit of as many fits."""
    last = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return f"{math.ceil(seconds / last) * last:.4g}"


def uniform_window(problem: AllocationProblem) -> tuple[int, int] | None:
    """One rank on whole layers from the top down: the rank, at least 1, and the lowest layer; None if none fits.

    It adapts as many layers as fit at rank 8, as people use it, or at rank 1 under a budget of parameters, where depth
    costs nothing (docs/design.md, "Uniform rank"), or else the top layer alone. It gives them the largest whole rank
    that fits.

    Args:
        problem: the plans that are possible; `max_step`, `pinned` and current ranks are ignored.
    """
    least_rank = 1 if isinstance(problem.cost, ParameterCost) else REFERENCE_RANK
    blocks = range(int(problem.blocks.max()) + 1)
    lowest = bisect_left(blocks[:-1], True, key=lambda block: problem.fits(problem.uniform(least_rank, block)))
    ranks = range(1, problem.ladder.ranks[-1] + 1)
    rank = bisect_left(ranks, True, key=lambda rank: not problem.fits(problem.uniform(rank, lowest)))
    return (rank, lowest) if rank and problem.uniform(rank, lowest).any() else None


def uniform_ranks(problem: AllocationProblem) -> IntArray:
    """One rank on all modules of as many top layers as can have a useful one, the simple plan that others must beat.

    Args:
        problem: the plans that are possible; `max_step`, `pinned` and current ranks are ignored.

    Returns:
        Any whole ranks up to the ladder's end, within the bounds of each module, int64 (modules,). Where not even the
        top layer fits at rank 1, single modules of it are adapted, at ranks that are as equal as possible.
    """
    window = uniform_window(problem)
    if window:
        return problem.uniform(*window)
    return pack(problem.fresh(), np.zeros(len(problem.ranks)), rank_floor=1.0)


def pack(problem: AllocationProblem, scores: FloatArray, rank_floor: float, depth_bias: float = TOP_DOWN) -> IntArray:
    """The wanted ranks of these scores, as if every module could move to any rank within its bounds.

    First, modules are admitted in the order of score + depth bias * layer, as long as all of them can have the rank
    floor. With a high depth bias these are the top layers, and a part of the next one down; without a bias they are
    the modules with the best scores, and of equal scores those further up. Then every admitted module starts at rank
    1, and ranks rise in the order of log(rank) - score until the budget is spent. With equal scores and a high depth
    bias this is the rule top-down (docs/design.md).

    Args:
        problem: the plans that are possible; `max_step` and `pinned` are ignored.
        scores: the log of each module's rank relative to the others, float (modules,).
        rank_floor: the rank that every adapted module should be able to have, > 0.
        depth_bias: by how much a score counts less for each layer further down, in log rank.

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
    """Rungs at which as many modules as fit have `rung`; of the last layer that is reached, only some modules may."""
    rungs, ladder = np.clip(rung, problem.bottoms, problem.tops), problem.ladder.array
    order = np.lexsort((-problem.blocks, -(problem.preference(scores) + depth_bias * problem.blocks)))
    blocks, turns = problem.blocks[order], np.zeros_like(order)
    turns[order[1:]] = np.cumsum(blocks[1:] != blocks[:-1])  # neighbours in the order of one layer have one turn

    def admitted(turn: int) -> IntArray:
        return np.where(turns < turn, rungs, problem.bottoms)

    all_turns = range(1, int(turns[order[-1]]) + 2)
    whole = bisect_left(all_turns, True, key=lambda turn: not problem.fits(ladder[admitted(turn)]))
    draft = PlanBuilder(problem, scores, admitted(whole))
    for member in order[(turns[order] == whole) & (rungs[order] > problem.bottoms[order])].tolist():
        draft.lift(member, int(rungs[member]))
    return draft.rungs


def project(problem: AllocationProblem, wanted: IntArray, scores: FloatArray, *, fill: bool = True) -> Plan:
    """The plan nearest to the wanted ranks that fits the budget and leaves nothing of it unspent.

    Args:
        problem: the plans that are possible.
        wanted: wanted ranks, int (modules,). They are rounded down onto the ladder and clipped to `max_step` and the
            bounds.
        scores: modules with low scores are lowered first, those with high scores are raised first, float (modules,).
        fill: raise ranks until nothing more fits. Without it, no rank rises above the wanted one.

    Returns:
        The plan. Only if nothing else fits, it goes further down than `max_step` allows and drops pinned modules. If
        not even the lower bounds fit, the plan is the lower bounds.
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
"""The rank that every adapted module should be able to have: about a quarter of the width of the models on which it was
measured."""


def top_down(problem: AllocationProblem) -> IntArray:
    """Equal ranks on as many top layers as can have `RANK_FLOOR`, and on some modules of the next layer down.

    Where the top layer cannot have the rank floor, a lower one is taken. Nothing is left unspent.

    Args:
        problem: the plans that are possible; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.

    Returns:
        Ranks on the ladder, int64 (modules,), of which none can rise further.
    """
    fresh = problem.fresh()
    scores = np.zeros(len(problem.ranks))
    return project(fresh, pack(fresh, scores, RANK_FLOOR), scores).ranks


PLACEMENT = ("rank_floor", "depth_bias")
"""The numbers of the placement: log2 of a factor on the rank floor, and what is added to the depth bias."""

DEPTH_BIAS = 4.0
"""The depth bias under a budget of bytes, before a policy changes it."""


def base_rank_floor(problem: AllocationProblem) -> float:
    """The rank floor before a policy changes it. Under a budget of parameters depth costs nothing, so it is rank 1."""
    return 1.0 if isinstance(problem.cost, ParameterCost) else RANK_FLOOR


def base_depth_bias(problem: AllocationProblem) -> float:
    """The depth bias before a policy changes it. Under a budget of parameters depth costs nothing, so there is none."""
    return 0.0 if isinstance(problem.cost, ParameterCost) else DEPTH_BIAS


CLOSE = 1.01
"""The factor between a time that is refused and one that is kept, below which the search for a plan ends."""

GROWTH = 1.05
"""The factor by which the search goes on at least, while no time is kept."""

CHECKS = 4
"""How often a plan is timed at most, before its predicted time is believed."""

SETTLED = 0.02
"""The error of a predicted time, as a share, that is left alone."""

FewestLayers = Callable[[IntArray], tuple[str, ...]]
"""The layers that must be checkpointed under a plan, so that it keeps its limit of bytes."""


@dataclass(eq=False)
class TimeLimit:
    """The limit of the time of a step.

    Attributes:
        time: of a step under any plan.
        seconds: what a step may take, > 0.
        layers: chooses the checkpointed layers of each plan; None where they are those that the step was measured with.
        beside: seconds of a step of plain LoRA, with which messages compare plans where the user set no limit; no plan
            reaches `seconds` then. None where the user set one.
    """

    time: StepTime
    seconds: float
    layers: FewestLayers | None = None
    beside: float | None = None

    def added_to(self, cost: UntimedCost, limit: float) -> TimedCost:
        """A cost with the time of a step as one more moment; without second runs where `layers` chooses them."""
        return self.time.row(() if self.layers else None).added_to(cost, limit, self.seconds)

    def of(self, ranks: IntArray) -> float:
        """The seconds of a step under a plan, int64 (modules,), second runs included."""
        return self.time.seconds(ranks, self.layers(ranks) if self.layers else None)

    def fits(self, ranks: IntArray) -> bool:
        """Whether a step under a plan, second runs included, is within the limit."""
        return self.of(ranks) <= self.seconds

    def choose(self, problem: AllocationProblem, plan: Callable[[AllocationProblem], IntArray]) -> AllocationProblem:
        """A problem whose plan is within the limit, second runs included.

        The problem's own time counts no second runs where `layers` chooses them. If they take the plan above the limit,
        time counts dearer in the problem, until its plan is small enough; then less dear again, as far as it stays so.

        Args:
            problem: with time among its costs.
            plan: makes the plan of a problem, ranks int64 (modules,).

        Returns:
            The problem, with dearer time if that was needed.

        Raises:
            BudgetError: no plan keeps both limits.
        """
        if self.layers is None:
            return problem
        over = self._over(plan(problem))
        if over <= 1:
            return problem
        refused, ended, best = 1.0, np.inf, None
        factor = max(over, CLOSE)
        while ended > CLOSE * refused:
            changed = with_dearer_time(problem, factor)
            if not changed.fits(least_ranks(changed)):
                ended = factor
            elif (over := self._over(plan(changed))) > 1:
                refused = factor
            else:
                ended, best = factor, changed
            factor = (refused * ended) ** 0.5 if np.isfinite(ended) else refused * max(over, GROWTH)
        if best is None:
            raise self._impossible(self.of(least_ranks(problem)))
        return best

    def agreed(
        self, plan: Callable[[TimeLimit], IntArray], measured: Callable[[IntArray], float], reference: float
    ) -> TimeLimit:
        """The limit with times as they are under the very plans that it leads to.

        A plan that is made for a limit takes what is predicted too low rather than what is predicted too high. So it is
        timed, all times are scaled to agree with that, and the plan is made anew, until prediction and measurement
        agree. Where they never do, since plans change by whole layers, the limit under which they were nearest is kept.

        Args:
            plan: makes the plan under a limit, int64 (modules,); BudgetError if there is none.
            measured: times a step under a plan, as a share of the reference.
            reference: what a step of the reference takes by this limit's `time`, in seconds.

        Returns:
            A limit of as many seconds, which has a plan.
        """
        limit, best, least = self, self, math.inf
        for _ in range(CHECKS):
            try:
                ranks = plan(limit)
            except BudgetError:
                break
            error = measured(ranks) * reference / limit.of(ranks)
            if abs(math.log(error)) < least:
                best, least = limit, abs(math.log(error))
            if least <= SETTLED:
                break
            limit = replace(limit, time=limit.time.scaled(np.full(len(PARTS), error)))
        return best

    def check(self, problem: AllocationProblem) -> None:
        """Raise BudgetError if the cheapest plan takes more time than the limit, second runs included."""
        seconds = self.of(least_ranks(problem))
        if seconds > self.seconds:
            raise self._impossible(seconds)

    def text(self, ranks: IntArray) -> str:
        """The time of a plan beside its limit, or beside plain LoRA where there is none, for people."""
        seconds = self.of(ranks)
        if self.beside is None:
            return f"a step takes {seconds:.3g} of {self.seconds:.3g} s"
        return f"a step takes {seconds:.3g} s, {seconds / self.beside:.0%} of that with rank 8 on all modules"

    def state(self) -> dict[str, Any]:
        """All that `from_state` needs, as arrays and JSON values."""
        return {"seconds": self.seconds, "beside": self.beside, "time": self.time.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TimeLimit:
        """The limit that `state` described; who chooses `layers` says so again."""
        beside = None if state["beside"] is None else float(state["beside"])
        return cls(StepTime.from_state(state["time"]), float(state["seconds"]), beside=beside)

    def _over(self, ranks: IntArray) -> float:
        return self.of(ranks) / self.seconds

    def _impossible(self, least: float) -> BudgetError:
        return BudgetError(
            f"The time of {self.seconds:.3g} s a step is too short for any plan within the budget. The smallest takes "
            f"{least:.3g} s, with the gradient checkpointing that its bytes need. Raise the time, or the budget, which "
            "then needs less checkpointing."
        )


def with_dearer_time(problem: AllocationProblem, factor: float) -> AllocationProblem:
    """The same problem, in which time counts so many times as much.

    Args:
        problem: with the time of a step among its costs.
        factor: above 0.
    """
    cost, exact = problem.cost, exact_unit(problem.limit)
    assert isinstance(cost, TimedCost)
    changed = {name: getattr(cost, name).copy() for name in ("constant", "per_rank", "group_bytes")}
    for array in changed.values():
        array[-1] = np.ceil(array[-1] * factor / exact) * exact
    return replace(problem, cost=replace(cost, **changed, unit_per_second=cost.unit_per_second * factor))


def under_limit(problem: AllocationProblem, limit: float) -> AllocationProblem:
    """The same problem under another limit of bytes or parameters; the time of a step keeps its own limit.

    Args:
        problem: with the time of a step among its costs or without.
        limit: in the unit of its cost, > 0.
    """
    changed = replace(problem, limit=limit)
    return with_dearer_time(changed, limit / problem.limit) if isinstance(problem.cost, TimedCost) else changed
