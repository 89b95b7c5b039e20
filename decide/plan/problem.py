"""The plans allowed at one decision, how to build one within the limit, and how to find the one with the most utility.

The utility of a plan is a sum over its modules; its cost is not. Modules q, k and v share an input, the tensors above
the lowest adapted module are kept once for all modules, and the peak is the maximum over several moments. All of this
is linear in two sets of variables: whether a module has a rung, and whether a group is paid. The best plan is therefore
the solution of a mixed-integer linear program, solved by HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...common.arrays import BoolArray, FloatArray, IntArray
from ...common.errors import ConfigError, UnknownNameError, shown
from ...cost.cost import Cost, FixedCost, plan_cost
from ...cost.step_time import PlanSeconds
from ...lora.spec import DEFAULT_RANKS, ModuleSpec, RankLadder, highest_ranks

MOST_RANK = 2**31 - 1
"""Maximum rank in a bound; the decision log stores ranks in 32 bits."""

Bounds = Mapping[str, int | tuple[int, int]]
"""{module name or suffix, as in `LoraConfig.target_modules`: its rank, or its minimum and maximum rank}."""


def rank_bounds(modules: Sequence[ModuleSpec], bounds: Bounds) -> tuple[IntArray, IntArray]:
    """Minimum and maximum rank of each module, int64 (modules,) each.

    Args:
        modules: all target modules.
        bounds: bounds for some of them; if several entries match a module, the last one applies.

    Raises:
        UnknownNameError: an entry matches no module.
        ConfigError: a bound is negative, the minimum exceeds the maximum, or no rank lies between them.

    Example:
        >>> rank_bounds(modules, {"q_proj": 8, "layers.0.mlp.down_proj": (0, 4)})  # doctest: +SKIP
    """
    low = np.zeros(len(modules), dtype=np.int64)
    useful = highest_ranks(modules)
    high = useful.copy()
    for name, bound in bounds.items():
        chosen = [i for i, module in enumerate(modules) if module.name == name or module.name.endswith(f".{name}")]
        if not chosen:
            names = [module.name for module in modules]
            ends = [full.rpartition(".")[2] for full in names]
            raise UnknownNameError.of("target module", name, dict.fromkeys([*ends, *names]))
        least, most = bound_of(name, bound)
        if not any(least <= rank <= most for rank in DEFAULT_RANKS):
            reason = f"none of {DEFAULT_RANKS} is between {least} and {most}"
            raise ConfigError(f"The bounds of {name!r} allow no rank: {reason}.")
        low[chosen], high[chosen] = np.minimum(least, useful[chosen]), most
    return low, high


def floor_of_experts(
    modules: Sequence[ModuleSpec], cost: Cost, limit: float, low: IntArray, high: IntArray
) -> IntArray:
    """Minimum ranks raised to a common rank for all experts, int64 (modules,), if affordable; otherwise unchanged.

    In 173 runs of small mixtures, leaving experts out cost more than any plan of the ranks gained
    (benchmarks/EXPERIMENTS.md). Upper bounds take precedence.
    """
    experts = np.array([module.experts > 1 for module in modules]) & (high > 0)
    floor: IntArray = np.where(experts, np.maximum(low, 1), low)
    return floor if plan_cost(cost, floor) <= limit else low


def bound_of(name: object, bound: object) -> tuple[int, int]:
    """Minimum and maximum rank of a bound; ConfigError if the bound or the module's name is invalid."""
    match bound if isinstance(name, str) else None:
        case bool() | (bool(), _) | (_, bool()):
            pass
        case int(rank) if 0 <= rank <= MOST_RANK:
            return rank, rank
        case (int(least), int(most)) if 0 <= least <= most <= MOST_RANK:
            return least, most
    raise ConfigError(
        f"Bounds must be a rank or a (low, high) pair by module name or its suffix, such as {{'q_proj': "
        f"(0, 16)}}, from 0 to {MOST_RANK:,}; got {shown(name)}: {shown(bound)}."
    )


HYSTERESIS = 0.2
"""Minimum score difference, in log rank, to move rank from one module to another at later decisions.

Noise changes scores by 0.05 to 0.1 from one interval to the next.
"""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Everything that determines the allowed plans.

    Attributes:
        ranks: current ranks, int64 (modules,).
        max_ranks: maximum useful rank of each module, int64 (modules,).
        blocks: layer of each module, 0 nearest to the input, int64 (modules,).
        cost: cost of plans.
        limit: maximum cost of a plan, in the unit of `cost`.
        ladder: the allowed ranks.
        max_step: maximum rungs a module may move at this decision; None for no limit.
        pinned: mask of modules with a fixed rank, bool (modules,); None for no module. If nothing else fits, those
            without a lower bound are dropped.
        low: minimum rank of each module, int64 (modules,); None for 0. Between two rungs, the upper one applies; a
            module unable to reach it gets its maximum. Lower bounds override the budget and `max_step`.
        high: maximum rank of each module, int64 (modules,); None for `max_ranks`. Upper bounds override `max_step`.
        hysteresis: minimum lead of a module's score over another's, in log rank, to take rank from it; at least 0.
        time: seconds of a step under any plan, which no plan has to keep; None if the goal is not to save time.

    Raises:
        ConfigError: `low` or `high` has another shape or holds a negative rank, or leaves a module no rung.
    """

    ranks: IntArray
    max_ranks: IntArray
    blocks: IntArray
    cost: Cost
    limit: float
    ladder: RankLadder
    max_step: int | None = None
    pinned: BoolArray | None = None
    low: IntArray | None = None
    high: IntArray | None = None
    hysteresis: float = 0.0
    time: PlanSeconds | None = None

    @classmethod
    def of(
        cls,
        modules: Sequence[ModuleSpec],
        cost: Cost,
        limit: float,
        *,
        max_step: int | None = None,
        low: IntArray | None = None,
        high: IntArray | None = None,
        ranks: IntArray | None = None,
        configured: IntArray | None = None,
    ) -> AllocationProblem:
        """Build the problem for these modules; later decisions use `HYSTERESIS`.

        Args:
            modules: the target modules; their tensors are not used.
            cost: cost of plans.
            limit: maximum cost of a plan.
            max_step: maximum rungs per module; None at the first decision, free to use the whole ladder.
            low: minimum rank of each module, (modules,).
            high: maximum rank of each module, (modules,).
            ranks: current ranks, int64 (modules,); by default no module is adapted.
            configured: ranks that are allowed too, off the ladder or above the highest useful one, int64 (modules,).
        """
        if ranks is None:
            ranks = np.zeros(len(modules), dtype=np.int64)
        blocks, hysteresis = [module.block for module in modules], 0.0 if max_step is None else HYSTERESIS
        highest, ladder = highest_ranks(modules), RankLadder()
        if configured is not None:
            highest, ladder = np.maximum(highest, configured), ladder.including(configured)
        return cls(
            ranks=ranks, max_ranks=highest, blocks=np.array(blocks, dtype=np.int64), cost=cost,
            limit=limit, ladder=ladder, max_step=max_step, low=low, high=high, hysteresis=hysteresis,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if not self.hysteresis >= 0:
            raise ConfigError(f"hysteresis must be at least 0; got {self.hysteresis}.")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and (np.shape(bound) != np.shape(self.ranks) or np.min(bound, initial=0) < 0):
                raise ConfigError(
                    f"{name} must have a rank of at least 0 for each of the {len(self.ranks)} modules; got "
                    f"{np.size(bound)} from {np.min(bound, initial=0)}."
                )
        if self.low is not None:
            self._check_rungs(self.low)

    def _check_rungs(self, low: IntArray) -> None:
        """Check that each module has a rung between its bounds."""
        wrong = np.flatnonzero((low > self._most) | (self.bottoms > self.tops)).tolist()
        if not wrong:
            return
        module, ladder = wrong[0], self.ladder.ranks
        least, most = int(low[module]), int(self._most[module])
        between = f"no rank of {ladder} is between {least} and {most}"
        reason = f"low {least} is above high {most}" if least > most else between
        raise ConfigError(f"The bounds of module {module} allow no rank: {reason}.")

    @cached_property
    def _most(self) -> IntArray:
        """Upper bound of each module, (modules,); without one, the larger of the ladder's end and `low`."""
        if self.high is not None:
            return self.high
        return np.maximum(np.int64(self.ladder.ranks[-1]), np.zeros_like(self.ranks) if self.low is None else self.low)

    @cached_property
    def tops(self) -> IntArray:
        """Highest rung within the bounds of each module, (modules,)."""
        return self.ladder.rung(np.minimum(self.max_ranks, self._most))

    @cached_property
    def bottoms(self) -> IntArray:
        """Lowest rung within the bounds of each module, (modules,)."""
        if self.low is None:
            return np.zeros_like(self.ranks)
        return np.minimum(self.ladder.rung_above(self.low), self.ladder.rung(self.max_ranks))

    @cached_property
    def rungs(self) -> IntArray:
        """Current rung of each module, (modules,); a rank between two rungs is rounded down."""
        return self.ladder.rung(self.ranks)

    @property
    def is_pinned(self) -> BoolArray:
        """Mask of pinned modules, bool (modules,)."""
        return np.zeros(len(self.ranks), dtype=np.bool_) if self.pinned is None else self.pinned

    def preference(self, scores: FloatArray) -> FloatArray:
        """Scores plus the hysteresis for currently adapted modules, (modules,)."""
        return scores + self.hysteresis * (self.rungs > 0)

    def fits(self, ranks: IntArray) -> bool:
        """True if a plan is within the limit."""
        return plan_cost(self.cost, ranks) <= self.limit

    def uniform(self, rank: int, lowest: int = 0) -> IntArray:
        """One rank on all modules from layer `lowest` up, even off the ladder, within each one's bounds, (modules,)."""
        low, high = self.ladder.array[self.bottoms], np.minimum(self.max_ranks, self._most)
        return np.clip(np.where(self.blocks >= lowest, rank, 0), low, high)

    def fresh(self) -> AllocationProblem:
        """Return the same problem at a first decision: no module is adapted, and any rank within bounds is allowed."""
        return replace(self, ranks=np.zeros_like(self.ranks), max_step=None, pinned=None, hysteresis=0.0)

    def bounds(self) -> tuple[IntArray, IntArray]:
        """Lowest and highest rung of each module at this decision, (modules,) each."""
        now = self.rungs
        reach = self.ladder.top if self.max_step is None else self.max_step
        upper = np.clip(now + reach, self.bottoms, self.tops)
        lower = np.clip(now - reach, self.bottoms, upper)
        kept = np.where((now > self.tops) & (self.bottoms == 0), 0, now)
        return np.where(self.is_pinned, kept, lower), np.where(self.is_pinned, kept, upper)


class PlanBuilder:
    """A plan under construction, with its cost.

    A move takes one module one rung up or down. Moves are made in order of their *level*: log(rank) - score, at the
    higher of the two ranks. Equal scores therefore give equal ranks. The level of a current rung is lowered by the
    hysteresis, and currently adapted modules come earlier among the modules to adapt. Rank therefore moves between two
    modules only if their scores differ by more than the hysteresis. At equal levels, modules further down are lowered
    first, and modules listed first are raised first.

    One more rank or module never makes a plan cheaper at any moment. A move that did not fit will not fit later while
    the plan grows, and bisection finds the number of moves that fit.

    Args:
        problem: the cost of plans, the limit, the ladder and current ranks.
        scores: log of each module's rank relative to the others, float (modules,).
        rungs: initial plan, int64 (modules,).

    Attributes:
        rungs: the plan, int64 (modules,).
        costs: its cost at each moment, (moments,).
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
        """Ranks of the plan, int64 (modules,)."""
        return np.asarray(self._ranks[self.rungs], dtype=np.int64)

    def fits(self) -> bool:
        """True if the plan is within the limit."""
        return bool(self.costs.max() <= self._limit)

    def lift(self, module: int, rung: int) -> bool:
        """Raise a module to this rung if it fits; return True on success."""
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
        """Set adapted modules to rank 0."""
        fixed = self._fixed.value
        self._fixed.remove_all(modules)
        self.costs = self.costs - self._per_rank[:, modules] @ self.ranks[modules] + (self._fixed.value - fixed)
        self.rungs[modules] = 0

    def lower(self, bound: IntArray) -> None:
        """Lower modules rung by rung until the plan fits, highest level first, none below its bound."""
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
        """Raise modules until no further rung fits, none above its bound: adapted modules first, then others."""
        self.raise_adapted(upper)
        if self._adapt_more(upper):
            self.raise_adapted(upper)

    def _adapt_more(self, upper: IntArray) -> bool:
        """Adapt further modules where they fit, best scores first; return True if any was adapted."""
        absent = self._can_rise((self.rungs == 0) & (upper > 0))
        alone = self.costs[:, None] + self._fixed.additions(absent) + self._per_rank[:, absent] * self._ranks[1]
        able = absent[(alone <= self._limit).all(axis=0)]
        order = np.argsort(-self._preference[able], kind="stable")
        lifted = [self.lift(module, 1) for module in able[order].tolist()]
        return any(lifted)

    def _can_rise(self, modules: BoolArray) -> IntArray:
        """Indices of the modules with room for one more rank, ignoring the cost of further groups."""
        able = np.flatnonzero(modules)
        rises = self._per_rank[:, able] * self._rises[self.rungs[able] + 1]
        return np.asarray(able[(rises <= (self._limit - self.costs)[:, None]).all(axis=0)])

    def raise_adapted(self, upper: IntArray) -> None:
        """Raise adapted modules rung by rung wherever it fits, lowest level first, none above its bound."""
        able, high = self._can_rise((self.rungs > 0) & (self.rungs < upper)), self.rungs.copy()
        high[able] = upper[able]
        modules, rungs, levels = self._moves(self.rungs, high)
        order = np.argsort(levels, kind="stable")
        self.take(modules[order], rungs[order])

    def take(self, modules: IntArray, rungs: IntArray) -> None:
        """Raise adapted modules by these moves, in order, wherever they fit.

        Args:
            modules: module of each move, (moves,).
            rungs: rung after the move, one above the module's previous one, (moves,).
        """
        rises = self._per_rank[:, modules] * self._rises[rungs]
        while len(modules):
            # If one move of a module does not fit, none of its later moves does.
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
"""Relative optimality gap of the utility at which HiGHS stops searching."""


def best_plan(problem: AllocationProblem, utility: FloatArray) -> IntArray:
    """Return the plan with the most utility within the limit.

    Args:
        problem: costs, limit, ladder and bounds; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.
        utility: utility of each rung on each module, (modules, rungs): 0 at rank 0, and non-decreasing along the
            ladder.

    Returns:
        Ranks on the ladder, int64 (modules,), none of which can be raised; the lower bounds if not even they fit.

    Raises:
        ConfigError: the utilities have another shape, are not finite, decrease, or are not 0 at rank 0.
    """
    expected = (len(problem.ranks), len(problem.ladder.ranks))
    if np.shape(utility) != expected:
        raise ConfigError(f"utility must have a number for each module and rung, {expected}; got {np.shape(utility)}.")
    if not np.isfinite(utility).all() or (np.diff(utility, axis=1) < 0).any() or utility[:, 0].any():
        raise ConfigError("utility must be 0 at rank 0, finite, and non-decreasing along the ladder.")
    problem = problem.fresh()
    ladder = problem.ladder.array
    if not problem.fits(ladder[problem.bottoms]):
        return ladder[problem.bottoms]
    rungs, limit = _solve(problem, utility, problem.limit), problem.limit
    while not problem.fits(ladder[rungs]):  # exceeded by the solver's tolerance, a millionth of the limit
        limit -= 1e-6 * problem.limit
        rungs = _solve(problem, utility, limit)
    draft = PlanBuilder(problem, np.zeros(len(rungs)), rungs)
    draft.fill(problem.tops)
    return draft.ranks


def _solve(problem: AllocationProblem, utility: FloatArray, limit: float) -> IntArray:
    """Rungs of the best plan within a limit, int64 (modules,); the variables are each module's rungs, then groups."""
    from scipy import optimize, sparse

    cost, steps = problem.cost, np.arange(1, len(problem.ladder.ranks))
    modules, groups = len(utility), cost.group_bytes.shape[1]
    allowed = (steps >= problem.bottoms[:, None]) & (steps <= problem.tops[:, None])
    one_rung = sparse.kron(sparse.csr_array(np.eye(modules)), np.ones((1, len(steps))), format="csr")
    group, member = np.nonzero(cost.needs)
    paid = sparse.csr_array((np.ones(len(group)), (np.arange(len(group)), group)), shape=(len(group), groups))
    held = np.kron(cost.per_rank, problem.ladder.array[1:]) / limit
    result = optimize.milp(
        -np.append(utility[:, 1:].ravel(), np.zeros(groups)) / max(float(utility.max()), 1e-300),
        constraints=[
            optimize.LinearConstraint(
                sparse.block_array([[one_rung, sparse.csr_array((modules, groups))]]), problem.bottoms > 0, 1
            ),
            optimize.LinearConstraint(sparse.block_array([[one_rung[member], -paid]]), -np.inf, 0),
            optimize.LinearConstraint(np.hstack([held, cost.group_bytes / limit]), -np.inf, 1 - cost.constant / limit),
        ],
        integrality=np.append(np.ones(allowed.size), np.zeros(groups)),
        bounds=optimize.Bounds(0, np.append(allowed.ravel(), np.ones(groups))),
        options={"mip_rel_gap": GAP},
    )
    chosen = np.round(result.x[: allowed.size]).reshape(allowed.shape)
    return np.asarray((chosen * steps).sum(axis=1), dtype=np.int64)
