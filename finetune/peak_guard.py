"""Keeps a run within its budget: measures real steps, looks at every batch, and shrinks the plan if needed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..agents.controller import RankController
from ..common.arrays import IntArray
from ..common.checks import counted, finite
from ..common.text import cost_text, format_bytes
from ..cost.budget import Budget, free_bytes
from ..cost.calibration import highest_ranks, measure_memory
from ..cost.cost import ByteCost, moment_costs, plan_cost
from ..cost.model import MemoryModel
from ..cost.model_states import excess_of_state, state_bytes, trained_outside
from ..cost.peak_meter import PeakMeter, StepBatches, likely_cause
from ..cost.recording import Batch, BatchShape, reshaped
from ..cost.savers import is_compiled
from ..data.batches import unknown_lengths
from ..errors import BudgetError, UnsupportedError
from ..lora.adapters import signal_buffer_bytes
from ..plan.plan import Plan, check_budget, least_cost
from .journal import Correction, Journal
from .left_as_found import (
    GOOD_STEPS,
    MOST_TRIES,
    STEP_SHARE,
    Cut,
    Kept,
    Recomputation,
    Taken,
    adapter_bytes,
    saved_by_a_try,
    settings_put_back,
)
from .run import Participant, TrainingRun

logger = logging.getLogger(__name__)

ROOM = 1.02
"""A plan comes back where the limit is so many times what it takes, or as high as it was; a part of it as well."""

_OF_A_STEP = ("shape", "_unchecked", "_underestimate", "_before", "_memory", "_taken", "_cuts")
"""Attributes of a guard that change when a step makes the plan smaller, and are put back with it."""


class PeakGuard(Participant):
    """Watches one run. Under a budget of bytes it also corrects the plan.

    A step is measured after each change of ranks, and every `every_steps` steps. A peak above the budget corrects the
    prediction by the error. Then the last change is rolled back, as far as the plan before it fits the corrected
    prediction; if there is no plan before it, the plan shrinks. The cost of a batch that is larger than all batches
    before it is predicted before the model sees it. Where gradient checkpointing may be used, more layers are
    checkpointed before the plan changes. A plan without any adapter is never the result: where nothing else fits, the
    run stops with `BudgetError`.

    After an out-of-memory error the plan shrinks as `out_of_memory` says. It comes back when there is memory again; if
    smaller plans are no help, all is as it was before the step.

    What a limit that falls during the run cuts from ranks is kept in main memory, where that is not what the budget
    counts, and put back beside what the modules have learned since: that gives the function what it had lost, so far as
    ranks have room. A decision drops the copy, and a checkpoint has none: then ranks come back with directions that
    start at zero, as after an error.

    Args:
        every_steps: see `PeakMeter`.

    Attributes:
        meter: measures the steps.
        shape: the largest number of rows and the largest length of a batch so far.
        evaluation_share: the peak of the latest evaluation as a share of the budget; 0 before the first.
        checks: (step, predicted bytes, measured bytes) of the first measured step after each change of ranks.
        follows: whether the limit has moved since the run began, see `follow`.
    """

    def __init__(self, every_steps: int) -> None:
        self.meter: PeakMeter = PeakMeter(every_steps)
        self.shape: BatchShape = BatchShape(0, 0)
        self.checks: list[tuple[int, float, int]] = []
        self.evaluation_share: float = 0.0
        self._step_shape, self._batches = BatchShape(0, 0), StepBatches(0)
        self._unchecked = True
        self._underestimate = 0.0
        self._before: IntArray | None = None
        self._step = 0
        self._recomputation: Recomputation | None = None
        self._taken: Taken | None = None
        self._cuts: tuple[Cut, ...] = ()
        self._wait = GOOD_STEPS
        self.follows: bool = False
        self._undo: Callable[[], None] | None = None
        self._tried: list[str] = []
        self._keeps_gradients: bool | None = None  # through the forward pass; None until it was looked

    def attach(
        self,
        run: TrainingRun,
        controller: RankController[Any],
        memory: MemoryModel | None,
        journal: Journal,
        corrected: Callable[[Correction], None],
        recomputation: Recomputation | None = None,
    ) -> None:
        """Begin to watch.

        Args:
            run: the run; its optimizer's state is mapped to new ranks.
            controller: changes the ranks.
            memory: predicts the cost of other batch shapes; if it is None, it is made when it is needed.
            journal: forgets corrections that are put back.
            corrected: called with each correction.
            recomputation: chooses the layers to checkpoint; `memory` is of the step in which all are.
        """
        self._run, self.controller, self._memory, self._corrected = run, controller, memory, corrected
        self._journal, self._recomputation, self.meter.highest = journal, recomputation, run.replicas.highest
        if memory:
            if not self.shape.rows:  # else of a run that goes on: a larger batch is met before its step
                self.shape = memory.shape
            if recomputation:
                recomputation.memory, self._memory = memory, memory.recomputing(recomputation.layers)
                if controller.time:
                    controller.time.layers = self.layers_of

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the layers that were chosen for gradient checkpointing."""
        return self._recomputation.layers if self._recomputation else ()

    @property
    def chooses_layers(self) -> bool:
        """Whether plans decide which layers are checkpointed."""
        return self._recomputation is not None

    def end(self) -> None:
        """Stop measuring, and set the model's layers as they were."""
        self.meter.close()
        if self._recomputation:
            self._recomputation.put_back()

    def remark(self) -> str:
        """How many layers are checkpointed and the time of a step, for people; nothing where neither is limited."""
        time, ranks = self.controller.time, self.controller.ranks
        parts = [str(self._recomputation or ""), time.text(ranks) if time else ""]
        return ", ".join(filter(None, parts))

    def deciding(self, *, recomputing: bool = True) -> None:
        """Price plans for a decision, where layers may be checkpointed; see `recomputed_cost`.

        Args:
            recomputing: whether they may in this decision.
        """
        if self._recomputation and self._recomputation.memory:
            controller, targets = self.controller, self.controller.targets
            least = partial(least_cost, targets, controller.low, controller.high) if recomputing else None
            room = controller.limit - self._underestimate
            unpaid = signal_buffer_bytes(targets) * (not controller.will_measure)
            cost = self._recomputation.cost(highest_ranks(targets), room, self.shape, controller.ranks, least, unpaid)
            controller.reprice(replace(cost, constant=cost.constant + self._underestimate))

    @property
    def _limits_bytes(self) -> bool:
        return isinstance(self.controller.cost, ByteCost)

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Look at the batches of the step that begins, and measure it if it is due."""
        self._step = step
        self._step_shape = self._run.replicas.largest_shape(batches)
        if self._unchecked:
            self._batches = StepBatches.of(batches)
        if self._keeps_gradients is None and self._limits_bytes and self._gradients_stay():
            self._watch_gradients()
        if self._recomputation:
            self._recomputation.before_step()
        larger = self.shape.joined(self._step_shape)
        if larger != self.shape:
            if self._limits_bytes:
                self._keep()
            self.shape = larger
            if self._limits_bytes:
                self._larger_batch(batches, larger)
        controller = self.controller
        if self.meter.due(step):
            held, signals = self._run.replicas.begin_measuring(), controller.adapters.meter
            # Signal buffers are made in the first step of an interval, and stay.
            self.meter.begin(self._run.model, self._run.optimizer, held, lambda: signals.buffer_bytes)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let what runs inside be no part of a step, such as answers to prompts: no layer is checkpointed there."""
        with settings_put_back(self._run.model), self.meter.aside():
            if self._recomputation:
                self._recomputation.pause()
            yield

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Note that the forward and backward passes of a step are done: they did not run out of memory."""
        self.meter.passed()
        self._undo = None
        self._tried.clear()

    def after_step(self, step: int) -> None:
        """Compare the peak of the step with its prediction and with the budget, if it was measured.

        What an out-of-memory error has taken from the plan comes back here, once there is memory again.

        Raises:
            BudgetError: the peak is above the budget, and no plan with an adapter fits the corrected prediction.
        """
        self._step = step
        if self._keeps_gradients and not self._run.step.accumulates:
            self.meter.end(step)
            self._count_gradients()
        self._check_peak(step)
        taken = self._taken
        if taken and self._wait <= step - taken.step and step < self.controller.total_steps and self._has_room(taken):
            self._give_back(taken, taken.limit)

    def _check_peak(self, step: int) -> None:
        peak = self.meter.end(step)
        if peak is None or not self._limits_bytes:
            return
        controller = self.controller
        ranks = controller.ranks
        cause = self._check(step, peak, ranks) if self._unchecked else ""
        if peak <= controller.limit:
            if cause:
                self._warn("The peak of step %d was %s, %s", step, format_bytes(peak, up=True), cause)
            return
        error = max(peak - plan_cost(controller.cost_now(), ranks), 0.0)
        self._underestimate += error
        assert isinstance(controller.cost, ByteCost)
        controller.reprice(replace(controller.cost, constant=controller.cost.constant + error))
        before = ranks if self._before is None else self._before
        back = not np.array_equal(before, ranks)
        text = (
            f"The peak of step {step} was {format_bytes(peak, up=True)}, above the budget of "
            f"{format_bytes(controller.limit)}"
        )
        text = f"{text}, {cause}" if cause else f"{text}."
        if step == controller.total_steps:
            self._warn("%s It was the last step: the plan stays.", text)
            return
        if self._relieved(text):
            return
        self._check_possible(f"{text} With the prediction corrected by that, no adapter fits.")
        self._warn("%s The plan is %s.", text, "rolled back" if back else "shrunk by the difference")
        self._correct("rolled back: peak above the budget" if back else "shrunk: peak above the budget", before)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure an evaluation; `evaluation_share` tells afterwards how much of the budget it took."""
        if self._limits_bytes:
            self.meter.begin(self._run.model, self._run.optimizer, self._run.replicas.begin_measuring())
        try:
            yield
        except BaseException:
            self.meter.close()
            raise
        peak = self.meter.end_other()
        if peak is not None:
            self.evaluation_share = peak / self.controller.limit

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
        controller, run, number = self.controller, self._run, self._step + 1
        self.meter.close()
        traceback.clear_frames(error.__traceback__)
        for parameter in [*run.model.parameters(), *trained_outside(run.model, run.optimizer)]:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        less = (1 - STEP_SHARE) * plan_cost(controller.cost_now(), controller.ranks)
        run.replicas.check_again(number, Budget(controller.cost.unit, less))
        self._keep()
        if len(self._tried) < MOST_TRIES and self._try_again(number):
            self.meter.request()
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

    def _try_again(self, number: int) -> bool:
        """Prepare the step of this number, from 1, to be taken again; whether that may be a help."""
        controller, taken = self.controller, self._taken
        if taken and not self._tried:
            self._warn("Step %d ran out of memory, and is taken again: this plan has passed steps before.", number)
            self._tried.append("the plan of the steps before")
            self._taken = replace(taken, step=self._step)
            return True
        taken = taken or self._nothing_taken()
        limit = taken.smaller_limit(plan_cost(controller.cost_now(), controller.ranks))
        if limit is None:
            return False
        controller.limit = limit
        share = f"{100 * controller.limit / taken.cost:.0f} %"
        self._tried.append(f"a plan of {share} of its cost")
        self._taken = replace(taken, times=taken.times + 1, step=self._step)
        if self._relieved(f"Step {number} ran out of memory, and is taken again."):
            return True
        self._warn(
            "Step %d ran out of memory. The plan shrinks to %s of its cost, and the step is taken again.", number, share
        )
        try:
            self._correct("shrunk: out of memory", controller.ranks)
        except BudgetError:  # adapters that hold NaN cannot shrink
            return False
        return controller.fits()

    def _nothing_taken(self) -> Taken:
        """The plan as it is now, from which errors may take."""
        controller, ranks = self.controller, self.controller.ranks
        cost, whole = controller.cost_now(), None
        if isinstance(cost, ByteCost):
            costs = moment_costs(cost, ranks)
            whole = float(costs.max())
            reducible = float(cost.per_rank[costs.argmax()] @ ranks)
            if self._recomputation and self._recomputation.memory:
                every = self._cost_of_shape(self.shape, self._recomputation.memory)  # all checkpointed
                reducible += whole - plan_cost(controller.cost_now(every), ranks)
        else:
            reducible = plan_cost(cost, ranks)
            if self.meter.history:
                whole = reducible * self.meter.history[-1][1] / adapter_bytes(controller.targets, self._run.optimizer)
        return Taken(
            ranks=ranks,
            layers=self.recomputed,
            limit=controller.limit,
            cost=plan_cost(cost, ranks),
            saved=saved_by_a_try(whole, reducible),
            times=0,
            step=self._step,
        )

    def _has_room(self, taken: Taken) -> bool:
        """Whether the device has the memory for the plan of before an error; without CUDA good steps tell."""
        run, controller = self._run, self.controller
        if self.follows:  # it gives back before a step, by the limit of the moment
            return False
        if run.device.type != "cuda" or not self.meter.history:
            return True
        more = taken.cost - plan_cost(controller.cost_now(), controller.ranks)
        if not self._limits_bytes:
            more *= adapter_bytes(controller.targets, run.optimizer) / plan_cost(controller.cost, controller.ranks)
        return self.meter.history[-1][1] + more - state_bytes(run.model, run.optimizer) <= free_bytes(run.device)

    def _give_back(self, taken: Taken, limit: float, *, whole: bool = True) -> None:
        """Give the plan this limit, its layers, its ranks of before an error, and what was cut from them.

        Args:
            taken: the plan to go back to.
            limit: of the plan from now on.
            whole: whether there is room for all of it; else modules get their ranks back while there is room, and the
                others later.
        """
        controller, step = self.controller, self._step
        controller.limit = limit if whole else limit / ROOM
        if whole:
            self._taken, self._wait = None, (2 if taken.times else 1) * self._wait
        if self._recomputation:  # as many layers were checkpointed as these ranks need
            self._recomputation.take(taken.layers)
            self._memory = self._recomputation.memory_now()
            controller.reprice(self._cost_of_shape(self.shape))
        observation = controller.observation_now(step)
        ranks = controller.ranks
        for module in np.flatnonzero(taken.ranks > ranks):
            more = np.where(np.arange(len(ranks)) == module, taken.ranks, ranks)
            if controller.could_take(more):
                ranks = more
        controller.limit = limit
        if np.array_equal(ranks, controller.ranks):
            self._settle()
            if whole:
                self._measure_next()
                self._journal.note(f"step {step}: there is memory again. {self._recomputation or 'The plan stays'}.")
            return
        ends = {target: target.rank for target in controller.targets}
        controller.set_plan(ranks, step, self._run.optimizer, decides=False)
        back = [cut for cut in self._cuts if cut.target.rank > ends[cut.target]]
        self._cuts = () if whole else tuple(cut for cut in self._cuts if cut not in back)
        for cut in reversed(back):  # later ones were larger
            ends[cut.target] = cut.put_back(ends[cut.target])
        plan = Plan(ranks, controller.ranks, plan_cost(observation.problem.cost, controller.ranks))
        what = f"given back{'' if whole else ' in part'}{', with what was cut' if back else ''}"
        self._changed(Correction(step, f"{what}: there is memory again", ranks, observation, plan))

    def _keep(self) -> None:
        """Note all that a step may change before it has passed; the first call of a step counts."""
        if self._undo:
            return
        controller, recomputation, journal = self.controller, self._recomputation, self._journal
        adapters = Kept(self._run.model, controller.targets, self._run.optimizer)
        signals, decisions = controller.adapters.meter.state_dict(), len(journal.predictions)
        own, limit, cost = {name: vars(self)[name] for name in _OF_A_STEP}, controller.limit, controller.cost
        layers, memory = self.recomputed, recomputation.memory if recomputation else None

        def undo() -> None:
            adapters.put_back()
            controller.adapters.meter.load_state_dict(signals)
            controller.limit, controller.cost = limit, cost
            vars(self).update(own)
            if recomputation:
                recomputation.memory = memory
                recomputation.take(layers)
            journal.forget(decisions)

        self._undo = undo

    def put_back(self) -> None:
        """Put back what the present step has changed, since it does not pass."""
        undo, self._undo = self._undo, None
        self._tried.clear()
        if undo:
            undo()

    def follow(self, limit: float, step: int) -> None:
        """Take the limit of the moment, before a step.

        A plan that no longer fits shrinks, after more layers are checkpointed. What that took comes back after
        `GOOD_STEPS` steps at least: all of it where there is room for it, and else layers, then ranks, as far as the
        limit allows.

        Raises:
            BudgetError: no plan fits.
        """
        controller, taken, self._step, self.follows = self.controller, self._taken, step, True
        if plan_cost(controller.cost_now(), controller.ranks) > limit:
            self._keep()
            self._taken = replace(taken or self._nothing_taken(), step=step)
            controller.limit = limit
            reason = f"At step {step} there is room for {cost_text(limit, controller.cost.unit)}."
            if not self._relieved(reason):
                self._shrink(reason)
        elif taken is None or limit < controller.limit:
            controller.limit = limit
        elif step - taken.step >= self._wait and limit > controller.limit:
            if (1 + 1e-9) * limit >= min(ROOM * taken.cost, taken.limit):
                self._give_back(taken, limit)
            else:
                controller.limit, self._taken = limit, replace(taken, step=step)
                self._relieved("There is more memory.")
                if len(self.recomputed) <= len(taken.layers):
                    self._give_back(taken, limit, whole=False)

    @property
    def _keeps_cuts(self) -> bool:
        """Whether what a fall cuts from ranks waits in main memory; bytes of the budget's would cost more ranks."""
        return not self._limits_bytes or self._run.device.type == "cuda"

    def _shrink(self, reason: str) -> None:
        """Shrink the plan for a limit that moved; where no plan fits, all is as it was before the step."""
        try:
            self._check_possible(reason)
        except BudgetError:
            self.put_back()
            raise
        self._warn("%s The plan is shrunk.", reason)
        self._correct("shrunk: less memory", self.controller.ranks, keeps=self._keeps_cuts)

    def new_limit(self, limit: float, step: int) -> None:
        """Take another limit for a run that is resumed, and shrink the plan if it no longer fits.

        Raises:
            BudgetError: no plan fits.
        """
        controller = self.controller
        if limit != controller.limit:
            self._taken = None
        controller.limit, self._step = limit, step
        if self._relieved("The budget or the time was changed."):
            return
        if not controller.fits():
            self._check_possible("The budget or the time was changed.")
            self._correct("shrunk: another budget or time", controller.ranks)

    def decided(self, before: IntArray, step: int, *, by_hand: bool = False) -> None:
        """Note that a decision has changed the ranks; those that it changed do not come back with memory.

        Args:
            before: the ranks before it, int64 (modules,).
            step: the optimizer steps before it.
            by_hand: whether a person has given all ranks.
        """
        ranks = self.controller.ranks
        self._before = before if step > 0 else None  # the first plan follows no plan
        self._cuts = ()
        if self._taken:
            self._taken = replace(self._taken, ranks=np.where(by_hand | (ranks != before), ranks, self._taken.ranks))
        self._settle()
        if self._limits_bytes:
            self._measure_next()

    def state(self) -> dict[str, Any]:
        """What `begin` needs to go on, as tensors and JSON values."""
        before = {} if self._before is None else {"before": torch.from_numpy(self._before.copy())}
        own = {
            "rows": self.shape.rows,
            "length": self.shape.length,
            "underestimate": self._underestimate,
            "peaks": list(self.meter.history),
            "measure_next": self.meter.requested,
            "checks": list(self.checks),
            "wait": self._wait,
            **({"taken": self._taken.state()} if self._taken else {}),
            **before,
        }
        return {"guard": own, "recomputed": list(self.recomputed)}

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Go on in a run that is resumed; call this before `attach`."""
        if state is None:
            return
        state = state["guard"]
        self.shape = BatchShape(counted(state["rows"]), counted(state["length"]))
        self._underestimate = finite(state["underestimate"])
        self.meter.history = [(counted(step), counted(peak)) for step, peak in state["peaks"]]
        self.meter.requested = self._unchecked = bool(state.get("measure_next", True))
        self.checks = [(counted(step), finite(cost), counted(peak)) for step, cost, peak in state["checks"]]
        self._before = state["before"].numpy().copy() if "before" in state else None
        self._wait = counted(state.get("wait", GOOD_STEPS), 1)
        self._taken = Taken.from_state(state["taken"]) if "taken" in state else None

    def _warn(self, text: str, *values: object) -> None:
        if self._run.replicas.processes.first:  # all processes come to the same
            logger.warning(text, *values)

    def _measure_next(self) -> None:
        self.meter.request()
        self._unchecked = True

    def _check(self, step: int, peak: int, ranks: IntArray) -> str:
        """Hold the first measured step after a change of ranks against its prediction.

        Returns:
            The prediction and the likely cause if they differ by more than the margin, else nothing.
        """
        self._unchecked = False
        controller = self.controller
        cost = controller.cost
        if self._step_shape != self.shape:  # a smaller batch than the plan was made for
            try:
                cost = self._cost_of_shape(self._step_shape)
            except UnsupportedError:
                return ""
        predicted = plan_cost(controller.cost_now(cost), ranks)
        if not self._underestimate:  # which is beside the cost with the excess
            predicted -= excess_of_state(controller.targets, self._run.optimizer)
        self.checks.append((step, predicted, peak))
        return likely_cause(peak, predicted, self._batches, self._run.accumulation)

    def _cost_of_shape(self, shape: BatchShape, memory: MemoryModel | None = None) -> ByteCost:
        memory = memory or self._memory
        if memory is None:
            raise UnsupportedError("This run was resumed, and has no byte model.")
        cost = memory.cost(shape)
        return replace(cost, constant=cost.constant + self._underestimate)

    def _larger_batch(self, batches: Sequence[Batch], shape: BatchShape) -> None:
        """Predict the cost of the new shape, and shrink the plan if it no longer fits, before the model runs."""
        controller = self.controller
        self._measure_next()
        try:
            cost = self._cost_of_shape(shape)
        except UnsupportedError:  # the byte model predicts the shape of its calibration alone
            logger.debug("Calibrating again for %s.", shape)
            longest = max(batches, key=lambda batch: BatchShape.of(batch).length, default=None)
            self._measure_again(longest, shape)
            cost = self._cost_of_shape(shape)
        controller.reprice(cost)
        text = f"A batch of {shape} came, larger than the memory was planned for."
        self._fit(text, f"batch of {shape}", unknown_lengths(self._run.dataset))

    def _fit(self, text: str, cause: str, hint: str = "") -> None:
        """Make the plan fit the costs of now, which are higher for a cause, and tell it."""
        if self.controller.fits():
            self._warn("%s The plan still fits.", text)
        elif not self._relieved(text):
            self._check_possible(text + hint)
            self._warn("%s The plan is shrunk.", text)
            self._correct(f"shrunk: {cause}", self.controller.ranks)

    def _gradients_stay(self) -> bool:
        """Whether the adapters hold gradients now."""
        return any(p.grad is not None for target in self.controller.targets for p in target.parameters.values())

    def _watch_gradients(self) -> None:
        """See whether gradients of the last step are there in the next forward pass, or are cleared before it."""
        run, self._keeps_gradients = self._run, False
        if run.step.accumulates or is_compiled(run.wrapped):  # they are counted, or hooks would be compiled
            return

        def seen(*_: Any) -> None:
            handle.remove()
            self._keeps_gradients = self._gradients_stay()

        handle = run.wrapped.register_forward_pre_hook(seen)

    def _count_gradients(self) -> None:
        """Count gradients all the time from now on, since the loop keeps them."""
        run, recomputation = self._run, self._recomputation
        run.keep_gradients()
        if recomputation and recomputation.memory:
            recomputation.memory = replace(recomputation.memory, accumulates=True)
        if self._memory:
            self._memory = replace(self._memory, accumulates=True)
            self.controller.reprice(self._cost_of_shape(self.shape))
        else:
            self._measure_again(None, self.shape)
        text = "Gradients stay while the next step runs forward: optimizer.zero_grad() before that frees their bytes."
        self._fit(text, "gradients stay")

    def _measure_again(self, batch: Batch | None, shape: BatchShape) -> None:
        run, targets = self._run, self.controller.targets
        if self._recomputation:
            self._recomputation.all()

        def measure() -> MemoryModel:
            # The largest rows and the largest length so far may be of two batches, or of another process.
            largest = run.largest_batch() if batch is None else run.on_device(batch)
            whole = reshaped(largest, shape, run.step.rows_per_example)
            return measure_memory(run.step, targets, whole, signals=True)

        self._memory = run.measured(measure)
        run.replicas.changed(targets, self._step)
        if self._recomputation:
            self._recomputation.memory = self._memory
            self._settle()

    def _settle(self) -> bool:
        """Checkpoint the fewest layers with which the plan fits; whether it does now."""
        controller = self.controller
        if self._recomputation:
            self._recomputation.take(self.layers_of(controller.ranks))
            self._memory = self._recomputation.memory_now()
            controller.reprice(self._cost_of_shape(self.shape))
        return controller.fits()

    def layers_of(self, ranks: IntArray) -> tuple[str, ...]:
        """Names of the layers that a plan of these ranks, int64 (modules,), needs to checkpoint."""
        if self._recomputation is None:
            return ()
        controller = self.controller
        # Where no signals are measured they take nothing, and the byte model counts them still.
        buffers = 0.0 if controller.measures else signal_buffer_bytes(controller.targets) @ ranks
        room = controller.limit - self._underestimate + float(buffers)
        return self._recomputation.fewest(ranks, room, self.shape)

    def _relieved(self, reason: str) -> bool:
        """Whether the plan fits, because other layers are checkpointed from now on."""
        before = self.recomputed
        if self._recomputation is None or not self._settle():
            return False
        if before != self.recomputed:
            self._measure_next()
            self._warn("%s Now %s, and the plan stays.", reason, self._recomputation)
        return True

    def _check_possible(self, context: str) -> None:
        """Raise BudgetError, with its context, if no plan with an adapter fits."""
        try:
            check_budget(self.controller.problem_now(), list(self.controller.names))
        except BudgetError as error:
            raise BudgetError(f"{context} {error}") from error

    def _correct(self, reason: str, wanted: IntArray, *, keeps: bool = False) -> None:
        """Bring the ranks within the limit, as near to the wanted ranks as it allows; `keeps` what that cuts away."""
        controller, step = self.controller, self._step
        observation = controller.observation_now(step)
        pairs = [Cut.of(target) for target in controller.targets if target.rank] if keeps else []
        plan = controller.correct(wanted, step, self._run.optimizer)
        self._cuts += tuple(pair.beyond(pair.target.rank) for pair in pairs if pair.target.rank < len(pair.rows))
        self._changed(Correction(step, reason, wanted, observation, plan))

    def _changed(self, correction: Correction) -> None:
        """Settle after a change of ranks, and have it recorded."""
        self._settle()
        self._before = None
        self._measure_next()
        self._corrected(correction)
