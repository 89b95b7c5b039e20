"""How a plan is built: module by module and rung by rung, within a limit.

The plan with the most utility inside a budget, exactly.

The utility of a plan is a sum over its modules; its cost is not. Modules q, k and v share an input, the tensors above
the lowest adapted module are kept once for all modules, and the peak is the highest of several moments. All of that is
linear in two sets of variables: whether a module has a rung, and whether a group is paid. So the best plan is the
solution of a mixed-integer linear program, which HiGHS finds (`scipy.optimize.milp`).
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, kron

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..cost.cost import FixedCost, plan_cost
from ..errors import ConfigError
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


GAP = 1e-6
"""The most utility that the result may lack, as a share of the best: from here on HiGHS stops to search."""


def best_plan(problem: AllocationProblem, utility: FloatArray) -> IntArray:
    """The plan with the most utility that fits.

    Args:
        problem: costs, limit, ladder and bounds; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.
        utility: of each rung on each module, (modules, rungs): 0 at rank 0, and not falling along the ladder.

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
    problem = problem.fresh()
    ladder = problem.ladder.array
    if not problem.fits(ladder[problem.bottoms]):
        return ladder[problem.bottoms]
    rungs, limit = _solve(problem, utility, problem.limit), problem.limit
    while not problem.fits(ladder[rungs]):  # by the solver's tolerance, a millionth of the limit
        limit -= 1e-6 * problem.limit
        rungs = _solve(problem, utility, limit)
    draft = PlanBuilder(problem, np.zeros(len(rungs)), rungs)
    draft.fill(problem.tops)
    return draft.ranks


def _solve(problem: AllocationProblem, utility: FloatArray, limit: float) -> IntArray:
    """The rungs of the best plan within a limit, int64 (modules,); its variables: each module's rungs, then groups."""
    cost, steps = problem.cost, np.arange(1, len(problem.ladder.ranks))
    modules, groups = len(utility), cost.group_bytes.shape[1]
    allowed = (steps >= problem.bottoms[:, None]) & (steps <= problem.tops[:, None])
    one_rung = kron(csr_array(np.eye(modules)), np.ones((1, len(steps))), format="csr")
    group, member = np.nonzero(cost.needs)
    paid = csr_array((np.ones(len(group)), (np.arange(len(group)), group)), shape=(len(group), groups))
    held = np.kron(cost.per_rank, problem.ladder.array[1:]) / limit
    result = milp(
        -np.append(utility[:, 1:].ravel(), np.zeros(groups)) / max(float(utility.max()), 1e-300),
        constraints=[
            LinearConstraint(block_array([[one_rung, csr_array((modules, groups))]]), problem.bottoms > 0, 1),
            LinearConstraint(block_array([[one_rung[member], -paid]]), -np.inf, 0),
            LinearConstraint(np.hstack([held, cost.group_bytes / limit]), -np.inf, 1 - cost.constant / limit),
        ],
        integrality=np.append(np.ones(allowed.size), np.zeros(groups)),
        bounds=Bounds(0, np.append(allowed.ravel(), np.ones(groups))),
        options={"mip_rel_gap": GAP},
    )
    chosen = np.round(result.x[: allowed.size]).reshape(allowed.shape)
    return np.asarray((chosen * steps).sum(axis=1), dtype=np.int64)
