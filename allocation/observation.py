"""What a policy sees: the same numbers in a proxy episode and in a real fine-tune.

Everything is relative (shares, ratios, logarithms), so that a policy carries over to models of other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import FloatArray
from ..lora.signals import SIGNALS
from ..memory.cost import plan_cost
from .fixed_cost import FixedCost
from .problem import AllocationProblem

Float32Array = NDArray[np.float32]


class Feature(NamedTuple):
    """One feature of what a policy sees.

    Attributes:
        name: as in `MODULE_FEATURES` or `RUN_FEATURES`.
        meaning: what is measured, in which unit.
        values: the range of its values.
    """

    name: str
    meaning: str
    values: str


_BOUNDED, _SHARE, _UP_TO_THREE = "-3 to 3", "0 to 1", "0 to 3"

MODULE_FEATURE_TABLE = (
    Feature("sensitivity", "log component sensitivity per rank, minus its mean over the modules", _BOUNDED),
    Feature("snr", "log gradient signal-to-noise, minus its mean", _BOUNDED),
    Feature("relative_change", "log norm(delta W) / norm(W), minus its mean", _BOUNDED),
    Feature("gradient_norm", "log root mean square norm of the gradient of B, minus its mean", _BOUNDED),
    Feature("importance", "log of AdaLoRA's sum of abs(weight * gradient) over B per rank, minus its mean", _BOUNDED),
    Feature("rank", "rung over highest rung", _SHARE),
    Feature("adapted", "1 if the rank is above 0", "0 or 1"),
    Feature("height", "layer, from the bottom (0) to the top (1)", _SHARE),
    Feature("shape", "log(d_out / d_in)", _BOUNDED),
    Feature("price", "log price of one rank at the moment where it is highest, minus its mean", _BOUNDED),
    Feature("rise", "log10(price of the next rung up x modules / budget); -3 at the highest rung", _BOUNDED),
    Feature("release", "the same of what dropping the module would free; -3 if it is not adapted", _BOUNDED),
    Feature("entry", "the same of what adapting it at rank 1 would add; -3 if it is adapted", _BOUNDED),
    Feature("stale", "decisions since its signals were fresh, over 4", _UP_TO_THREE),
)
"""Columns of `Observation.modules`, the signals first. All are relative; none is a name."""

RUN_FEATURE_TABLE = (
    Feature("progress", "share of the run's steps that are done", _SHARE),
    Feature("decisions_left", "decisions after this one, over 4", _UP_TO_THREE),
    Feature("budget", "the budget over what uniform rank 8 takes", _UP_TO_THREE),
    Feature("spent", "price of the current ranks over the budget", _UP_TO_THREE),
    Feature("modules", "log2 of the number of modules, over 10", _UP_TO_THREE),
    Feature("depth", "share of the layers that are adapted", _SHARE),
    Feature("loss", "log of training loss since the last decision over the loss of the probe's start", _BOUNDED),
    Feature("trend", "change of `loss` since the last decision", _BOUNDED),
)
"""Columns of `Observation.run`."""

MODULE_FEATURES = tuple(feature.name for feature in MODULE_FEATURE_TABLE)
RUN_FEATURES = tuple(feature.name for feature in RUN_FEATURE_TABLE)


def feature_table(features: Sequence[Feature], indent: str = "") -> str:
    """Features as a Markdown table, for documentation.

    Args:
        features: such as `MODULE_FEATURE_TABLE`.
        indent: stands before every line but the first.
    """
    rows = [("feature", "meaning", "range"), ("---", "---", "---"), *features]
    return f"\n{indent}".join(f"| {' | '.join(row)} |" for row in rows)


_SUMS = [SIGNALS.index(name) for name in ("sensitivity", "importance")]
"""Signals that are sums over the components of a module, and grow with its rank."""

RUN_FEATURES = (
    "progress",
    "decisions_left",
    "budget",
    "spent",
    "modules",
    "depth",
    "loss",
    "trend",
)
"""Columns of `Observation.run`:

| feature | meaning | range |
|---|---|---|
| progress | share of the run's steps that are done | 0 to 1 |
| decisions_left | decisions after this one, over 4 | 0 to 3 |
| budget | the budget over what uniform rank 8 takes | 0 to 3 |
| spent | price of the current ranks over the budget | 0 to 3 |
| modules | log2 of the number of modules, over 10 | 0 to 3 |
| depth | share of the layers that are adapted | 0 to 1 |
| loss | log of training loss since the last decision over the loss of the probe's start | -3 to 3 |
| trend | change of `loss` since the last decision | -3 to 3 |
"""


@dataclass(frozen=True, eq=False)
class Observation:
    """One decision's input.

    Attributes:
        modules: float32 (modules, len(MODULE_FEATURES)).
        run: float32 (len(RUN_FEATURES),).
        problem: the plans that are possible now.
        names: module names, for logs alone; no policy reads them.
    """

    modules: Float32Array
    run: Float32Array
    problem: AllocationProblem
    names: tuple[str, ...]

    def padded(self, count: int) -> dict[str, NDArray[np.generic]]:
        """The arrays of a Gymnasium observation, padded with zeros to `count` modules and flat, module after module."""
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
        reference_cost: what uniform rank 8 costs, in the unit of the budget.
        first_loss: training loss at the start of the probe, > 0.
        losses: mean training loss of each interval so far; empty at the first decision.
    """

    progress: float
    decisions_left: int
    reference_cost: float
    first_loss: float
    losses: tuple[float, ...]


def _centred_log(values: FloatArray) -> FloatArray:
    """log(values) minus its mean over the finite ones, in -3 to 3; what is unknown or zero counts as the mean."""
    known = np.isfinite(values) & (values > 0)
    logs = np.log(np.where(known, values, 1.0))
    centre = logs[known].mean() if known.any() else 0.0
    return np.where(known, np.clip(logs - centre, -3, 3), 0.0)


def observe(
    problem: AllocationProblem,
    names: tuple[str, ...],
    signals: FloatArray,
    signal_ranks: NDArray[np.int64],
    age: NDArray[np.int64],
    shapes: FloatArray,
    state: RunState,
) -> Observation:
    """Build the observation of one decision.

    Args:
        problem: the plans that are possible now.
        names: module names.
        signals: as read by `SignalMeter`, (modules, len(SIGNALS)).
        signal_ranks: rank of each module while its signals were taken, (modules,).
        age: decisions since each module's signals were fresh, (modules,).
        shapes: d_out / d_in of each module, (modules,).
        state: where the run stands.
    """
    ranks, ladder, limit = problem.ranks, problem.ladder, problem.limit
    rungs = ladder.rung(ranks)
    spent = plan_cost(problem.cost, ranks)
    rise = ladder.array[np.minimum(rungs + 1, ladder.top)] - ladder.array[rungs]
    per_rank = problem.cost.per_rank.max(axis=0)
    release, entry = _price_changes(problem)
    scaled = signals.copy()
    scaled[:, _SUMS] /= np.maximum(signal_ranks, 1)[:, None]
    columns = [_centred_log(scaled[:, index]) for index in range(len(SIGNALS))]
    columns += [
        rungs / ladder.top,
        (ranks > 0).astype(np.float64),
        problem.blocks / max(1, int(problem.blocks.max())),
        np.clip(np.log(shapes), -3, 3),
        _centred_log(per_rank),
        *(_log_share(prices, limit) for prices in (per_rank * rise, release, entry)),
        age / 4,
    ]
    modules = np.clip(np.stack(columns, axis=1), -3, 3).astype(np.float32)
    run = np.clip(_run_features(problem, spent, state), -3, 3).astype(np.float32)
    return Observation(modules, run, problem, names)


def _log_share(prices: FloatArray, limit: float) -> FloatArray:
    """log10 of prices over an equal share of the budget, in -3 to 3: alike in models of any size."""
    return np.asarray(np.log10(np.clip(prices * len(prices) / limit, 1e-3, 1e3)))


def _price_changes(problem: AllocationProblem) -> tuple[FloatArray, FloatArray]:
    """What dropping each adapted module frees, and what adapting each other one at rank 1 adds; 0 elsewhere."""
    adapted, per_rank = problem.ranks > 0, problem.cost.per_rank
    fixed = FixedCost(problem.cost, adapted)
    price = (fixed.value + per_rank @ problem.ranks)[:, None]
    without = (price - fixed.removals() - per_rank * problem.ranks).max(axis=0)
    joined = (price + fixed.additions(np.arange(len(adapted))) + per_rank).max(axis=0)
    return np.where(adapted, price.max() - without, 0.0), np.where(adapted, 0.0, joined - price.max())


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
        ]
    )


def mean_feature(observation: Observation, names: tuple[str, ...]) -> FloatArray:
    """Mean of some columns of `MODULE_FEATURES`, (modules,)."""
    columns = [MODULE_FEATURES.index(name) for name in names]
    return np.asarray(observation.modules[:, columns].mean(axis=1), dtype=np.float64)


def module_feature(observation: Observation, name: str) -> FloatArray:
    """One column of `MODULE_FEATURES`, (modules,)."""
    return mean_feature(observation, (name,))
