"""Shrinks the plan while memory is short, and restores it when memory is free again.

Memory is short after an out-of-memory error, or when the budget's limit drops during the run. After an error the step
is repeated with a smaller plan: at most twice, and only if that plan is predicted to save a noticeable number of bytes.
If the step then succeeds, the plan grows back some steps later. If it fails again, ranks, adapters and optimizer are
restored to their state before the step.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...common.errors import BudgetError
from ...common.text import cost_text
from ...cost.budget import Budget, free_bytes
from ...cost.cost import ByteCost, moment_costs, plan_cost
from ...cost.record.model_states import state_bytes, trained_outside
from ...decide.plan.plan import Plan
from .journal import PlanChange
from .plan_keeper import PlanKeeper, PlanReduction, PlanState
from .put_back import AdapterSnapshot, adapter_bytes

ROOM = 1.02
"""The plan, or a part of it, grows back when the limit is this many times its cost, or as high as originally."""

MOST_TRIES = 2
"""Maximum number of repetitions of a step that ran out of memory."""

STEP_SHARE = 0.1
"""Maximum saving of each try relative to the last one, as a share of the step's bytes."""

PLAN_SHARE = 0.25
"""Maximum saving of each try relative to the last one, as a share of the reducible bytes: adapters, and layers that can
be checkpointed. Two tries thus keep at least half of the rank."""

LEAST_SHARE = 0.01
"""Minimum saving of a try, as a share of the step's bytes."""

ROUNDING = 16
"""Allowed excess in bytes: smaller ranks need fewer checkpointed layers, whose price may be rounded up."""


def no_reduction_yet(plan: PlanKeeper) -> PlanReduction:
    """Return an empty reduction with the current plan, the one to restore later."""
    applier, ranks, now = plan.applier, plan.applier.ranks, plan.now
    cost, whole = applier.cost_now(), None
    if isinstance(cost, ByteCost):
        costs = moment_costs(cost, ranks)
        whole = float(costs.max())
        reducible = float(cost.per_rank[costs.argmax()] @ ranks)
        if now.layers is not None:
            every = now.cost_of(now.shape, now.recorded)  # all checkpointed
            reducible += whole - plan_cost(applier.cost_now(every), ranks)
    else:
        reducible = plan_cost(cost, ranks)
        if plan.meter.history:
            whole = reducible * plan.meter.history[-1][1] / adapter_bytes(applier.targets, plan.run.optimizer)
    return PlanReduction(
        ranks=ranks,
        layers=plan.checkpointed,
        limit=now.limit,
        cost=plan_cost(cost, ranks),
        saved=saving_of_a_try(whole, reducible),
        times=0,
        step=plan.step,
    )


def next_limit(reduction: PlanReduction, cost: float) -> float | None:
    """Return the limit of the next smaller plan, in the unit of costs; None if no further try would help.

    Args:
        reduction: the reduction so far.
        cost: the cost of the current plan, in the unit of the limit.
    """
    if not reduction.saved or reduction.times == MOST_TRIES:
        return None
    return min(cost, reduction.cost - reduction.times * reduction.saved) - reduction.saved


def saving_of_a_try(whole: float | None, reducible: float) -> float:
    """Return the saving of each smaller plan relative to the last one; 0 if no saving would be noticeable.

    Args:
        whole: the cost of the whole step, in the unit of costs; None if unknown.
        reducible: its reducible part: adapters, and layers that can be checkpointed.
    """
    if whole is None:
        return PLAN_SHARE * reducible
    saved = min(STEP_SHARE * whole, PLAN_SHARE * reducible)
    return saved if saved >= LEAST_SHARE * whole else 0.0


@dataclass(frozen=True, eq=False)
class StepSnapshot:
    """Copy of everything a step may change, taken before the step and restored if it fails.

    Attributes:
        adapters: the adapters, PEFT's configuration and the optimizer's state.
        signals: accumulated state of the signal meter.
        decisions: the number of decisions and corrections in the journal.
        plan: the state of the plan keeper.
    """

    adapters: AdapterSnapshot
    signals: dict[str, Any]
    decisions: int
    plan: PlanState


class Shortage:
    """Shrinks the plan while memory is short, restores it later, and undoes failed steps.

    When the limit drops during the run and ranks are cut, the cut directions are kept in main memory, unless the budget
    itself counts main memory. When ranks grow back, these directions are added to the modules' newer weights, up to
    their ranks. The copy is dropped at a decision and is not part of a checkpoint; ranks then grow back with
    directions that start at zero, as after an out-of-memory error.

    Args:
        plan: keeps the plan of the run within its budget.

    Attributes:
        follows: True if the limit has moved since the run began. The plan then grows back before a step, up to the
            current limit, instead of after a number of good steps.
    """

    def __init__(self, plan: PlanKeeper) -> None:
        self._plan, self.follows = plan, False
        self._before: StepSnapshot | None = None
        self._tried: list[str] = []

    def keep(self) -> None:
        """Take a snapshot of everything the current step may change; later calls in the same step do nothing."""
        if self._before:
            return
        plan, applier = self._plan, self._plan.applier
        self._before = StepSnapshot(
            adapters=AdapterSnapshot(plan.run.model, applier.targets, plan.run.optimizer),
            signals=applier.adapters.meter.state_dict(),
            decisions=len(plan.journal.predictions),
            plan=plan.now,
        )

    def put_back(self) -> None:
        """Restore the snapshot after a final failure of the current step."""
        before, self._before = self._before, None
        self._tried.clear()
        if before is None:
            return
        plan = self._plan
        before.adapters.put_back()
        plan.applier.adapters.meter.load_state_dict(before.signals)
        plan.put(before.plan)
        plan.journal.forget(before.decisions)

    def passed(self) -> None:
        """Drop the snapshot after a successful step."""
        self._before = None
        self._tried.clear()

    def out_of_memory(self, error: torch.OutOfMemoryError) -> None:
        """Prepare to repeat a step that ran out of memory, with a smaller plan.

        A step is repeated at most `MOST_TRIES` times, and only if the smaller plan is predicted to save noticeably. If
        the plan has already shrunk and later steps succeeded, the error may have been a chance event: the step is then
        repeated once with the same plan.

        Args:
            error: the error of the step. The tensors held by its traceback are freed.

        Raises:
            torch.OutOfMemoryError: this error, if no smaller plan helps. The state before the step is restored.
            BudgetError: other processes are in the middle of the step.
        """
        plan = self._plan
        number = plan.step + 1
        self.drop_step(error)
        self.keep()
        if len(self._tried) < MOST_TRIES and self._try_again(number):
            return
        tried = "No smaller plan of rankpilot would need noticeably less"
        if self._tried:
            tried = f"rankpilot retried the step under {' and '.join(self._tried)}, without success"
        self.put_back()
        error.add_note(
            f"{tried}. Ranks, adapters and optimizer are restored to before step {number}. Lower the batch size or "
            "the length, or turn on gradient_checkpointing=True."
        )
        raise error

    def drop_step(self, error: torch.OutOfMemoryError) -> None:
        """Free the tensors and gradients of a step that ran out of memory, so that it can be repeated.

        Args:
            error: the error of the step.

        Raises:
            BudgetError: other processes are in the middle of the step.
        """
        plan, applier, run = self._plan, self._plan.applier, self._plan.run
        plan.meter.close()
        traceback.clear_frames(error.__traceback__)
        for parameter in [*run.model.parameters(), *trained_outside(run.model, run.optimizer)]:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        less = (1 - STEP_SHARE) * plan_cost(applier.cost_now(), applier.ranks)
        run.replicas.check_again(plan.step + 1, Budget(applier.cost.unit, less))
        plan.meter.request()

    def _try_again(self, number: int) -> bool:
        """Prepare to repeat this step, counted from 1; False if no smaller plan would help."""
        plan, applier, reduction = self._plan, self._plan.applier, self._plan.now.reduction
        if reduction and not self._tried:
            plan.run.warn("Step %d ran out of memory and is retried: earlier steps passed under this plan.", number)
            self._tried.append("the plan of the previous steps")
            plan.update(reduction=replace(reduction, step=plan.step))
            return True
        reduction = reduction or no_reduction_yet(plan)
        limit = next_limit(reduction, plan_cost(applier.cost_now(), applier.ranks))
        if limit is None:
            return False
        share = f"{100 * limit / reduction.cost:.0f} %"
        self._tried.append(f"a plan of {share} of its cost")
        plan.update(limit=limit, reduction=replace(reduction, times=reduction.times + 1, step=plan.step))
        if plan.fits_with_checkpointing(f"Step {number} ran out of memory and is retried."):
            return True
        plan.run.warn(
            "Step %d ran out of memory. The plan shrinks to %s of its cost, and the step is retried.", number, share
        )
        try:
            plan.correct("shrunk: out of memory", applier.ranks)
        except BudgetError:  # adapters that hold NaN cannot shrink
            return False
        cost = plan_cost(applier.cost_now(), applier.ranks)
        if limit < cost <= limit + ROUNDING:
            plan.update(limit=cost)
        return applier.fits()

    def follow(self, limit: float, step: int) -> None:
        """Adapt the plan to the current limit, before a step.

        If the plan no longer fits, more layers are checkpointed first, and then ranks shrink. It grows back after
        `GOOD_STEPS` steps or more: in full if there is room, otherwise fewer layers are checkpointed first, and then
        ranks grow up to the limit.

        Raises:
            BudgetError: no plan fits the limit.
        """
        plan, applier, reduction = self._plan, self._plan.applier, self._plan.now.reduction
        plan.step, self.follows = step, True
        if plan_cost(applier.cost_now(), applier.ranks) > limit:
            self.keep()
            plan.update(limit=limit, reduction=replace(reduction or no_reduction_yet(plan), step=plan.step))
            reason = f"At step {plan.step} there is room for {cost_text(limit, applier.cost.unit)}."
            if not plan.fits_with_checkpointing(reason):
                self._shrink(reason)
        elif reduction is None or limit < applier.limit:
            plan.update(limit=limit)
        elif plan.step - reduction.step >= plan.now.wait and limit > applier.limit:
            if (1 + 1e-9) * limit >= min(ROOM * reduction.cost, reduction.limit):
                self._give_back(reduction, limit)
            else:
                plan.update(limit=limit, reduction=replace(reduction, step=plan.step))
                plan.fits_with_checkpointing("More memory is free.")
                if len(plan.checkpointed) <= len(reduction.layers):
                    self._give_back(reduction, limit, whole=False)

    def _shrink(self, reason: str) -> None:
        """Shrink the ranks to the current limit; if no plan fits, restore the state before the step and raise."""
        try:
            self._plan.check_possible(reason)
        except BudgetError:
            self.put_back()
            raise
        self._plan.run.warn("%s The plan is shrunk.", reason)
        self._plan.correct("shrunk: less memory", self._plan.applier.ranks, keeps=self._keeps_cuts)

    @property
    def _keeps_cuts(self) -> bool:
        """True if cut directions are kept in main memory: not if the budget itself counts main memory."""
        return not self._plan.now.limits_bytes or self._plan.run.device.type == "cuda"

    def give_back_if_room(self) -> None:
        """Restore the plan after an out-of-memory error, once enough steps succeeded and memory is free again."""
        plan, run, applier = self._plan, self._plan.run, self._plan.applier
        reduction, history = plan.now.reduction, plan.meter.history
        if self.follows or reduction is None or plan.step >= applier.clock.total_steps:
            return
        if plan.step - reduction.step < plan.now.wait:
            return
        if run.device.type == "cuda" and history:  # without CUDA, good steps are the evidence
            more = reduction.cost - plan_cost(applier.cost_now(), applier.ranks)
            if not plan.now.limits_bytes:
                more *= adapter_bytes(applier.targets, run.optimizer) / plan_cost(applier.cost, applier.ranks)
            if history[-1][1] + more - state_bytes(run.model, run.optimizer) > free_bytes(run.device):
                return
        self._give_back(reduction, reduction.limit)

    def _give_back(self, reduction: PlanReduction, limit: float, *, whole: bool = True) -> None:
        """Restore the plan: its limit, checkpointed layers and ranks, with the cut directions.

        Args:
            reduction: holds the plan to restore.
            limit: the new limit of plans.
            whole: True if there is room for the whole plan. Otherwise modules get their ranks back one by one while
                there is room, and the rest later.
        """
        plan, applier, step = self._plan, self._plan.applier, self._plan.step
        if whole:
            plan.update(limit=limit, reduction=None, wait=(2 if reduction.times else 1) * plan.now.wait)
        else:
            plan.update(limit=limit / ROOM)
        plan.checkpoint(reduction.layers)  # as many as these ranks need
        observation = applier.observation_now(step)
        ranks = applier.ranks
        for module in np.flatnonzero(reduction.ranks > ranks):
            more = np.where(np.arange(len(ranks)) == module, reduction.ranks, ranks)
            if applier.fits(more):
                ranks = more
        plan.update(limit=limit)
        if np.array_equal(ranks, applier.ranks):
            plan.checkpoint_fewest()
            if whole:
                plan.measure_next()
                plan.journal.note(f"step {step}: memory is free again. {plan.checkpointing or 'The plan is kept'}.")
            return
        ends = {target: target.rank for target in applier.targets}
        applier.set_plan(ranks, step, plan.run.optimizer, decides=False)
        cuts = plan.now.cuts
        back = [cut for cut in cuts if cut.target.rank > ends[cut.target]]
        plan.update(cuts=() if whole else tuple(cut for cut in cuts if cut not in back))
        for cut in reversed(back):  # later ones were larger
            ends[cut.target] = cut.put_back(ends[cut.target])
        taken_back = Plan(ranks, applier.ranks, plan_cost(observation.problem.cost, applier.ranks))
        what = f"restored{'' if whole else ' in part'}{', with the cut directions' if back else ''}"
        plan.changed(PlanChange.correction(step, f"{what}: memory is free again", ranks, observation, taken_back))
