"""One run under a pilot: its participants, their events, and the decisions on its ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import Lock, Thread, current_thread
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..common.checks import counted, finite
from ..common.devices import without_autocast
from ..common.errors import ConfigError, UnsupportedError
from ..common.text import plural
from ..cost.batch_shape import Batch
from ..cost.record.calibration import PlanCosts
from ..decide.applier import PlanApplier
from ..decide.groups import what_stays
from ..decide.observation import Observation
from ..decide.plan.plan import check_budget, least_cost, outcome_text
from ..decide.plan.problem import AllocationProblem, floor_of_experts, rank_bounds
from ..decide.plan.rate import InitialLoss
from ..decide.policy import Decision, Policy, asked, reads_signals, rounding
from ..decide.rules import AsConfigured, PlanFile, given_ranks
from ..decide.settings import DecisionSchedule
from ..lora.adapters import PeftAdapters
from ..lora.optimizer_state import layout_of, unwrap_optimizer
from ..lora.peft_config import absent_targets, finish_load, ranks_as_passed, start_kept
from ..lora.resize import is_trained
from ..lora.targets import TargetModule, check_trains, tied_pairs, unwrap
from . import before_training
from .checkpoint import as_saved
from .elastic import ElasticBudget
from .options import PilotOptions
from .plan_rate import initial_loss
from .probing import Progress, first_signals
from .run_rate import RunRate
from .run_savers import RunSavers
from .run_settings import adapter_settings, check_same, predictions_of, readable_state, run_settings
from .step.journal import Journal, PlanChange
from .step.peak_guard import PeakGuard
from .step.put_back import AdapterSnapshot, adapters_put_back
from .step.run import FirstRows, Participant, TrainingRun
from .watches import FiniteWatch, GradientWatch, LossMeter

T = TypeVar("T")

_UNDER_WAY: WeakKeyDictionary[PilotedRun, Thread] = WeakKeyDictionary()
"""Active runs, and the threads that started them."""

_RUNS = Lock()
"""Held while active runs are inspected or changed."""


class PilotedRun:
    """One run under a pilot, from start to end.

    Args:
        run: the run.
        targets: the target modules of its model.
        journal: records the decisions.
        policy: decides the ranks.
        schedule: optimizer steps before which the policy decides.
        options: the pilot's options.

    Attributes:
        applier: observes the adapters and changes their ranks; it exists once `begun` is True.
        begun: True once plans have costs and a limit.
        decision: the policy's latest decision; None before the first.
        step: the number of optimizer steps done.
        shown: the number of measured peaks already in `RankPilot.figures`.
        elastic: tracks the current limit on the cost of a plan.
        guard: measures steps, and keeps their peak within the budget.
        finite: detects losses, gradients and weights that are NaN or infinite.
        rate: the learning rate.

    Raises:
        UnsupportedError: a run is active in another thread.
    """

    applier: PlanApplier[PeftAdapters]

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        journal: Journal,
        policy: Policy,
        schedule: DecisionSchedule,
        options: PilotOptions,
    ) -> None:
        self.run, self.journal, self.options = run, journal, options
        self._targets, self._policy, self._schedule = targets, policy, schedule
        self._stays = isinstance(policy, AsConfigured)  # as long as its ranks fit
        self.begun, self.step, self.shown = False, 0, 0
        self.decision: Decision | None = None
        self.guard = PeakGuard(options.measure_every, journal.note, fewest=options.goal == "bytes")
        self.elastic = ElasticBudget(run, options.budget, self.guard)
        self.finite = FiniteWatch(run, journal)
        self.rate: RunRate = RunRate(run, targets, policy, schedule, options)
        self._losses = LossMeter(run.replicas.processes)
        self._gradients = GradientWatch(targets, self.guard.meter, may_be_zero=run.generates)
        self._savers = RunSavers(run, options, journal)
        self._found: AdapterSnapshot | None = None  # until a step has passed
        self._heard = b""
        with _RUNS:
            if any(thread is not current_thread() and thread.is_alive() for thread in _UNDER_WAY.values()):
                raise UnsupportedError(
                    "Another thread of this process is training under rankpilot, and their memory cannot be told "
                    "apart. Run them one after the other, or in separate processes. An aborted loop must call "
                    "`pilot.finish()`."
                )
            _UNDER_WAY[self] = current_thread()

    @property
    def participants(self) -> list[Participant]:
        """The participants, in the order of their events; `end` runs in reverse.

        The elastic budget may change ranks, so it precedes the copy of them made by control, which in turn precedes the
        guard: the guard measures the step in its final form. A loss counts only once its gradients are known to train
        something. Non-finite values are undone after the peak is compared.
        """
        before = self.elastic, self.rate.of_plan, self.rate.control, self.guard.parts
        every = *before, self.guard, self._gradients, self._losses, self.finite, self.rate.race
        return [part for part in every if part is not None]

    # The begin and the end --------------------------------------------------------------------------------------------

    def begin(self, seed: int, *, name: str, progress: Progress[Any] | None) -> None:
        """Measure, probe, and apply the first plan.

        Args:
            seed: seed of the probe, and of fresh rows.
            name: the run's name in the decision log.
            progress: shows the progress of the probe.
        """
        run, targets, options, journal = self.run, self._targets, self.options, self.journal
        stay, budget = self._stays, self.elastic.budget
        passed = ranks_as_passed(run.model, targets)
        if budget.kind == "parameters":
            before_training.warn_of_other_adapters(run, targets)
        journal.open(name, [], writes=run.replicas.processes.first)
        for part in self.participants:  # participants created later begin when created
            part.begin(None)
        kept = nullcontext() if stay else start_kept(run.model, targets, options.fresh, journal.note)
        with adapters_put_back(run.model, targets, run.optimizer, after_errors=True) as found, kept:
            self._savers.begin(counts_bytes=budget.kind != "parameters")
            probes, controls = reads_signals(self._policy), self.rate.controls
            looks = not run.generates and (self.rate.auto or not (probes or (stay and not controls)))
            journal.note("" if run.generates else before_training.LOOKING)
            first_rows = run.read_first_rows(seed) if looks else before_training.UNSEEN if not probes else None
            self.rate.begin(initial_loss(run, first_rows) if first_rows and looks else None)
            plans = 1 + sum(at > 0 for at in self._schedule.steps(run.total_steps))
            before_training.try_parts(run, targets, self.guard.parts, options, budget, seed, plans)
            costs = self._prepare(seed, None if probes else first_rows, progress)
            journal.note(self._savers.streaming.told())
            journal.note(before_training.budget_text(run, budget, costs.limit))
            journal.note_saved(costs.saved)
            if tied := tied_pairs(unwrap(run.model), targets):
                journal.note(f"{' and '.join(tied)} share one adapter, whose rank is fixed (ensure_weight_tying).")
            if names := absent_targets(run.model):
                run.warn("target_modules names %s, but the model has no such module.", ", ".join(names))
            if layout_of(run.optimizer) is None:
                name = type(unwrap_optimizer(run.optimizer)).__name__
                journal.note(f"The optimizer {name} has unknown state, which is reset wherever a rank changes.")
            self.elastic.first_limit(costs.limit)
            self.guard.attach(run, self.applier, costs.memory, journal, self._record, self._savers.checkpointing)
            self.decide()
            if stay:
                told = outcome_text(passed, self.applier.ranks)
                (journal.note if np.array_equal(passed, self.applier.ranks) else run.warn)(told)
            assert self.rate.of_plan is not None
            journal.note(self.rate.of_plan.told())
        try:
            self._begin_rate(None, seed)
        except BaseException:
            found.put_back()
            raise
        self._found = found

    def _begin_rate(self, state: Mapping[str, Any] | None, seed: int) -> None:
        """Start racing or correcting the learning rate, if requested; see `RunRate`."""
        control = self.rate.begin_control(state, self.journal)
        room = partial(before_training.room_in_main_memory, self.run, self.applier, self.elastic.budget)
        race = self.rate.begin_race(state, room, seed, self.journal)
        self.finite.control = race or control

    def _prepare(
        self,
        seed: int,
        first_rows: FirstRows | None,
        progress: Progress[Any] | None,
    ) -> PlanCosts:
        """Measure the cost of plans and create the applier, after a probe if the policy reads signals.

        Trained adapters are restored afterwards. If none is trained, or with `fresh`, all are new, at rank 1.
        """
        run, targets, options, budget = self.run, self._targets, self.options, self.elastic.budget
        check_trains(targets)
        checkpointing = self._savers.checkpointing
        self.journal.note(before_training.RECORDING)
        low, high = rank_bounds(targets, options.bounds or {})
        keeps = self._stays or (not options.fresh and any(map(is_trained, targets)))
        reference, kept = before_training.ranks_to_compare(run, targets, stays=self._stays, keeps=keeps)
        before_training.clear_adapter_state(run, targets, keeps=keeps)
        costs_of_plans = partial(
            before_training.run_costs,
            run,
            targets,
            budget,
            signals=True,
            least=partial(least_cost, targets, low, high) if checkpointing else None,
            savers=self._savers.exact,
            reference=reference,
            kept=kept,
            whole=checkpointing is not None and checkpointing.whole,
            in_parts=self.guard.parts.on,
        )
        costs = self._savers.streaming.costs(costs_of_plans, budget, reference, checkpoints=checkpointing is not None)
        if self.guard.parts.on and costs.memory and not costs.alone:
            self.guard.parts.turn_off("this model's operations depend on its data, so parts cannot be predicted")
        limit = costs.limit.value
        problem = AllocationProblem.of(targets, costs.cost, limit, low=low, high=high)
        check_budget(problem, [target.name for target in targets], budget.share)  # now, and not after the probe
        low = floor_of_experts(targets, costs.cost, limit, low, high)
        result = first_signals(run, targets, self._schedule, seed, first_rows, keeps=keeps, progress=progress)
        self.applier = PlanApplier(
            PeftAdapters(run.model, targets),
            costs.cost,
            limit,
            self._schedule,
            run.total_steps,
            result,
            rows=run.rows * run.accumulation,
            low=low,
            high=high,
            seed=seed,
            time=before_training.step_time(run, targets).of_plans() if options.goal == "time" else None,
            reference=reference,
            keeps=self._stays,
            reads=first_rows is None,
        )
        self.begun = True
        return costs

    def resume(self, state: Mapping[str, Any], *, name: str) -> None:
        """Continue from `state`, with its adapters and optimizer.

        Args:
            state: the return value of `state`.
            name: the run's name in the decision log.
        """
        run, targets, journal = self.run, self._targets, self.journal
        settings = run_settings(self.options, self.elastic.budget, self._policy, self._schedule)
        with readable_state():
            before = check_same(settings, state, targets)
            if callable(self.options.budget) and self.elastic.moves:  # what it took can come back
                settings["budget"] = before["budget"]
            self.applier = self._applier_of(state)
            known, layers, names = predictions_of(state), frozenset(state["checkpointed"]), frozenset(state["savers"])
            streamed = counted(state["streamed"])
            initial, own = (
                InitialLoss(*map(finite, state["initial"])) if state["initial"] else None,
                finite(state["own_rate"]),
            )
            self.step = step = counted(state["step"])
            self.shown = int(state["peaks_shown"])
            for part in self.participants:
                part.begin(state)
        if self.guard.parts.on and not run.in_parts:
            raise ConfigError(
                "This run's plan requires batches in parts: create its TrainingRun with in_parts=True, and "
                "iterate over `pilot.parts`."
            )
        self.begun = True
        finish_load(run.model, targets)
        journal.open(name, known, writes=run.replicas.processes.first)
        journal.resumed(step, self.applier)
        journal.forget_control(step)
        counts_bytes = self.elastic.budget.kind != "parameters"
        self._savers.begin(counts_bytes=counts_bytes, names=names, streamed=streamed)
        journal.note(self._savers.streaming.told())
        checkpointing = self._savers.checkpointing
        self.rate.begin(initial, own)
        parts = self.guard.parts.on
        if parts:
            self.guard.parts.begin_to_keep(run)
        journal.note(before_training.RECORDING if checkpointing or parts else "")
        memory = before_training.run_memory(run, targets, signals=True) if checkpointing or parts else None
        if checkpointing:
            checkpointing.take(layers)
        applier, limit = self.applier, self.applier.limit
        if before.get("budget") != settings["budget"]:
            limit = self.elastic.limit(applier)
        self.guard.attach(run, applier, memory, journal, self._record, checkpointing)
        run.replicas.changed(targets, step)
        self._begin_rate(state, self.applier.seed)
        if settings["budget"] != before.get("budget"):
            journal.note(f"step {step}: the budget is now {settings['budget']}, previously {before.get('budget')}")
            self.guard.plan.new_limit(limit, step)
        self._ranks_changed()

    def _applier_of(self, state: Mapping[str, Any]) -> PlanApplier[PeftAdapters]:
        """Return the applier of a resumed run."""
        adapters = PeftAdapters(self.run.model, self._targets)
        adapters.meter.load_state_dict(state["signals"])
        low, high = rank_bounds(self._targets, self.options.bounds or {})
        reads = reads_signals(self._policy)
        applier = PlanApplier.from_state_dict(
            state["applier"], adapters, self._schedule, low=low, high=high, keeps=self._stays, reads=reads
        )
        applier.low = floor_of_experts(self._targets, applier.cost, applier.limit, low, high)
        return applier

    def stop(self) -> None:
        """End all participants, last first, and restore the original step."""
        for part in reversed(self.participants):
            part.end()
        self._savers.end()
        self._found = None
        with _RUNS:
            _UNDER_WAY.pop(self, None)

    def finish(self, *, checks: bool) -> None:
        """Stop, write the ranks to PEFT's configuration for saving, and if requested check the trained tensors."""
        self.stop()
        if self.begun:
            finish_load(self.run.model, self._targets)
            if checks:
                self._check()

    def break_off(self, *, as_found: bool = False) -> None:
        """Finish after an error: undo the changes of the step, and the first plan as well if `as_found`."""
        self.guard.shortage.put_back()
        if as_found and self._found:
            self._found.put_back()
        self.finish(checks=False)

    # A step -----------------------------------------------------------------------------------------------------------

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Announce the beginning of a step, after a due decision."""
        if self.due:
            self.decide()
        self._ranks_changed()  # a failed step may have restored others
        for part in self.participants:
            part.before_step(self.step, batches)

    def turns(self, data: T, scaler: Any) -> Iterator[T]:
        """Yield data for each further lane of a race, and at last for the run itself; see `RankPilot.lanes`."""
        if (race := self.rate.race) and race.lanes:
            parts = self.guard.parts
            counted_so_far = replace(parts.tally)
            with self.guard.meter.without_steps():
                yield from race.others(data, scaler)
            parts.tally = counted_so_far
            parts.ran.begin(self.step)
        yield data

    def out_of_memory(self, error: torch.OutOfMemoryError) -> None:
        """Prepare to repeat a step; see `RankPilot.out_of_memory`."""
        lanes = self.rate.race and self.rate.race.lanes
        with lanes.live_one() if lanes else nullcontext():
            self.guard.out_of_memory(error)
            self._ranks_changed()

    def before_optimizer_step(self, loss: torch.Tensor | float) -> None:
        """Announce that the gradients of a step are complete."""
        if (race := self.rate.race) and race.beside:
            race.before_optimizer_step(self.step, loss)
            return
        for part in self.participants:
            part.before_optimizer_step(self.step, loss)
        self._found = None
        if self.applier.clock.measures:
            self.applier.adapters.meter.accumulate()

    def after_step(self) -> None:
        """Announce the end of a step."""
        self.step += 1
        for part in self.participants:
            part.after_step(self.step)
        if self.rate.race and self.rate.race.lanes is None:
            self.finite.control = self.rate.control

    def _ranks_changed(self) -> None:
        """Announce the current ranks, if they differ from the last ones announced."""
        if (ranks := self.applier.ranks.tobytes()) != self._heard:
            for part in self.participants:
                part.ranks_changed()
            self._heard = ranks

    # Decisions --------------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """True if a decision is due."""
        return self.applier.clock.due(self.step) and self.step < self.applier.clock.total_steps

    @without_autocast()
    def decide(self) -> None:
        """Ask the policy, apply its decision as the budget allows, and record it."""
        applier, step, loss, keeper = self.applier, self.step, self._losses.mean(), self.guard.plan
        keeper.price_for_decision()
        by_hand = isinstance(self._policy, PlanFile)  # the author of a plan may shrink trained adapters
        stays = self._stays and applier.can_stay()
        keeps = not (by_hand or stays or self.run.generates or applier.clock.taken)
        with before_training.keep_what_was_learned(self.run, applier, self.journal.note) if keeps else nullcontext():
            control = self.rate.control if self.rate.steers else None
            share, steps = (control.read(step), control.record) if control else (1.0, None)
            observation = applier.observe(step, loss, steps, share)
            self.journal.note(what_stays(observation) if self.rate.steers and not applier.clock.taken else "")
            self.decision = decision = self._ask(observation)
            self.journal.note(rounding(self._policy, observation, decision))
            if control:  # an undo restores adapters of the previous ranks
                control.steer(decision.change, step)
            plan = applier.stay() if stays else applier.apply(decision, step, self.run.optimizer)
        self._losses.restart()
        keeper.decided(observation.problem.ranks, step)
        self._record(PlanChange(step, observation, decision, plan), loss)
        others = int(np.count_nonzero(plan.ranks != decision.ranks))
        if decision.exact and others and not self._stays:
            self.journal.note(
                f"step {step}: {plural(others, 'module')} could not get exactly the decided rank within the "
                "budget, the bounds and the largest rank change; the nearest plan is used."
            )

    def _ask(self, observation: Observation) -> Decision:
        return self.run.replicas.processes.on_first(lambda: asked(self._policy, observation))

    def take(self, ranks: Mapping[str, int]) -> None:
        """Set the ranks of modules, by full name, in place of a due decision, or in addition to the schedule."""
        applier, step, loss = self.applier, self.step, self._losses.mean()
        self.guard.plan.price_for_decision()
        observation = applier.observation_now(step)
        decision, plan = given_ranks(observation, ranks)
        applier.set_plan(decision.ranks, step, self.run.optimizer, decides=self.due)
        self._losses.restart()
        self.guard.plan.decided(observation.problem.ranks, step, by_hand=True)
        self._record(PlanChange(step, observation, decision, plan, corrects=True), loss)

    def _record(self, change: PlanChange, loss: float | None = None) -> None:
        """Announce new ranks, and record their reason; corrections of the guard leave the mean loss as it is."""
        self._ranks_changed()
        loss = self._losses.mean() if loss is None else loss
        history, checkpointing = self.guard.meter.history, self.guard.plan.checkpointing
        alone = "priced for the longest row alone" if self.guard.parts.on else ""
        seconds = self.applier.time
        shorter = ""
        if seconds := self.applier.time:
            share = seconds(self.applier.ranks) / seconds(self.applier.reference)
            shorter = f"a step takes about {share:.0%} of the time of the LoRA as configured"
        remarks = str(checkpointing or ""), alone, shorter
        self.journal.record(
            self.applier,
            change,
            loss=loss,
            peak=history[-1][1] if history else None,
            rates=self.rate.of_plan.rates if self.rate.of_plan else None,
            remark=", ".join(filter(None, remarks)),
        )
        self.run.replicas.changed(self._targets, change.step)

    # State of a checkpoint --------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Check that trained tensors are finite, and the same in all processes."""
        self.finite.check(self.step)
        self.run.replicas.compare(self._targets, self.step)

    def state(self) -> dict[str, Any]:
        """Return the state for `resume`, without adapters and optimizer: nested tensors and JSON values."""
        self._check()
        whole = {
            "processes": self.run.replicas.processes.count,
            "step": self.step,
            **adapter_settings(self._targets),
            "applier": self.applier.state_dict(),
            "signals": self.applier.adapters.meter.state_dict(),
            "predictions": self.journal.predictions,
            "peaks_shown": self.shown,
            **self._savers.state(),
            "settings": run_settings(self.options, self.elastic.budget, self._policy, self._schedule),
        }
        for part in self.participants:
            whole |= part.state()
        saved: dict[str, Any] = as_saved(whole)
        return saved
