"""A plan in the making: how it is raised and lowered along the ladder within a budget."""

from __future__ import annotations

import numpy as np

from .ladder import IntArray, RankLadder
from .memory import Cost, FloatArray
from .pricing import fixed_price


class Draft:
    """Ranks on the ladder that move one rung at a time, with their price always at hand.

    Moves go in the order of their *level*, log(rank) - score, rank being the higher one of the two: equal scores give
    equal ranks. Among equal levels the lower module gives way first and the first module is raised first.

    Prices are whole numbers (bytes or parameters), so their running sum is exact.

    Args:
        cost: price of a plan.
        limit: what a plan may cost, in the unit of `cost`.
        ladder: allowed ranks.
        blocks: layer of each module, int64 (modules,).
        scores: log rank relative to the other modules, float (modules,).
        rungs: where the plan starts, int64 (modules,).

    Attributes:
        rungs: where it is now, int64 (modules,).
        price: what that costs.
    """

    def __init__(
        self, cost: Cost, limit: float, ladder: RankLadder, blocks: IntArray, scores: FloatArray, rungs: IntArray
    ) -> None:
        self.rungs = rungs.copy()
        self._limit = limit
        self._ranks, self._rises = ladder.array, np.diff(ladder.array, prepend=0)
        self._per_rank = cost.per_rank
        self._blocks, self._scores = blocks, scores
        self._fixed = fixed_price(cost, rungs > 0)
        self.price = self._fixed.value + float(self._per_rank @ self.ranks)

    @property
    def ranks(self) -> IntArray:
        """The ranks at these rungs, int64 (modules,)."""
        return np.asarray(self._ranks[self.rungs], dtype=np.int64)

    def fits(self) -> bool:
        """Whether the plan keeps to the budget."""
        return self.price <= self._limit

    def adapt(self, module: int, rung: int) -> bool:
        """Put a module that is at rank 0 on this rung (above 0), if that fits."""
        more = self._fixed.having(module) - self._fixed.value
        if self.price + more + float(self._per_rank[module]) * int(self._ranks[rung]) > self._limit:
            return False
        self._move(module, rung)
        return True

    def adapt_all(self, modules: IntArray, rungs: IntArray) -> bool:
        """Put modules that are at rank 0 on these rungs (above 0), if that fits for all of them together."""
        for module, rung in zip(modules.tolist(), rungs.tolist(), strict=True):
            self._move(module, rung)
        if not self.fits():
            self.drop(modules[::-1])
            return False
        return True

    def drop(self, modules: IntArray) -> None:
        """Take adapted modules to rank 0."""
        for module in modules.tolist():
            self._move(module, 0)

    def lower(self, bound: IntArray) -> None:
        """Lower modules one rung at a time, highest level first and none below its bound, until the plan fits."""
        if self.fits():
            return
        modules, rungs, levels = self._moves(bound, self.rungs)
        order = np.lexsort((-rungs, modules, self._blocks[modules], -levels))
        for module, rung in zip(modules[order].tolist(), rungs[order].tolist(), strict=True):
            self._move(module, rung - 1)
            if self.fits():
                return

    def fill(self, upper: IntArray) -> None:
        """Raise modules until no rung of any of them fits, none above its bound; adapted ones first, then others."""
        self.raise_adapted(upper)
        # More than once: where the byte model over-estimates, one more module can make others cheaper.
        while self._adapt_more(upper):
            self.raise_adapted(upper)

    def _adapt_more(self, upper: IntArray) -> bool:
        """Adapt further modules where that fits, best scores first; returns whether any did."""
        before = np.count_nonzero(self.rungs)
        for module in np.argsort(-self._scores, kind="stable").tolist():
            if self.rungs[module] == 0 and upper[module] > 0:
                self.adapt(module, 1)
        return bool(np.count_nonzero(self.rungs) > before)

    def raise_adapted(self, upper: IntArray) -> None:
        """Raise adapted modules one rung at a time, lowest level first, wherever the next rung fits."""
        modules, rungs, levels = self._moves(self.rungs, np.where(self.rungs > 0, upper, 0))
        order = np.argsort(levels, kind="stable")
        prices = self._per_rank[modules] * self._rises[rungs]
        moves = zip(modules[order].tolist(), rungs[order].tolist(), prices[order].tolist(), strict=True)
        now, price = self.rungs.tolist(), self.price
        for module, rung, more in moves:
            # A module that was refused once stays where it is: what is left only gets less.
            if price + more <= self._limit and now[module] == rung - 1:
                now[module], price = rung, price + more
        self.rungs, self.price = np.array(now, dtype=np.int64), price

    def _move(self, module: int, rung: int) -> None:
        """Put a module on a rung, whether that fits or not."""
        before, fixed = int(self.rungs[module]), self._fixed.value
        if before == 0:
            self._fixed.add(module)
        elif rung == 0:
            self._fixed.remove(module)
        ranks = int(self._ranks[rung] - self._ranks[before])
        self.price += self._fixed.value - fixed + float(self._per_rank[module]) * ranks
        self.rungs[module] = rung

    def _moves(self, low: IntArray, high: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        """All single rungs between two plans: modules, the higher rung of each move, its level; in that order."""
        counts = np.maximum(high - low, 0)
        modules = np.repeat(np.arange(len(low)), counts)
        rungs = np.arange(1, len(modules) + 1) + np.repeat(low - np.cumsum(counts) + counts, counts)
        return modules, rungs, np.log(self._ranks[rungs]) - self._scores[modules]
