"""What a plan gives up while memory is short, after an out-of-memory error or when a limit falls, and gets back later.

A smaller plan is tried at most twice, and only where the prediction says that it takes noticeably fewer bytes. If the
step passes, the plan comes back later; if it does not, all is as it was before the step.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..common.text import cost_text
from ..cost.budget import Budget, free_bytes
from ..cost.cost import ByteCost, UntimedCost, moment_costs, plan_cost
from ..cost.model import MemoryModel
from ..cost.model_states import state_bytes, trained_outside
from ..errors import BudgetError
from ..plan.plan import Plan
from .journal import PlanChange
from .plan_keeper import PlanKeeper, PlanReduction, PlanState
from .put_back import AdapterSnapshot, adapter_bytes

ROOM = 1.02
"""A plan comes back where the limit is so many times what it takes, or as high as it was; a part of it as well."""

MOST_TRIES = 2
"""A step that ran out of memory is taken again so many times at most."""

STEP_SHARE = 0.1
"""The share of the whole step's bytes by which each try is smaller than the one before."""

PLAN_SHARE = 0.25
"""The share of what adapters, and layers that can be checkpointed, take by which each try is smaller at most. So
two tries leave half of the rank."""

LEAST_SHARE = 0.01
"""The share of the whole step's bytes below which a smaller plan is no help."""

ROUNDING = 16
"""Bytes by which rounding may raise the price of a plan when fewer layers are checkpointed for its smaller ranks."""


def nothing_taken(plan: PlanKeeper) -> PlanReduction:
    """Nothing yet: the plan that is in place is the one that comes back."""
    applier, ranks, checkpointing = plan.applier, plan.applier.ranks, plan.checkpointing
    cost, whole = applier.cost_now(), None
    if isinstance(cost, ByteCost):
        costs = moment_costs(cost, ranks)
        whole = float(costs.max())
        reducible = float(cost.per_rank[costs.argmax()] @ ranks)
        if checkpointing and checkpointing.memory:
            every = plan.cost_of_shape(plan.now.shape, checkpointing.memory)  # all checkpointed
            reducible += whole - plan_cost(applier.cost_now(every), ranks)
    else:
        reducible = plan_cost(cost, ranks)
        if plan.meter.history:
            whole = reducible * plan.meter.history[-1][1] / adapter_bytes(applier.targets, plan.run.optimizer)
    return PlanReduction(
        ranks=ranks,
        layers=plan.checkpointed,
        limit=applier.limit,
        cost=plan_cost(cost, ranks),
        saved=saved_by_a_try(whole, reducible),
        times=0,
        step=plan.step,
    )


def smaller_limit(reduction: PlanReduction, cost: float) -> float | None:
    """What the next smaller plan may cost; None where there is none, or it would be no help.

    Args:
        reduction: what was taken so far.
        cost: of the plan as it is, in the unit of the limit.
    """
    if not reduction.saved or reduction.times == MOST_TRIES:
        return None
    return min(cost, reduction.cost - reduction.times * reduction.saved) - reduction.saved


def saved_by_a_try(whole: float | None, reducible: float) -> float:
    """What each smaller plan should take less than the one before; 0 where none would be a noticeable help.

    Args:
        whole: what the step takes in all, in the unit of costs; None where it is not known.
        reducible: what adapters, and layers that can be checkpointed, take of it.
    """
    if whole is None:
        return PLAN_SHARE * reducible
    saved = min(STEP_SHARE * whole, PLAN_SHARE * reducible)
    return saved if saved >= LEAST_SHARE * whole else 0.0


@dataclass(frozen=True, eq=False)
class BeforeStep:
    """All that a step may change before it has passed, as it was before.

    Attributes:
        adapters: the adapters, PEFT's configuration and the optimizer's state.
        signals: of the adapters.
        decisions: how many decisions and corrections the journal held.
        plan: how the plan was kept.
        limit: of plans, in the unit of `cost`.
        cost: what plans cost.
        layers: the checkpointed layers.
        memory: the byte model of the step in which all layers are checkpointed; None where it is not known.
    """

    adapters: AdapterSnapshot
    signals: dict[str, Any]
    decisions: int
    plan: PlanState
    limit: float
    cost: UntimedCost
    layers: tuple[str, ...]
    memory: MemoryModel | None


class Shortage:
    """Takes from the plan while memory is short, gives it back later, and puts back a step that does not pass.

    What a limit that falls during the run cuts from ranks is kept in main memory, unless the budget counts bytes of
    main memory, and put back beside what the modules have learned since: that gives the function what it had lost, so
    far as ranks have room. A decision drops the copy, and a checkpoint has none: then ranks come back with directions
    that start at zero, as after an out-of-memory error.

    Args:
        plan: keeps the plan of the run.

    Attributes:
        follows: whether the limit has moved since the run began. Then what was taken comes back before a step, by the
            limit of the moment.
    """

    def __init__(self, plan: PlanKeeper) -> None:
        self._plan, self.follows = plan, False
        self._before: BeforeStep | None = None
        self._tried: list[str] = []

    def keep(self) -> None:
        """Note all that the present step may change before it has passed; the first call of a step counts."""
        if self._before:
            return
        plan, applier, checkpointing = self._plan, self._plan.applier, self._plan.checkpointing
        self._before = BeforeStep(
            adapters=AdapterSnapshot(plan.run.model, applier.targets, plan.run.optimizer),
            signals=applier.adapters.meter.state_dict(),
            decisions=len(plan.journal.predictions),
            plan=plan.now,
            limit=applier.limit,
            cost=applier.cost,
            layers=plan.checkpointed,
            memory=checkpointing.memory if checkpointing else None,
        )

    def put_back(self) -> None:
        """Put back what the present step has changed, since it does not pass."""
        before, self._before = self._before, None
        self._tried.clear()
        if before is None:
            return
        plan, applier, checkpointing = self._plan, self._plan.applier, self._plan.checkpointing
        before.adapters.put_back()
        applier.adapters.meter.load_state_dict(before.signals)
        applier.limit, applier.cost, plan.now = before.limit, before.cost, before.plan
        if checkpointing:
            checkpointing.memory = before.memory
            checkpointing.take(before.layers)
        plan.journal.forget(before.decisions)

    def passed(self) -> None:
        """Forget how things were, since the step has passed."""
        self._before = None
        self._tried.clear()

    def out_of_memory(self, error: torch.OutOfMemoryError) -> None:
        """Shrink the plan after a step that ran out of memory, so that the step can be taken again.

        That is done at most `MOST_TRIES` times a step, and only where it is predicted to be a noticeable help. An error
        under a plan that has shrunk before and has passed steps since is taken for a passing one: the plan stays once.

        Args:
            error: of the step. The tensors that its traceback holds are freed.

        Raises:
            torch.OutOfMemoryError: this error. Smaller plans are no help, and all is as it was before the step.
            BudgetError: other processes are in the middle of the step.
        """
        plan = self._plan
        number = plan.step + 1
        self.drop_step(error)
        self.keep()
        if len(self._tried) < MOST_TRIES and self._try_again(number):
            return
        tried = "No smaller plan of rankpilot would take noticeably less"
        if self._tried:
            tried = f"rankpilot has taken the step again under {' and '.join(self._tried)}, without success"
        self.put_back()
        error.add_note(
            f"{tried}. Ranks, adapters and optimizer are as they were before step {number}. Lower the batch size or "
            "the length, or turn on gradient_checkpointing=True."
        )
        raise error

    def drop_step(self, error: torch.OutOfMemoryError) -> None:
        """Free what a step that ran out of memory holds, so that it can be taken again from its first batch.

        Args:
            error: of the step.

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
        """Prepare the step of this number, from 1, to be taken again; whether that may be a help."""
        plan, applier, reduction = self._plan, self._plan.applier, self._plan.now.reduction
        if reduction and not self._tried:
            plan.warn("Step %d ran out of memory, and is taken again: this plan has passed steps before.", number)
            self._tried.append("the plan of the steps before")
            plan.now = replace(plan.now, reduction=replace(reduction, step=plan.step))
            return True
        reduction = reduction or nothing_taken(plan)
        limit = smaller_limit(reduction, plan_cost(applier.cost_now(), applier.ranks))
        if limit is None:
            return False
        applier.limit = limit
        share = f"{100 * limit / reduction.cost:.0f} %"
        self._tried.append(f"a plan of {share} of its cost")
        plan.now = replace(plan.now, reduction=replace(reduction, times=reduction.times + 1, step=plan.step))
        if plan.relieved(f"Step {number} ran out of memory, and is taken again."):
            return True
        plan.warn(
            "Step %d ran out of memory. The plan shrinks to %s of its cost, and the step is taken again.", number, share
        )
        try:
            plan.correct("shrunk: out of memory", applier.ranks)
        except BudgetError:  # adapters that hold NaN cannot shrink
            return False
        cost = plan_cost(applier.cost_now(), applier.ranks)
        if limit < cost <= limit + ROUNDING:
            applier.limit = cost
        return applier.fits()

    def follow(self, limit: float, step: int) -> None:
        """Take the limit of the moment, before a step.

        A plan that no longer fits shrinks, after more layers are checkpointed. What that took comes back after
        `GOOD_STEPS` steps at least: all of it where there is room for it, and else layers, then ranks, as far as the
        limit allows.

        Raises:
            BudgetError: no plan fits.
        """
        plan, applier, reduction = self._plan, self._plan.applier, self._plan.now.reduction
        plan.step, self.follows = step, True
        if plan_cost(applier.cost_now(), applier.ranks) > limit:
            self.keep()
            plan.now = replace(plan.now, reduction=replace(reduction or nothing_taken(plan), step=plan.step))
            applier.limit = limit
            reason = f"At step {plan.step} there is room for {cost_text(limit, applier.cost.unit)}."
            if not plan.relieved(reason):
                self._shrink(reason)
        elif reduction is None or limit < applier.limit:
            applier.limit = limit
        elif plan.step - reduction.step >= plan.now.wait and limit > applier.limit:
            if (1 + 1e-9) * limit >= min(ROOM * reduction.cost, reduction.limit):
                self._give_back(reduction, limit)
            else:
                applier.limit, plan.now = limit, replace(plan.now, reduction=replace(reduction, step=plan.step))
                plan.relieved("There is more memory.")
                if len(plan.checkpointed) <= len(reduction.layers):
                    self._give_back(reduction, limit, whole=False)

    def _shrink(self, reason: str) -> None:
        """Shrink the plan for a limit that moved; where no plan fits, all is as it was before the step."""
        try:
            self._plan.check_possible(reason)
        except BudgetError:
            self.put_back()
            raise
        self._plan.warn("%s The plan is shrunk.", reason)
        self._plan.correct("shrunk: less memory", self._plan.applier.ranks, keeps=self._keeps_cuts)

    @property
    def _keeps_cuts(self) -> bool:
        """Whether what a fall cuts from ranks waits in main memory; bytes of the budget's would cost more ranks."""
        return not self._plan.limits_bytes or self._plan.run.device.type == "cuda"

    def give_back_if_room(self) -> None:
        """Give back what an out-of-memory error has taken, once enough steps have passed and there is memory again."""
        plan, run, applier = self._plan, self._plan.run, self._plan.applier
        reduction, history = plan.now.reduction, plan.meter.history
        if self.follows or reduction is None or plan.step >= applier.total_steps:
            return
        if plan.step - reduction.step < plan.now.wait:
            return
        if run.device.type == "cuda" and history:  # without CUDA good steps tell
            more = reduction.cost - plan_cost(applier.cost_now(), applier.ranks)
            if not plan.limits_bytes:
                more *= adapter_bytes(applier.targets, run.optimizer) / plan_cost(applier.cost, applier.ranks)
            if history[-1][1] + more - state_bytes(run.model, run.optimizer) > free_bytes(run.device):
                return
        self._give_back(reduction, reduction.limit)

    def _give_back(self, reduction: PlanReduction, limit: float, *, whole: bool = True) -> None:
        """Give the plan this limit, its layers, its ranks of before an error, and what was cut from them.

        Args:
            reduction: the plan to go back to.
            limit: of the plan from now on.
            whole: whether there is room for all of it; else modules get their ranks back while there is room, and the
                others later.
        """
        plan, applier, step = self._plan, self._plan.applier, self._plan.step
        applier.limit = limit if whole else limit / ROOM
        if whole:
            plan.now = replace(plan.now, reduction=None, wait=(2 if reduction.times else 1) * plan.now.wait)
        plan.checkpoint(reduction.layers)  # as many as these ranks need
        observation = applier.observation_now(step)
        ranks = applier.ranks
        for module in np.flatnonzero(reduction.ranks > ranks):
            more = np.where(np.arange(len(ranks)) == module, reduction.ranks, ranks)
            if applier.fits(more):
                ranks = more
        applier.limit = limit
        if np.array_equal(ranks, applier.ranks):
            plan.checkpoint_fewest()
            if whole:
                plan.measure_next()
                plan.journal.note(f"step {step}: there is memory again. {plan.checkpointing or 'The plan stays'}.")
            return
        ends = {target: target.rank for target in applier.targets}
        applier.set_plan(ranks, step, plan.run.optimizer, decides=False)
        cuts = plan.now.cuts
        back = [cut for cut in cuts if cut.target.rank > ends[cut.target]]
        plan.now = replace(plan.now, cuts=() if whole else tuple(cut for cut in cuts if cut not in back))
        for cut in reversed(back):  # later ones were larger
            ends[cut.target] = cut.put_back(ends[cut.target])
        taken_back = Plan(ranks, applier.ranks, plan_cost(observation.problem.cost, applier.ranks))
        what = f"given back{'' if whole else ' in part'}{', with what was cut' if back else ''}"
        plan.changed(PlanChange.correction(step, f"{what}: there is memory again", ranks, observation, taken_back))
