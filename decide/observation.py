"""The observation at a decision, computed the same way for a proxy episode and a real fine-tune.

`MODULE_FEATURES` and `RUN_FEATURES` name the features of each module and of the run. All values are relative
(shares, ratios, logarithms), so a policy transfers to models of other sizes. Module names are not read: a module's role
follows from its shape and its place in its layer. In a transformer layer, the MLP has a wide inner side, written by one
module and read by another; attention keeps the width of the layer, or writes sides it does not read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import BoolArray, FloatArray
from ..common.errors import UnknownNameError
from ..cost.cost import FixedCost, plan_cost
from ..lora.adapters import SIGNALS
from ..lora.spec import ModuleSpec
from .plan.problem import AllocationProblem
from .rate_control import FEATURES as STEP_FEATURES

MOST_FEATURE = 3.0
"""Upper bound on the absolute value of a feature."""

STEPS_PREFIX = "steps_"
"""Name prefix of features computed from optimizer steps, see `RunRecord`."""

MODULE_FEATURES = (
    *SIGNALS, "rank", "adapted", "relative_depth", "shape", "rank_cost", "next_rung_cost", "drop_saving",
    "adapt_cost", "signal_age", "wide", "position", "last_move", "since_move", "fall", "fall_error",
)  # fmt: skip
"""Columns of `Observation.modules`, signals first; new ones are appended. For the meanings see `FineTuneEnv`."""

RUN_FEATURES = (
    "progress", "decisions_left", "budget", "spent", "modules", "depth", "loss", "trend", "horizon", "rows",
    "probe_fall", "predicted", "limit_move", *(f"{STEPS_PREFIX}{name.replace(' ', '_')}" for name in STEP_FEATURES),
)  # fmt: skip
"""Columns of `Observation.run`; those at the end are the rate control's step features, 0 if the steps are not read. New
ones are appended. For the meanings see `FineTuneEnv`.
"""

LABELS = 0.2
"""Below this share of tokens counted in the loss, a run learns labels, one per row."""


def learns_labels(run: Sequence[float]) -> bool:
    """True if a run learns classes or numbers rather than texts: its loss counts less than `LABELS` of the tokens.

    Args:
        run: features of the run, (len(RUN_FEATURES),).
    """
    return run[RUN_FEATURES.index("predicted")] < math.log2(LABELS) / 4


FEATURE_PREFIX, RUN_PREFIX = "feature.", "run."
"""Column prefixes of module and run features in tables."""


@dataclass(frozen=True, eq=False)
class ModuleShapes:
    """Shapes and positions of target modules.

    Attributes:
        ratios: d_out / d_in, (modules,).
        wide: mask of modules with their layer's inner side, as in an MLP, bool (modules,).
        positions: place among the modules of the layer, from the first (0) to the last (1), (modules,).
    """

    ratios: FloatArray
    wide: BoolArray
    positions: FloatArray

    @classmethod
    def of(cls, modules: Sequence[ModuleSpec]) -> ModuleShapes:
        """Shapes of some modules, in the order of the model."""
        blocks = np.array([module.block for module in modules], dtype=np.int64)
        wide, positions = np.zeros(len(modules), dtype=np.bool_), np.zeros(len(modules))
        for block in np.unique(blocks).tolist():
            members = np.flatnonzero(blocks == block)
            positions[members] = np.arange(len(members)) / max(1, len(members) - 1)
            wide[members] = _wide([modules[index] for index in members.tolist()])
        return cls(np.array([module.d_out / module.d_in for module in modules]), wide, positions)


def _wide(layer: Sequence[ModuleSpec]) -> list[bool]:
    """For each module of one layer, True if it has the inner side.

    The inner side is the largest side above the layer's width, written by one module and read by another. The width is
    the most common side; ties go to the smallest.
    """
    counts = Counter(side for module in layer for side in {module.d_in, module.d_out})
    width = min(counts, key=lambda side: (-counts[side], side))
    both = {module.d_in for module in layer} & {module.d_out for module in layer}
    inner = max((side for side in both if side > width), default=0)
    return [inner in (module.d_in, module.d_out) for module in layer]


_OF_LIMIT = [MODULE_FEATURES.index(name) for name in ("next_rung_cost", "drop_saving", "adapt_cost")]
_BUDGET, _SPENT = (RUN_FEATURES.index(name) for name in ("budget", "spent"))


@dataclass(frozen=True, eq=False)
class Observation:
    """Everything a policy sees at a decision.

    Attributes:
        modules: float32 (modules, len(MODULE_FEATURES)).
        run: float32 (len(RUN_FEATURES),).
        problem: the plans allowed now.
        names: names of the modules, for logs; not read by policies.
    """

    modules: NDArray[np.float32]
    run: NDArray[np.float32]
    problem: AllocationProblem
    names: tuple[str, ...]


@dataclass(frozen=True)
class RunState:
    """State of a run at a decision.

    Attributes:
        progress: share of steps done, 0 to 1.
        decisions_left: decisions after this one.
        reference_cost: cost of rank 8 on all modules, in the unit of the budget.
        first_loss: training loss at the start of the probe, > 0.
        losses: mean training loss of each interval so far; empty at the first decision.
        total_steps: optimizer steps of the run.
        rows: rows per optimizer step, over all its micro-batches.
        probe_fall: see `ProbeResult`.
        predicted: see `ProbeResult`.
        limit_before: limit at the previous decision, in the unit of the budget; None at the first one.
        steps: `rate_control.FEATURES` of the optimizer steps; None if the steps are not read.
    """

    progress: float
    decisions_left: int
    reference_cost: float
    first_loss: float
    losses: tuple[float, ...]
    total_steps: int
    rows: int
    probe_fall: float
    predicted: float
    limit_before: float | None = None
    steps: FloatArray | None = None


class Moves:
    """Last rank move of each module, and the change in loss since: information no signal provides.

    Attributes:
        state: rungs of the last move, decisions since, and log loss before it with its standard error, float64
            (modules, 4).
        latest: log loss of the latest interval, and its standard error; (0, 0) before the first one.
    """

    def __init__(self, modules: int) -> None:
        self.state: FloatArray = np.zeros((modules, 4))
        self.state[:, 1] = 4 * MOST_FEATURE
        self.latest: tuple[float, float] = 0.0, 0.0

    def interval(self, loss: float, error: float) -> None:
        """Record the log loss of a finished interval between two decisions."""
        self.latest = loss, error
        self.state[:, 1] += 1

    def moved(self, rungs: NDArray[np.int64]) -> None:
        """Record rank moves in rungs, (modules,); modules without a move age by one decision."""
        now = rungs != 0
        self.state[now] = np.column_stack([rungs[now], *(np.full(now.sum(), value) for value in (0.0, *self.latest))])

    def features(self) -> list[FloatArray]:
        """last_move, since_move, fall and fall_error, (modules,) each."""
        rungs, since, before, error = self.state.T
        known = (rungs != 0) & (since > 0)
        fall = np.where(known, 4 * (before - self.latest[0]), 0.0)
        return [rungs / 2, since / 4, fall, np.where(known, 4 * np.hypot(error, self.latest[1]), 0.0)]


def _centred_log(values: FloatArray) -> FloatArray:
    """log(values) minus the mean of the finite logs, clipped to -3 and 3; 0 for a non-finite or non-positive value."""
    known = np.isfinite(values) & (values > 0)
    logs = np.log(np.where(known, values, 1.0))
    centre = logs[known].mean() if known.any() else 0.0
    return np.where(known, np.clip(logs - centre, -MOST_FEATURE, MOST_FEATURE), 0.0)


def observe(
    problem: AllocationProblem,
    names: tuple[str, ...],
    signals: FloatArray,
    age: NDArray[np.int64],
    shapes: ModuleShapes,
    state: RunState,
    moves: Moves,
) -> Observation:
    """Return the observation at one decision.

    Args:
        problem: the plans allowed now.
        names: module names.
        signals: signals from `SignalMeter`, (modules, len(SIGNALS)).
        age: decisions since each module's signals were fresh, (modules,).
        shapes: shapes of the modules.
        state: state of the run.
        moves: last rank moves of the modules.
    """
    ranks, ladder = problem.ranks, problem.ladder
    rungs = ladder.rung(ranks)
    spent = plan_cost(problem.cost, ranks)
    columns = [_centred_log(signals[:, index]) for index in range(len(SIGNALS))]
    columns += [
        rungs / ladder.top,
        (ranks > 0).astype(np.float64),
        problem.blocks / max(1, int(problem.blocks.max())),
        np.clip(np.log(shapes.ratios), -MOST_FEATURE, MOST_FEATURE),
        _centred_log(problem.cost.per_rank.max(axis=0)),
        *_shares_of_limit(problem),
        age / 4,
        shapes.wide.astype(np.float64),
        shapes.positions,
        *moves.features(),
    ]
    modules = np.clip(np.stack(columns, axis=1), -MOST_FEATURE, MOST_FEATURE).astype(np.float32)
    run = np.clip(_run_features(problem, spent, state), -MOST_FEATURE, MOST_FEATURE).astype(np.float32)
    return Observation(modules, run, problem, names)


def with_limit(observation: Observation, limit: float) -> Observation:
    """Return the observation under another limit, with all else equal.

    A `budget` clipped at 3 is scaled as if it were 3: the observation lacks its true value.

    Args:
        observation: observation at a decision.
        limit: in the unit of its problem, > 0.
    """
    problem = replace(observation.problem, limit=limit)
    modules, run = observation.modules.astype(np.float64), observation.run.astype(np.float64)
    modules[:, _OF_LIMIT] = np.stack(_shares_of_limit(problem), axis=1)
    run[_BUDGET] *= limit / observation.problem.limit
    run[_SPENT] = plan_cost(problem.cost, problem.ranks) / limit
    modules, run = np.clip(modules, -MOST_FEATURE, MOST_FEATURE), np.clip(run, -MOST_FEATURE, MOST_FEATURE)
    return replace(observation, modules=modules.astype(np.float32), run=run.astype(np.float32), problem=problem)


def _shares_of_limit(problem: AllocationProblem) -> list[FloatArray]:
    """Cost of rank changes of each module, as `_log_share`: the next rung up, dropping it, adapting it."""
    ladder, rungs = problem.ladder, problem.ladder.rung(problem.ranks)
    rise = ladder.array[np.minimum(rungs + 1, ladder.top)] - ladder.array[rungs]
    per_rank = problem.cost.per_rank.max(axis=0)
    return [_log_share(costs, problem.limit) for costs in (per_rank * rise, *_cost_changes(problem))]


def _log_share(costs: FloatArray, limit: float) -> FloatArray:
    """log10 of costs as multiples of an equal share of the limit, clipped to -3 and 3, for any number of modules."""
    return np.asarray(np.log10(np.clip(costs * len(costs) / limit, 1e-3, 1e3)))


def _cost_changes(problem: AllocationProblem) -> tuple[FloatArray, FloatArray]:
    """Savings from dropping each adapted module, and cost of adapting each other module at rank 1; else 0."""
    adapted, per_rank = problem.ranks > 0, problem.cost.per_rank
    fixed = FixedCost(problem.cost, adapted)
    costs = (fixed.value + per_rank @ problem.ranks)[:, None]
    dropped = (costs - fixed.removals() - per_rank * problem.ranks).max(axis=0)
    added = (costs + fixed.additions(np.arange(len(adapted))) + per_rank).max(axis=0)
    return np.where(adapted, costs.max() - dropped, 0.0), np.where(adapted, 0.0, added - costs.max())


def _run_features(problem: AllocationProblem, spent: float, state: RunState) -> FloatArray:
    levels = [np.log(max(loss, 1e-6) / max(state.first_loss, 1e-6)) for loss in state.losses[-2:]] or [0.0]
    adapted = len(np.unique(problem.blocks[problem.ranks > 0]))
    return np.array(
        [
            state.progress,
            state.decisions_left / 4,
            problem.limit / state.reference_cost,
            spent / problem.limit,
            np.log2(len(problem.ranks)) / 10,
            adapted / len(np.unique(problem.blocks)),
            levels[-1],
            levels[-1] - levels[0],
            np.log10(state.total_steps) - 2,
            np.log10(state.rows),
            state.probe_fall,
            np.log2(max(state.predicted, 1e-6)) / 4,
            0.0 if state.limit_before is None else np.log2(problem.limit / state.limit_before),
            *(np.zeros(len(STEP_FEATURES)) if state.steps is None else state.steps),
        ]
    )


def mean_feature(observation: Observation, names: tuple[str, ...]) -> FloatArray:
    """Mean of some features for each module, (modules,).

    Args:
        observation: observation of the policy.
        names: names from `MODULE_FEATURES`.

    Raises:
        UnknownNameError: a name is not one of them.
    """
    for name in names:
        if name not in MODULE_FEATURES:
            raise UnknownNameError.of("feature of modules", name, MODULE_FEATURES)
    columns = [MODULE_FEATURES.index(name) for name in names]
    return np.asarray(observation.modules[:, columns].mean(axis=1), dtype=np.float64)


def module_feature(observation: Observation, name: str) -> FloatArray:
    """One feature of each module, (modules,).

    Args:
        observation: observation of the policy.
        name: name from `MODULE_FEATURES`.
    """
    return mean_feature(observation, (name,))
