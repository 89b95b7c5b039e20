"""The time of a run's step, measured before training, and what follows: its limit, and whether layers run again."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..agents.controller import RankController
from ..agents.observation import Observation
from ..agents.policy import Decision
from ..common.arrays import IntArray
from ..cost.batch_shape import BatchShape, reshaped
from ..cost.budget import TimeBudget
from ..cost.calibration import highest_ranks
from ..cost.measured_time import TimedPlan, measure_step_time, measured_share, timed_plans
from ..cost.model import MemoryModel, fewest_recomputed
from ..cost.recording import Batch
from ..cost.step_time import PARTS, StepTime
from ..errors import BudgetError, UnsupportedError
from ..lora.adapters import PeftAdapters
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule
from ..plan.goal import TOLERANCE
from ..plan.plan import check_budget
from ..plan.time_limit import FewestLayers, TimeLimit
from .peak_guard import PeakGuard
from .recomputation import Recomputation
from .run import TrainingRun

LEAST_LENGTH = 16
"""Texts are not cut below this many tokens, so that the time of a step is more than that of its overhead."""

Ask = Callable[[Observation], Decision]
"""Asks a policy for a decision."""


@dataclass(frozen=True, eq=False)
class StepTimer:
    """Times the steps of a run that is about to begin.

    Steps that are timed stay within the limit of bytes as well: if one would not with the largest batch, fewer rows or
    shorter texts are timed, and time counts in proportion to tokens. A step is an optimiser's step, with all its
    batches.

    Attributes:
        run: the run.
        targets: the target modules of its model.
        memory: predicts bytes, where the budget counts them; with all layers running again under `recomputation`.
        limit: of bytes, if `memory` is given.
        recomputation: chooses the layers that run again; all do while a method runs, and afterwards.
    """

    run: TrainingRun
    targets: Sequence[TargetModule]
    memory: MemoryModel | None
    limit: float
    recomputation: Recomputation | None

    def time_limit(self, budget: TimeBudget) -> TimeLimit:
        """Measure the time of a step under any plan, and set it the limit that its user gave.

        Raises:
            DataError, UnsupportedError: see `TrainingRun.largest_batch` and `measure_step_time`.
        """
        fewest = (
            partial(fewest_recomputed, self.memory, limit=self.limit) if self.recomputation and self.memory else None
        )
        return self._limit(budget, self.run.measured(self._step_time), fewest)

    def other_limit(self, before: TimeLimit | None, budget: TimeBudget | None) -> TimeLimit | None:
        """The limit of a run that is resumed with another time: of the time that was measured before, if it was.

        Args:
            before: the limit of the run that is resumed; None if it had none.
            budget: the new limit; None for none.
        """
        if budget is None:
            return None
        return self._limit(budget, before.time, before.layers) if before else self.time_limit(budget)

    def settle(self, controller: RankController[PeftAdapters], ask: Ask) -> None:
        """Let the limit of time agree with steps under the first plan that it leads to; see `TimeLimit.settled`.

        Args:
            controller: before its first decision, with a limit of time; it gets the new one.
            ask: the policy.
        """
        given = controller.time
        assert given is not None, "time is limited"
        plain = np.minimum(REFERENCE_RANK, highest_ranks(self.targets))

        def plan(limit: TimeLimit) -> IntArray:
            controller.time = limit
            problem = controller.problem()
            limit.check(problem)
            return controller.propose(ask(controller.observe(0)))[1].ranks

        def measured(ranks: IntArray) -> float:
            planned = ranks, given.layers(ranks) if given.layers else ()

            def share() -> float:
                batch, _ = self._timed_batch()
                return measured_share(self.run.step, self.targets, batch, planned, (plain, ()), self._take)

            return self.run.measured(share)

        controller.time = given.settled(plan, measured, given.time.seconds(plain, () if self._take else None))
        if self.recomputation:
            self.recomputation.take(self.recomputation.layers)

    @property
    def _take(self) -> Callable[..., None] | None:
        return self.recomputation.take if self.recomputation else None

    def _limit(self, budget: TimeBudget, time: StepTime, layers: FewestLayers | None) -> TimeLimit:
        most = highest_ranks(self.targets)
        plain = np.minimum(REFERENCE_RANK, most)  # beside it with the layers that the user's step runs again
        beside = time.seconds(plain) if budget == TimeBudget.unlimited() else None
        return TimeLimit(time, budget.resolve(time, most), layers, beside)

    def _step_time(self) -> StepTime:
        """The time of a step with the run's largest batch."""
        batch, share = self._timed_batch()
        time = measure_step_time(self.run.step, self.targets, batch, self._take)
        return time.scaled(np.full(len(PARTS), self.run.accumulation / share))

    def _timed_batch(self) -> tuple[Batch, float]:
        """The batch of timed steps, and its tokens as a share of those of the run's largest one."""
        batch, each = self.run.largest_batch(), self.run.step.rows_per_example
        whole = shape = BatchShape.of(batch)
        if self.memory:
            plans = timed_plans(self.targets, self.recomputation.layers if self.recomputation else ())
            shape = _largest_that_fits(self.memory, plans, self.limit, each)
        timed = batch if shape == whole else reshaped(batch, shape, each)
        return timed, shape.rows * shape.length / (whole.rows * whole.length)


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


def decide(
    guard: PeakGuard,
    controller: RankController[Any],
    ask: Ask,
    note: Callable[[str], None],
    step: int,
    loss: float | None,
    *,
    recomputes: bool,
) -> tuple[Observation, Decision]:
    """Ask a policy for a decision; at the first one, where layers may run again, for two, and take the better one.

    The plan without recomputation takes less time. So it is taken unless the networks expect that the other one's loss
    is lower by more than `TOLERANCE`. A rule expects nothing, and a goal of cost has a cost of its own: there, layers
    run again as the plan needs.

    Args:
        guard: has priced plans for this decision.
        controller: of the run.
        ask: the policy.
        note: tells a line.
        step: optimiser steps done.
        loss: mean training loss since the last decision, if known.
        recomputes: whether layers may run again in this run.

    Returns:
        What was seen, and the decision; plans are priced as they were for it.

    Raises:
        BudgetError: no plan fits.
    """
    observation = controller.observe(step, loss)
    decision = ask(observation)
    gained = _expected(decision)
    if controller.decision or not recomputes or gained is None:
        return observation, decision
    guard.deciding(recomputing=False)
    try:
        check_budget(controller.problem(), list(controller.names))
        without = controller.observe(step, loss)
        other = ask(without)
    except BudgetError:
        guard.deciding()
        return observation, decision
    lost = _expected(other)
    if lost is None or lost - gained > TOLERANCE:
        guard.deciding()
        return observation, decision
    note(
        f"No layer runs again before memory asks for it: that is expected to lower the loss by {lost - gained:.3f} "
        f"(log), and it is worth its time from {TOLERANCE:g} on."
    )
    return without, other


def _expected(decision: Decision) -> float | None:
    """The loss that is expected beside plain LoRA; None of a rule, and under a goal of cost."""
    found = decision.deliberation
    return None if found is None or found.goal.saves else found.loss_beside_plain
