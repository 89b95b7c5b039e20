"""Plans that prices choose: the relaxation behind `rankpilot.lora.utility.best_plan`.

Give every byte a price and each module takes the rank that is worth most after paying for it. Tensors that several
modules need are paid together, by those that gain from them in proportion to what they gain, and nobody takes part
who loses. The higher the price, the smaller the plan; the right price just spends the budget.

Moments have prices of their own, since each has the whole budget: bytes at the one that is nearest to it cost most.
What lies below the *entry*, the deepest module that may be adapted, is left out. What the entry needs counts as paid
before the others choose: in a deep model that is the backward chain from there up, the bulk of what a plan costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .cost import BoolArray, FloatArray
from .ladder import IntArray
from .pricing import coverage_of, price_of
from .problem import PlanProblem

_GRID = np.geomspace(1e-5, 1.0, 24)
"""Prices at which all entries are compared, over the highest that any module pays."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What modules take at one price.

    Attributes:
        rungs: their rungs, those that are left out at their lower bounds, int64 (modules,).
        paid: what each pays for its ranks and for its part of the groups, as a share of the slack, (modules,).
    """

    rungs: IntArray
    paid: FloatArray


class Relaxation:
    """One problem and its utilities, relaxed.

    Args:
        problem: the plans that are possible; its lower bounds fit the budget.
        utility: of each rung on each module, (modules, rungs).

    Attributes:
        slack: what the lower bounds leave of the budget at each moment, (moments,).
        gains: utility above the lower bound, minus infinity outside the bounds, (modules, rungs).
        rises: ranks above the lower bound, (modules, rungs).
    """

    def __init__(self, problem: PlanProblem, utility: FloatArray) -> None:
        self._problem, self._ranks = problem, problem.ladder.array
        self._low, self._kept = problem.bottoms, problem.bottoms > 0
        self._modules = np.arange(len(self._low))
        rungs = np.arange(len(self._ranks))
        within = (rungs >= self._low[:, None]) & (rungs <= problem.tops[:, None])
        self.gains = np.where(within, utility - utility[self._modules, self._low][:, None], -np.inf)
        self.rises = np.where(within, self._ranks - self._ranks[self._low][:, None], 0)
        self._base = price_of(problem.cost, self._ranks[self._low])
        self.slack = problem.limit - self._base
        table = coverage_of(problem.cost)
        open_groups = np.flatnonzero(~table.by_module[self._kept].any(axis=0))
        self._held = table.held[:, open_groups]
        self._needs = table.by_module[:, open_groups]
        self._per_rank = problem.cost.per_rank

    def start(self) -> FloatArray:
        """Prices of the moments to begin with: alike at all that everything together would exceed, (moments,)."""
        exceeded = price_of(self._problem.cost, self._ranks[self._problem.tops]) > self._problem.limit
        return exceeded / np.maximum(self.slack, 1.0) / max(1, np.count_nonzero(exceeded))

    def shifted(self, prices: FloatArray, rungs: IntArray) -> FloatArray:
        """Prices of the moments after seeing a plan: higher where it comes nearest to the budget, (moments,)."""
        slack = np.maximum(self.slack, 1.0)
        used = (price_of(self._problem.cost, self._ranks[rungs]) - self._base) / slack
        shares = prices * slack * np.exp(3 * (used - used.max()))
        result: FloatArray = shares / shares.sum() / slack
        return result

    def entries(self, prices: FloatArray) -> tuple[IntArray, FloatArray]:
        """Modules from the cheapest to the deepest to reach, and what a plan with each as its entry would be worth.

        Args:
            prices: of a byte at each moment, (moments,).

        Returns:
            The modules, int64 (modules,), and an estimate of the best utility, (modules,); -inf if it does not fit.
        """
        reach = self._needs @ (prices @ self._held)
        order = np.argsort(reach, kind="stable")
        deepest = Market(self, order, prices)
        tables = []
        for share in _GRID:
            choice = deepest.choose(share)
            worth = self.gains[self._modules, choice.rungs]
            tables.append((np.cumsum(worth[order]), reach[order] + np.cumsum(choice.paid[order])))
        worths, costs = np.array([w for w, _ in tables]), np.array([c for _, c in tables])
        return order, _interpolated(worths, costs)


def _interpolated(worths: FloatArray, costs: FloatArray) -> FloatArray:
    """Utility that fits a cost of 1, between rows of falling utility and cost, (rows, entries) -> (entries,)."""
    fitting = costs <= 1.0
    row = np.where(fitting.any(axis=0), fitting.argmax(axis=0), -1)
    column = np.arange(costs.shape[1])
    upper = np.maximum(row - 1, 0)
    gap = costs[upper, column] - costs[row, column]
    part = np.where(gap > 0, (1.0 - costs[row, column]) / np.where(gap > 0, gap, 1.0), 0.0)
    result = worths[row, column] + np.minimum(part, 1.0) * (worths[upper, column] - worths[row, column])
    return np.where(row < 0, -np.inf, result)


class Market:
    """The choices of the modules down to one entry, at any level of the prices.

    Args:
        relaxation: the problem.
        allowed: modules that may be adapted, the entry last, int64 (allowed,).
        prices: of a byte at each moment, (moments,).
    """

    def __init__(self, relaxation: Relaxation, allowed: IntArray, prices: FloatArray) -> None:
        self._of, self._allowed = relaxation, allowed
        needs = relaxation._needs[allowed]
        left = np.flatnonzero(~needs[-1])
        self._payer, self._group = np.nonzero(needs[:, left])
        self._burden = prices @ relaxation._held[:, left]
        self._units = prices @ relaxation._per_rank[:, allowed]
        self._gains, self._rises = relaxation.gains[allowed], relaxation.rises[allowed]
        self._kept, self._low = relaxation._kept[allowed], relaxation._low[allowed]
        self._bare = self._units[:, None] * self._rises
        ratios = self._gains[self._bare > 0] / self._bare[self._bare > 0]
        self.highest = max(float(ratios.max(initial=0.0)), 1e-300)

    def choose(self, share: float) -> Choice:
        """What the modules take when prices are this share of the highest that any of them pays."""
        level = share * self.highest
        net = self._gains - level * self._bare
        rungs = net.argmax(axis=1)
        members = np.arange(len(rungs))
        value = np.where(self._kept, 0.0, net[members, rungs])
        joined, dues = self._settle(rungs > self._low, value, level)
        rungs = np.where(joined, rungs, self._low)
        plan, paid = self._of._low.copy(), np.zeros(len(self._of._low))
        plan[self._allowed] = rungs
        paid[self._allowed] = self._bare[members, rungs] + dues * joined
        return Choice(plan, paid)

    def _settle(self, joined: BoolArray, value: FloatArray, level: float) -> tuple[BoolArray, FloatArray]:
        """Who takes part, and what each pays for groups: those who would lose leave until nobody does."""
        while True:
            stake = np.where(joined, value, 0.0)
            total = np.bincount(self._group, weights=stake[self._payer], minlength=len(self._burden))
            rate = np.where(total > 0, self._burden / np.where(total > 0, total, 1.0), 0.0)
            dues = np.bincount(self._payer, weights=rate[self._group], minlength=len(stake)) * stake
            losing = joined & ~self._kept & (level * dues > value)
            if not losing.any():
                return joined, dues
            joined = joined & ~losing
