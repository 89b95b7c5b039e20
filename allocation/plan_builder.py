"""How a plan is built: module by module and rung by rung, within a limit."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..memory.cost import plan_cost
from .fixed_cost import FixedCost
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
        self.rungs = rungs.copy()
        self._limit, self._blocks, self._scores = problem.limit, problem.blocks, scores
        self._ranks = problem.ladder.array
        self._rises = np.diff(self._ranks, prepend=0)
        self._cost, self._per_rank = problem.cost, problem.cost.per_rank
        self._now, self._hysteresis = problem.rungs, problem.hysteresis
        self._fixed = FixedCost(problem.cost, rungs > 0)
        self.costs: FloatArray = self._fixed.value + self._per_rank @ self.ranks

    @property
    def ranks(self) -> IntArray:
        """The plan as ranks, int64 (modules,)."""
        return np.asarray(self._ranks[self.rungs], dtype=np.int64)

    @property
    def preference(self) -> FloatArray:
        """The scores, raised by the hysteresis for modules that are adapted at present, (modules,)."""
        return self._scores + self._hysteresis * (self._now > 0)

    @property
    def precedence(self) -> IntArray:
        """All modules in the order in which they are to be adapted, (modules,)."""
        return np.argsort(-self.preference, kind="stable")

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

    def lift_all(self, modules: IntArray, rungs: IntArray) -> bool:
        """Raise modules to these rungs if all of them together fit; returns whether they do."""
        fixed, fresh = self._fixed.value, modules[self.rungs[modules] == 0]
        rise = self._per_rank[:, modules] @ (self._ranks[rungs] - self._ranks[self.rungs[modules]])
        self._fixed.add_all(fresh)
        costs = self.costs + rise + (self._fixed.value - fixed)
        if costs.max() > self._limit:
            self._fixed.remove_all(fresh)
            return False
        self.costs = costs
        self.rungs[modules] = rungs
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
        absent = np.flatnonzero((self.rungs == 0) & (upper > 0))
        alone = self.costs[:, None] + self.additions(absent) + self._per_rank[:, absent] * self._ranks[1]
        able = np.zeros(len(self.rungs), dtype=np.bool_)
        able[absent] = (alone <= self._limit).all(axis=0)
        lifted = [self.lift(module, 1) for module in self.precedence.tolist() if able[module]]
        return any(lifted)

    def raise_adapted(self, upper: IntArray) -> None:
        """Raise adapted modules rung by rung wherever that fits, the lowest level first, and none above its bound."""
        modules, rungs, levels = self._moves(self.rungs, np.where(self.rungs > 0, upper, 0))
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
