"""The time of a run's step, measured before training, and the limit that a person sets it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

import numpy as np

from ..allocation.time_limit import TimeLimit
from ..errors import UnsupportedError
from ..lora.targets import TargetModule
from ..memory.batch_shape import BatchShape, reshaped
from ..memory.for_training import highest_ranks
from ..memory.measured_time import TimedPlan, measure_step_time, timed_plans
from ..memory.model import MemoryModel
from ..memory.recomputation import fewest_recomputed
from ..memory.step_time import StepTime
from ..memory.time_budget import TimeBudget
from .recomputation import Recomputation
from .run import TrainingRun

LEAST_LENGTH = 16
"""Texts are not cut below this many tokens, so that the time of a step is more than that of its overhead."""


def time_limit(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    budget: TimeBudget,
    memory: MemoryModel | None,
    limit: float,
    recomputation: Recomputation | None,
) -> TimeLimit:
    """Measure the time of a run's step under any plan, and set its limit.

    Steps that are timed stay within the limit of bytes as well: if one would not with the largest batch, fewer rows or
    shorter texts are timed, and time counts in proportion to tokens. A step is an optimiser's step, with all its
    batches.

    Args:
        run: the run.
        targets: the target modules of its model.
        budget: the limit of time as its user gave it.
        memory: predicts bytes, where the budget counts them; with all layers running again under `recomputation`.
        limit: of bytes, if `memory` is given.
        recomputation: chooses the layers that run again; all do now.

    Raises:
        DataError, UnsupportedError: see `TrainingRun.largest_batch` and `measure_step_time`.
    """
    time = run.measured(lambda: _step_time(run, targets, memory, limit, recomputation))
    fewest = partial(fewest_recomputed, memory, limit=limit) if recomputation and memory else None
    return TimeLimit(time, _seconds(budget, time, targets), fewest)


def _step_time(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    memory: MemoryModel | None,
    limit: float,
    recomputation: Recomputation | None,
) -> StepTime:
    """The time of a step with the run's largest batch; see `time_limit`."""
    batch, each = run.largest_batch(), run.step.rows_per_example
    whole = BatchShape.of(batch)
    layers = recomputation.layers if recomputation else ()
    shape = _largest_that_fits(memory, timed_plans(targets, layers), limit, each) if memory else whole
    timed = batch if shape == whole else reshaped(batch, shape, each)
    time = measure_step_time(run.step, targets, timed, recomputation.take if recomputation else None)
    factor = run.accumulation * whole.rows * whole.length / (shape.rows * shape.length)
    return time.scaled(np.full(5, factor))


def other_time_limit(
    before: TimeLimit | None,
    run: TrainingRun,
    targets: Sequence[TargetModule],
    budget: TimeBudget | None,
    memory: MemoryModel | None,
    limit: float,
    recomputation: Recomputation | None,
) -> TimeLimit | None:
    """The limit of a run that is resumed with another time: of the time that was measured before, if it was.

    Args:
        before: the limit of the run that is resumed.
        run: see `time_limit`, as the other arguments.
        targets: the target modules.
        budget: the new limit; None for none.
        memory: predicts bytes.
        limit: of bytes.
        recomputation: chooses the layers that run again.
    """
    if budget is None:
        return None
    if before is None:
        return time_limit(run, targets, budget, memory, limit, recomputation)
    return TimeLimit(before.time, _seconds(budget, before.time, targets), before.layers)


def _seconds(budget: TimeBudget, time: StepTime, targets: Sequence[TargetModule]) -> float:
    return budget.resolve(time, highest_ranks(targets))


def _largest_that_fits(
    memory: MemoryModel, plans: Sequence[TimedPlan], limit: float, rows_per_example: int
) -> BatchShape:
    """The largest batch with which all plans keep the limit of bytes; the smallest that is tried if none does."""
    rows, length = memory.shape.rows, memory.shape.length
    shapes = [BatchShape(few, length) for few in range(rows, 0, -rows_per_example)]
    while length // 2 >= LEAST_LENGTH:
        length //= 2
        shapes.append(BatchShape(rows_per_example, length))

    def fits(index: int) -> bool:
        steps = ((memory.recomputing(layers) if memory.segments else memory, ranks) for ranks, layers in plans)
        return all(step.peak(ranks, shapes[index]) <= limit for step, ranks in steps)

    try:
        return shapes[min(bisect_left(range(len(shapes)), True, key=fits), len(shapes) - 1)]
    except UnsupportedError:  # the shape that was measured is the only one that is known
        return memory.shape
