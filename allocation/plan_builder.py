"""How a plan is built: module by module and rung by rung, within a limit."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..memory.cost import FixedCost, plan_cost
from .problem import AllocationProblem


class PlanBuilder:
    """A plan that changes, together with what it costs.

    A move takes one module one rung up or down. Moves are made in the order of their *level*: log(rank) - score, with
    the higher of the two ranks. So equal scores lead to equal ranks. The level of a rung that a module has at present
    is lower by the hysteresis, and a module that is adapted at present comes earlier among the modules to adapt. So
    rank moves between two modules only if their scores differ by more than the hysteresis. Of moves with equal levels,
    modules further down are lowered first, and modules that are listed first are raised first.

    One more rank or one more module never makes a plan cheaper at any moment. So a move that did not fit will not fit
    while the plan rises, and bisection finds how many moves fit.

    Args:
        problem: the cost of plans, the limit, the ladder and current ranks.
        scores: the log of each module's rank relative to the others, float (modules,).
        rungs: the plan to start with, int64 (modules,).

    Attributes:
        rungs: the plan, int64 (modules,).
        costs: what it costs at each moment, (moments,).
    """

    def __init__(self, problem: AllocationProblem, scores: FloatArray, rungs: IntArray) -> None:
        self.rungs: IntArray = rungs.copy()
        self._limit, self._blocks, self._scores = problem.limit, problem.blocks, scores
        self._preference = problem.preference(scores)
        self._ranks = problem.ladder.array
        self._rises = np.append(0, self._ranks[1:] - self._ranks[:-1])
        self._cost, self._per_rank = problem.cost, problem.cost.per_rank
        self._now, self._hysteresis = problem.rungs, problem.hysteresis
        self._fixed = FixedCost(problem.cost, rungs > 0)
        self.costs: FloatArray = self._fixed.value + self._per_rank @ self.ranks

    @property
    def ranks(self) -> IntArray:
        """The plan as ranks, int64 (modules,)."""
        return np.asarray(self._ranks[self.rungs], dtype=np.int64)

    def fits(self) -> bool:
        """Whether the plan is within the limit."""
        return bool(self.costs.max() <= self._limit)

    def additions(self, modules: IntArray) -> FloatArray:
        """What adapting each of these modules alone adds before its first rank, (moments, len(modules))."""
        return self._fixed.additions(modules)

    def lift(self, module: int, rung: int) -> bool:
        """Raise a module to this rung if that fits; returns whether it does."""
        costs = self.costs + self._per_rank[:, module] * (self._ranks[rung] - self._ranks[self.rungs[module]])
        if costs.max() > self._limit:
            return False
        if self.rungs[module] == 0:
            fixed = self._fixed.value_with(module)
            costs = costs + (fixed - self._fixed.value)
            if costs.max() > self._limit:
                return False
            self._fixed.add(module, fixed)
        self.costs = costs
        self.rungs[module] = rung
        return True

    def drop(self, modules: IntArray) -> None:
        """Take adapted modules to rank 0."""
        fixed = self._fixed.value
        self._fixed.remove_all(modules)
        self.costs = self.costs - self._per_rank[:, modules] @ self.ranks[modules] + (self._fixed.value - fixed)
        self.rungs[modules] = 0

    def lower(self, bound: IntArray) -> None:
        """Lower modules rung by rung until the plan fits, the highest level first, and none below its bound."""
        if self.fits():
            return
        modules, rungs, levels = self._moves(bound, self.rungs)
        order = np.lexsort((-rungs, modules, self._blocks[modules], -levels))
        modules = modules[order]

        def fits_after(moves: int) -> bool:
            rungs = self.rungs - np.bincount(modules[:moves], minlength=len(self.rungs))
            return plan_cost(self._cost, self._ranks[rungs]) <= self._limit

        moves = bisect_left(range(len(modules)), True, key=fits_after)
        self.rungs -= np.bincount(modules[:moves], minlength=len(self.rungs))
        self._fixed = FixedCost(self._cost, self.rungs > 0)
        self.costs = self._fixed.value + self._per_rank @ self.ranks

    def fill(self, upper: IntArray) -> None:
        """Raise modules until no further rung fits, none above its bound: first those that are adapted, then others."""
        self.raise_adapted(upper)
        if self._adapt_more(upper):
            self.raise_adapted(upper)

    def _adapt_more(self, upper: IntArray) -> bool:
        """Adapt further modules where that fits, the best scores first; returns whether any was adapted."""
        absent = self._can_rise((self.rungs == 0) & (upper > 0))
        alone = self.costs[:, None] + self.additions(absent) + self._per_rank[:, absent] * self._ranks[1]
        able = absent[(alone <= self._limit).all(axis=0)]
        order = np.argsort(-self._preference[able], kind="stable")
        lifted = [self.lift(module, 1) for module in able[order].tolist()]
        return any(lifted)

    def _can_rise(self, modules: BoolArray) -> IntArray:
        """Those of the modules for which one more rung would fit if they needed no further group, their indices."""
        able = np.flatnonzero(modules)
        rises = self._per_rank[:, able] * self._rises[self.rungs[able] + 1]
        result: IntArray = able[(rises <= (self._limit - self.costs)[:, None]).all(axis=0)]
        return result

    def raise_adapted(self, upper: IntArray) -> None:
        """Raise adapted modules rung by rung wherever that fits, the lowest level first, and none above its bound."""
        able, high = self._can_rise((self.rungs > 0) & (self.rungs < upper)), self.rungs.copy()
        high[able] = upper[able]
        modules, rungs, levels = self._moves(self.rungs, high)
        order = np.argsort(levels, kind="stable")
        self.take(modules[order], rungs[order])

    def take(self, modules: IntArray, rungs: IntArray) -> None:
        """Raise adapted modules by these moves, in this order, wherever they fit.

        Args:
            modules: the module of each move, (moves,).
            rungs: the rung to which it leads, one above the module's last, (moves,).
        """
        rises = self._per_rank[:, modules] * self._rises[rungs]
        while len(modules):
            # Where one move of a module does not fit, none of its later moves does.
            refused = (rises > (self._limit - self.costs)[:, None]).any(axis=0)
            if refused.any():
                barred = np.full(len(self.rungs), len(self._ranks))
                np.minimum.at(barred, modules[refused], rungs[refused])
                left = rungs < barred[modules]
                modules, rungs, rises = modules[left], rungs[left], rises[:, left]
            sums = self.costs[:, None] + np.cumsum(rises, axis=1)
            count = int(np.count_nonzero((sums <= self._limit).all(axis=0)))
            if count == 0:
                return
            self.costs = sums[:, count - 1]
            np.add.at(self.rungs, modules[:count], 1)
            modules, rungs, rises = modules[count:], rungs[count:], rises[:, count:]

    def _moves(self, low: IntArray, high: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        """All moves between two plans: module, higher rung and level of each, (moves,) each."""
        counts = np.maximum(high - low, 0)
        modules = np.repeat(np.arange(len(low)), counts)
        rungs = np.arange(1, len(modules) + 1) + np.repeat(low - np.cumsum(counts) + counts, counts)
        kept = self._hysteresis * (rungs <= self._now[modules])
        return modules, rungs, np.log(self._ranks[rungs]) - self._scores[modules] - kept
