"""The plan with the most utility inside a budget.

The utility of a plan is a sum over its modules; its cost is not. Modules q, k and v share an input, the tensors above
the lowest adapted module are kept once for all modules, and the peak is the highest of several moments.

So plans are made for a few entries (see `allocation.relaxation`), each with the price of a byte at which the plan just
spends the budget. What is left goes where it gains the most utility for each byte. In small models, single modules are
then exchanged for others as long as that helps. tests/allocation/test_optimum.py compares the result with a search of
all plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import ConfigError
from .fixed_cost import FixedCost
from .plan_builder import PlanBuilder
from .problem import AllocationProblem
from .relaxation import Market, Relaxation

ENTRIES = 3
"""How many further entries are tried after the one that looks best; in small models there are more."""

ROUNDS = 3
"""How often a plan is made for the first entry, until the prices of the moments change little."""

EXCHANGES = 20_000
"""How many exchanges are tried, times modules squared: a single module matters among a dozen, not among a thousand."""

RELIEFS = 8
"""The most modules that are lowered in one exchange."""

REFUSALS = 20
"""After this number of modules that do not fit, no further ones are tried."""

_LEVELS = np.geomspace(1e-7, 1.0, 400)


def best_plan(problem: AllocationProblem, utility: FloatArray) -> IntArray:
    """The plan with the most utility that fits, or nearly so.

    Args:
        problem: costs, limit, ladder and bounds; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.
        utility: of each rung on each module, (modules, rungs): 0 at rank 0, and not falling along the ladder. The
            result is best if each further rung adds less than the one before.

    Returns:
        Ranks on the ladder, int64 (modules,), of which none can rise further; the lower bounds if not even they fit.

    Raises:
        ConfigError: the utilities have another shape, are not finite, fall, or are not 0 at rank 0.
    """
    expected = (len(problem.ranks), len(problem.ladder.ranks))
    if np.shape(utility) != expected:
        raise ConfigError(f"utility holds a number for each module and rung, {expected}; got {np.shape(utility)}.")
    if not np.isfinite(utility).all() or (np.diff(utility, axis=1) < 0).any() or utility[:, 0].any():
        raise ConfigError("utility is 0 at rank 0, finite, and does not fall along the ladder.")
    search = _Search(problem.fresh(), utility)
    return problem.ladder.array[search.best()]


class _Search:
    """The search for one plan; plans are rungs, int64 (modules,)."""

    def __init__(self, problem: AllocationProblem, utility: FloatArray) -> None:
        self._problem, self._utility = problem, utility
        self._ladder, self._per_rank = problem.ladder.array, problem.cost.per_rank
        self._modules, self._rungs = np.arange(len(utility)), np.arange(len(self._ladder))
        self._nothing = np.zeros(len(utility))
        steps = np.diff(utility, axis=1, prepend=0.0) / np.maximum(np.diff(self._ladder, prepend=0), 1)
        # Utility of each rung for one rank. A rung that is worth more than the one below it waits for that.
        self._steps = np.minimum.accumulate(np.where(self._rungs > 0, steps, np.inf), axis=1)

    def best(self) -> IntArray:
        """The best of all plans that are tried."""
        problem = self._problem
        if not problem.fits(self._ladder[problem.bottoms]):
            return problem.bottoms
        if problem.fits(self._ladder[problem.tops]):
            return problem.tops
        relaxed = Relaxation(problem, self._utility)
        plans = list(self._at_entries(relaxed))
        plan, prices = max(plans, key=lambda made: self._worth(made[0]))
        draft = PlanBuilder(problem, self._nothing, self._exchanged(plan, prices))
        draft.fill(problem.tops)
        return draft.rungs

    def _worth(self, plan: IntArray) -> float:
        return float(self._utility[self._modules, plan].sum())

    def _fits(self, plan: IntArray) -> bool:
        return self._problem.fits(self._ladder[plan])

    def _at_entries(self, relaxed: Relaxation) -> Iterator[tuple[IntArray, FloatArray]]:
        """Plans for the entries that look best, each with the prices of the moments at which it was made."""
        prices, tried = relaxed.start(), np.zeros(len(self._modules), dtype=np.bool_)
        turns = min(len(tried), 1 + ENTRIES + 100 // len(tried))
        for turn in range(turns):
            if turn < 2:  # with the first guess of the prices, and once they have settled
                order, estimates = relaxed.entries(prices)
            place = int(np.argmax(np.where(tried[order], -np.inf, estimates)))
            market = Market(relaxed, order[: place + 1])
            tried[order[place]] = True
            for _ in range(1 if turn else ROUNDS):
                before, plan = prices, self._at_price(market, prices)
                prices = relaxed.shifted(prices, plan)
            near = np.zeros_like(tried)
            near[order[: place + 9]] = True
            yield self._spent(plan, before, near), before

    def _at_price(self, market: Market, prices: FloatArray) -> IntArray:
        """The plan at the lowest price at which it fits."""
        choose = market.priced(prices)
        level = bisect_left(_LEVELS, True, key=lambda share: self._fits(choose(float(share)).rungs))
        plan = choose(float(_LEVELS[min(level, len(_LEVELS) - 1)])).rungs
        return plan if self._fits(plan) else self._problem.bottoms

    def _spent(self, plan: IntArray, prices: FloatArray, free: BoolArray) -> IntArray:
        """A plan after spending the rest of the budget on the `free` modules, by utility per byte."""
        draft = PlanBuilder(self._problem, self._nothing, plan)
        self._raise(draft, prices, free)
        self._adapt(draft, prices, free)
        self._raise(draft, prices, free)
        return draft.rungs

    def _raise(self, draft: PlanBuilder, prices: FloatArray, free: BoolArray) -> None:
        """Raise adapted modules, the best utility per byte first."""
        more = (self._rungs > draft.rungs[:, None]) & (self._rungs <= self._problem.tops[:, None])
        modules, rungs = np.nonzero(more & (free & (draft.rungs > 0))[:, None])
        units = np.maximum(prices @ self._per_rank, 1e-300)
        order = np.argsort(-self._steps[modules, rungs] / units[modules], kind="stable")
        draft.take(modules[order], rungs[order])

    def _adapt(self, draft: PlanBuilder, prices: FloatArray, free: BoolArray) -> None:
        """Adapt further modules, each at the rung with the best utility per byte, the best first."""
        absent = np.flatnonzero(free & (draft.rungs == 0))
        added = draft.additions(absent)[:, :, None] + self._per_rank[:, absent, None] * self._ladder
        able = (draft.costs[:, None, None] + added <= self._problem.limit).all(axis=0)
        able &= (self._rungs <= self._problem.tops[absent, None]) & (self._utility[absent] > 0)
        ratios = np.where(able, self._utility[absent] / np.maximum(np.tensordot(prices, added, 1), 1e-300), 0.0)
        rungs, best = ratios.argmax(axis=1), ratios.max(axis=1)
        refused = 0
        for place in np.argsort(-best, kind="stable")[: np.count_nonzero(best)].tolist():
            refused += not draft.lift(int(absent[place]), int(rungs[place]))
            if refused > REFUSALS:
                break

    def _exchanged(self, plan: IntArray, prices: FloatArray) -> IntArray:
        """A plan after exchanging single modules for others as long as that helps."""
        worth, left = self._worth(plan), EXCHANGES // len(plan) ** 2
        improved = True
        while improved and left > 0:
            improved = False
            for candidate in islice(self._neighbours(plan, prices), left):
                left -= 1
                if self._fits(candidate) and self._worth(candidate) > worth * (1 + 1e-12):
                    plan, worth, improved = candidate, self._worth(candidate), True
                    break
        return plan

    def _neighbours(self, plan: IntArray, prices: FloatArray) -> Iterator[IntArray]:
        """Plans that differ in one module's rank; others give way by utility per byte, and the rest is spent."""
        bottoms, tops = self._problem.bottoms, self._problem.tops
        for module in np.argsort(self._utility[self._modules, plan], kind="stable").tolist():
            for rung in range(int(bottoms[module]), int(tops[module]) + 1):
                if rung == plan[module]:
                    continue
                candidate = plan.copy()
                candidate[module] = rung
                others = self._modules != module
                candidate = self._relieved(candidate, prices, others)
                yield self._spent(candidate, prices, others) if self._fits(candidate) else candidate

    def _relieved(self, plan: IntArray, prices: FloatArray, free: BoolArray) -> IntArray:
        """A plan after lowering `free` modules until it fits, if that is possible, the least utility per byte first."""
        plan, bottoms = plan.copy(), self._problem.bottoms
        lower = (self._rungs >= bottoms[:, None]) & free[:, None]
        for _ in range(RELIEFS):
            able = lower & (self._rungs < plan[:, None])
            if self._fits(plan) or not able.any():
                break
            released = FixedCost(self._problem.cost, plan > 0).removals()[:, :, None] * (self._rungs == 0)
            freed = released + self._per_rank[:, :, None] * (self._ladder[plan][:, None] - self._ladder)
            lost = self._utility[self._modules, plan][:, None] - self._utility
            ratios = np.where(able, lost / np.maximum(np.tensordot(prices, freed, 1), 1e-300), np.inf)
            module, rung = np.unravel_index(ratios.argmin(), ratios.shape)
            plan[module] = rung
        return plan
