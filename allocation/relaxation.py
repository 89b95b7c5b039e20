"""The relaxation behind `rankpilot.allocation.optimum.best_plan`: prices in place of a budget (Lagrange multipliers).

Every byte has a price, and each module takes the rank that is worth most after paying for its bytes. Modules that need
the same tensor share its price in proportion to what they gain, and a module that would lose is not adapted. The higher
the price, the smaller the plan; at the right price, the plan just spends the budget.

Each moment has a price of its own, because each may use the whole budget; the price is highest at the moment that comes
nearest to it. Only modules that are at most as expensive to reach as the *entry* are adapted. What the entry needs
counts as paid before the others choose. In a deep model that is most of what a plan costs: the tensors on the way of
the gradient from the loss down to the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..memory.cost import moment_costs
from .problem import AllocationProblem

_GRID = np.geomspace(1e-5, 1.0, 16)
"""Prices at which all entries are compared, as shares of the highest price at which any module is adapted."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The plan at one price.

    Attributes:
        rungs: of the modules, those that are left out at their lower bounds, int64 (modules,).
        paid: what each pays for its ranks and for its part of the groups, as a share of the slack, (modules,).
    """

    rungs: IntArray
    paid: FloatArray


class Relaxation:
    """A problem and its utilities, with prices in place of its limit.

    Args:
        problem: the plans that are possible; its lower bounds fit the budget.
        utility: of each rung on each module, (modules, rungs).

    Attributes:
        low: the lower bounds, as rungs, int64 (modules,).
        group_bytes: cost at each moment of the groups that the lower bounds do not pay, (moments, groups).
        module_groups: which of them each module needs, bool (modules, groups).
        per_rank: cost of one rank at each moment, (moments, modules).
        gains: utility above the lower bound, minus infinity outside the bounds, (modules, rungs).
        rises: ranks above the lower bound, (modules, rungs).
    """

    def __init__(self, problem: AllocationProblem, utility: FloatArray) -> None:
        self._problem, self._ranks = problem, problem.ladder.array
        self.low = problem.bottoms
        self._modules = np.arange(len(self.low))
        rungs = np.arange(len(self._ranks))
        within = (rungs >= self.low[:, None]) & (rungs <= problem.tops[:, None])
        self.gains = np.where(within, utility - utility[self._modules, self.low][:, None], -np.inf)
        self.rises = np.where(within, self._ranks - self._ranks[self.low][:, None], 0)
        self._base = moment_costs(problem.cost, self._ranks[self.low])
        self._slack = np.maximum(problem.limit - self._base, 1.0)
        cost = problem.cost
        unpaid = np.flatnonzero(~cost.module_groups[self.low > 0].any(axis=0))
        self.group_bytes, self.module_groups = cost.group_bytes[:, unpaid], cost.module_groups[:, unpaid]
        self.per_rank = problem.cost.per_rank

    def start(self) -> FloatArray:
        """The first prices of the moments, (moments,): equal at those at which the largest plan exceeds the limit."""
        exceeded = moment_costs(self._problem.cost, self._ranks[self._problem.tops]) > self._problem.limit
        result: FloatArray = exceeded / self._slack / max(1, int(np.count_nonzero(exceeded)))
        return result

    def shifted(self, prices: FloatArray, rungs: IntArray) -> FloatArray:
        """The prices of the moments after a plan, (moments,): higher where it comes nearer to the limit."""
        used = (moment_costs(self._problem.cost, self._ranks[rungs]) - self._base) / self._slack
        shares = prices * self._slack * np.exp(3 * (used - used.max()))
        result: FloatArray = shares / shares.sum() / self._slack
        return result

    def entries(self, prices: FloatArray) -> tuple[IntArray, FloatArray]:
        """Modules from the cheapest to reach to the most expensive, and the utility of a plan with each as its entry.

        Args:
            prices: of a byte at each moment, (moments,).

        Returns:
            The modules, int64 (modules,), and an estimate of the utility, (modules,); -inf if no such plan fits.
        """
        reach = self.module_groups @ (prices @ self.group_bytes)
        order = np.argsort(reach, kind="stable")
        choose = Market(self, order).priced(prices)
        tables = []
        for share in _GRID:
            choice = choose(share)
            worth = self.gains[self._modules, choice.rungs]
            tables.append((np.cumsum(worth[order]), reach[order] + np.cumsum(choice.paid[order])))
        worths, costs = np.array([w for w, _ in tables]), np.array([c for _, c in tables])
        return order, _interpolated(worths, costs)


def _interpolated(worths: FloatArray, costs: FloatArray) -> FloatArray:
    """The utility at a cost of 1, interpolated between rows of falling cost, (rows, entries) -> (entries,)."""
    fitting = costs <= 1.0
    row = np.where(fitting.any(axis=0), fitting.argmax(axis=0), -1)
    column = np.arange(costs.shape[1])
    upper = np.maximum(row - 1, 0)
    gap = costs[upper, column] - costs[row, column]
    part = np.where(gap > 0, (1.0 - costs[row, column]) / np.where(gap > 0, gap, 1.0), 0.0)
    result = worths[row, column] + np.minimum(part, 1.0) * (worths[upper, column] - worths[row, column])
    return np.where(row < 0, -np.inf, result)


class Market:
    """The plans for one entry, at any price.

    Args:
        relaxation: the problem.
        allowed: modules that may be adapted, the entry last, int64 (allowed,).
    """

    def __init__(self, relaxation: Relaxation, allowed: IntArray) -> None:
        self._allowed, self._start = allowed, relaxation.low
        left = np.flatnonzero(~relaxation.module_groups[allowed[-1]])
        self._payer, self._group = np.nonzero(relaxation.module_groups[:, left][allowed])
        self._group_bytes, self._per_rank = relaxation.group_bytes[:, left], relaxation.per_rank[:, allowed]
        self._gains, self._rises = relaxation.gains[allowed], relaxation.rises[allowed]
        self._low = relaxation.low[allowed]
        self._members = np.arange(len(allowed))

    def priced(self, prices: FloatArray) -> Callable[[float], Choice]:
        """The plans when the price of a byte is a share of the highest price at which any module is adapted.

        Args:
            prices: of a byte at each moment, relative to each other, (moments,).

        Returns:
            The choice at each share of the highest price, 0 to 1.
        """
        burden, bare = prices @ self._group_bytes, (prices @ self._per_rank)[:, None] * self._rises
        positive = bare > 0
        highest = float((self._gains[positive] / bare[positive]).max(initial=0.0))

        def choose(share: float) -> Choice:
            level = share * highest
            net = self._gains - level * bare
            rungs = net.argmax(axis=1)
            joined, dues = self._settle(rungs > self._low, net[self._members, rungs], level, burden)
            rungs = np.where(joined, rungs, self._low)
            plan, paid = self._start.copy(), np.zeros(len(self._start))
            plan[self._allowed] = rungs
            paid[self._allowed] = bare[self._members, rungs] + dues * joined
            return Choice(plan, paid)

        return choose

    def _settle(
        self, joined: BoolArray, value: FloatArray, level: float, burden: FloatArray
    ) -> tuple[BoolArray, FloatArray]:
        """Which modules are adapted, and what each pays for groups; modules that would lose are left out."""
        free = self._low > 0  # whose groups are paid in any case
        value = np.where(free, 0.0, value)
        while True:
            stake = np.where(joined, value, 0.0)
            total = np.bincount(self._group, weights=stake[self._payer], minlength=len(burden))
            rate = np.where(total > 0, burden / np.where(total > 0, total, 1.0), 0.0)
            dues = np.bincount(self._payer, weights=rate[self._group], minlength=len(stake)).astype(np.float64) * stake
            losing = joined & ~free & (level * dues > value)
            if not losing.any():
                return joined, dues
            joined = joined & ~losing
