"""What a policy sees at a decision, computed alike in an episode on a proxy and in a real fine-tune.

All numbers are relative (shares, ratios, logarithms), so that a policy can be used on models of other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import FloatArray
from ..errors import UnknownNameError
from ..lora.signals import SIGNALS
from ..memory.cost import FixedCost, plan_cost
from .features import MODULE_FEATURES, MOST_FEATURE, RUN_FEATURES
from .module_shapes import ModuleShapes
from .problem import AllocationProblem
from .time_limit import under_limit

Float32Array = NDArray[np.float32]


_OF_LIMIT = [MODULE_FEATURES.index(name) for name in ("next_rung_cost", "drop_saving", "adapt_cost")]
_BUDGET, _SPENT = (RUN_FEATURES.index(name) for name in ("budget", "spent"))


@dataclass(frozen=True, eq=False)
class Observation:
    """All that a policy sees at a decision.

    Attributes:
        modules: float32 (modules, len(MODULE_FEATURES)).
        run: float32 (len(RUN_FEATURES),).
        problem: the plans that are possible now.
        names: of the modules, for logs; no policy reads them.
    """

    modules: Float32Array
    run: Float32Array
    problem: AllocationProblem
    names: tuple[str, ...]

    def padded(self, count: int) -> dict[str, NDArray[np.generic]]:
        """The observation of the Gymnasium environment: flat, module after module, with zeros up to `count` modules."""
        size = len(self.modules)
        modules = np.zeros((count, len(MODULE_FEATURES)), dtype=np.float32)
        modules[:size] = self.modules
        mask = np.zeros(count, dtype=np.int8)
        mask[:size] = 1
        return {"module_features": modules.reshape(-1), "run_features": self.run.copy(), "mask": mask}


@dataclass(frozen=True)
class RunState:
    """Where a run stands at a decision.

    Attributes:
        progress: share of its steps that are done, 0 to 1.
        decisions_left: decisions after this one.
        reference_cost: what rank 8 on all modules costs, in the unit of the budget.
        first_loss: training loss at the start of the probe, > 0.
        losses: mean training loss of each interval so far; empty at the first decision.
        total_steps: optimiser steps of the run.
        rows: of an optimiser step, in all its batches.
        probe_fall: see `ProbeResult`.
        predicted: see `ProbeResult`.
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


def _centred_log(values: FloatArray) -> FloatArray:
    """log(values) minus the mean of the finite logs, within -3 and 3; 0 where a value is not finite or not positive."""
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
) -> Observation:
    """The observation at one decision.

    Args:
        problem: the plans that are possible now.
        names: module names.
        signals: as read by `SignalMeter`, (modules, len(SIGNALS)).
        age: decisions since each module's signals were fresh, (modules,).
        shapes: of the modules.
        state: where the run stands.
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
    ]
    modules = np.clip(np.stack(columns, axis=1), -MOST_FEATURE, MOST_FEATURE).astype(np.float32)
    run = np.clip(_run_features(problem, spent, state), -MOST_FEATURE, MOST_FEATURE).astype(np.float32)
    return Observation(modules, run, problem, names)


def with_limit(observation: Observation, limit: float) -> Observation:
    """What would have been seen with another limit, all else equal, the limit of time among it.

    A `budget` that is cut off at 3 is scaled as if it were 3: what lies beyond is not in the observation.

    Args:
        observation: at a decision.
        limit: in the unit of its problem, > 0.
    """
    problem = under_limit(observation.problem, limit)
    modules, run = observation.modules.astype(np.float64), observation.run.astype(np.float64)
    modules[:, _OF_LIMIT] = np.stack(_shares_of_limit(problem), axis=1)
    run[_BUDGET] *= limit / observation.problem.limit
    run[_SPENT] = plan_cost(problem.cost, problem.ranks) / limit
    modules, run = np.clip(modules, -MOST_FEATURE, MOST_FEATURE), np.clip(run, -MOST_FEATURE, MOST_FEATURE)
    return replace(observation, modules=modules.astype(np.float32), run=run.astype(np.float32), problem=problem)


def _shares_of_limit(problem: AllocationProblem) -> list[FloatArray]:
    """What a change of each module's rank costs, as `_log_share`: the next rung up, dropping it, adapting it."""
    ladder, rungs = problem.ladder, problem.ladder.rung(problem.ranks)
    rise = ladder.array[np.minimum(rungs + 1, ladder.top)] - ladder.array[rungs]
    per_rank = problem.cost.per_rank.max(axis=0)
    return [_log_share(costs, problem.limit) for costs in (per_rank * rise, *_cost_changes(problem))]


def _log_share(costs: FloatArray, limit: float) -> FloatArray:
    """log10 of costs as multiples of an equal share of the limit, within -3 and 3, whatever the number of modules."""
    return np.asarray(np.log10(np.clip(costs * len(costs) / limit, 1e-3, 1e3)))


def _cost_changes(problem: AllocationProblem) -> tuple[FloatArray, FloatArray]:
    """What dropping each adapted module saves, and what adapting each other module at rank 1 adds; else 0."""
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
        ]
    )


def mean_feature(observation: Observation, names: tuple[str, ...]) -> FloatArray:
    """The mean of these features of each module, (modules,).

    Args:
        observation: what a policy sees.
        names: of `MODULE_FEATURES`.

    Raises:
        UnknownNameError: a name is none of them.
    """
    for name in names:
        if name not in MODULE_FEATURES:
            raise UnknownNameError.of("feature of modules", name, MODULE_FEATURES)
    columns = [MODULE_FEATURES.index(name) for name in names]
    return np.asarray(observation.modules[:, columns].mean(axis=1), dtype=np.float64)


def module_feature(observation: Observation, name: str) -> FloatArray:
    """One feature of each module, (modules,).

    Args:
        observation: what a policy sees.
        name: of `MODULE_FEATURES`.
    """
    return mean_feature(observation, (name,))
