"""The time of a run's step, measured before training, and the limit that a person sets it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..allocation.controller import RankController
from ..allocation.observation import Observation
from ..allocation.policy import Decision
from ..allocation.time_limit import FewestLayers, TimeLimit
from ..common.arrays import IntArray
from ..errors import UnsupportedError
from ..lora.adapters import PeftAdapters
from ..lora.ladder import REFERENCE_RANK
from ..lora.targets import TargetModule
from ..memory.batch_shape import BatchShape, reshaped
from ..memory.for_training import highest_ranks
from ..memory.measured_time import TimedPlan, measure_step_time, measured_share, timed_plans
from ..memory.model import MemoryModel
from ..memory.recomputation import fewest_recomputed
from ..memory.recording import Batch
from ..memory.step_time import PARTS, StepTime
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
    return _limit(budget, time, targets, fewest)


def _step_time(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    memory: MemoryModel | None,
    limit: float,
    recomputation: Recomputation | None,
) -> StepTime:
    """The time of a step with the run's largest batch; see `time_limit`."""
    batch, share = _timed_batch(run, targets, memory, limit, recomputation)
    time = measure_step_time(run.step, targets, batch, recomputation.take if recomputation else None)
    return time.scaled(np.full(len(PARTS), run.accumulation / share))


def _timed_batch(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    memory: MemoryModel | None,
    limit: float,
    recomputation: Recomputation | None,
) -> tuple[Batch, float]:
    """The batch of timed steps, and its tokens as a share of those of the run's largest one; see `time_limit`."""
    batch, each = run.largest_batch(), run.step.rows_per_example
    whole = BatchShape.of(batch)
    layers = recomputation.layers if recomputation else ()
    shape = _largest_that_fits(memory, timed_plans(targets, layers), limit, each) if memory else whole
    timed = batch if shape == whole else reshaped(batch, shape, each)
    return timed, shape.rows * shape.length / (whole.rows * whole.length)


def settle_time(
    run: TrainingRun,
    controller: RankController[PeftAdapters],
    decide: Callable[[Observation], Decision],
    memory: MemoryModel | None,
    recomputation: Recomputation | None,
) -> None:
    """Let a run's limit of time agree with steps under the first plan that it leads to; see `TimeLimit.settled`.

    Args:
        run: that is about to begin.
        controller: before its first decision, with a limit of time; it gets the new one.
        decide: the policy.
        memory: see `time_limit`, as `recomputation`.
        recomputation: chooses the layers that run again; all do now, and afterwards.
    """
    given, targets = controller.time, controller.targets
    assert given is not None, "time is limited"
    plain = np.minimum(REFERENCE_RANK, highest_ranks(targets))
    take = recomputation.take if recomputation else None

    def plan(limit: TimeLimit) -> IntArray:
        controller.time = limit
        problem = controller.problem()
        limit.check(problem)
        return controller.propose(decide(controller.observe(0)))[1].ranks

    def measured(ranks: IntArray) -> float:
        planned, reference = (ranks, given.layers(ranks) if given.layers else ()), (plain, ())

        def share() -> float:
            batch, _ = _timed_batch(run, targets, memory, controller.limit, recomputation)
            return measured_share(run.step, targets, batch, planned, reference, take)

        return run.measured(share)

    controller.time = given.settled(plan, measured, given.time.seconds(plain, () if take else None))
    if recomputation:
        recomputation.take(recomputation.layers)


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
    return _limit(budget, before.time, targets, before.layers)


def _limit(
    budget: TimeBudget, time: StepTime, targets: Sequence[TargetModule], layers: FewestLayers | None
) -> TimeLimit:
    most = highest_ranks(targets)
    plain = np.minimum(REFERENCE_RANK, most)  # beside it with the layers that the user's step runs again
    beside = time.seconds(plain) if budget == TimeBudget.unlimited() else None
    return TimeLimit(time, budget.resolve(time, most), layers, beside)


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
