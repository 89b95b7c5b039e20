"""What decides the ranks of one fine-tune, between a model, an optimiser and a loss; it knows no Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..agents.learned.exploring import exploring
from ..agents.learned.goals import with_goal
from ..agents.learned.policy_file import DEFAULT, load_policy, policy_schedule
from ..agents.rules.given_plan import PlanFile, given_ranks
from ..allocation.bounds import Bounds, rank_bounds
from ..allocation.controller import RankController
from ..allocation.goal import goal_of
from ..allocation.log import DecisionLog
from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..allocation.policy import Decision, Policy
from ..allocation.schedule import DecisionSchedule
from ..common.devices import without_autocast
from ..errors import NoGradientError
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import finish_load, resizable_targets
from ..lora.scaling_names import Scaling
from ..lora.starts import start_kept
from ..memory.budget import Budget, TimeBudget
from ..memory.calibration import beside_model
from ..memory.recording import Batch
from .before_training import Progress, learned_kept, prepare, put_back_on_error, run_memory, within_all
from .correction import Correction
from .gradient_watch import GradientWatch
from .journal import Journal
from .loop_calls import LoopCalls
from .loss_meter import LossMeter
from .options import check_options, check_run, readable_budget
from .peak_guard import PeakGuard
from .readings import Readings
from .recomputation import recomputing
from .run import TrainingRun
from .run_settings import adapter_settings, changes, check_same, predictions_of, readable_state
from .time_before_training import StepTimer, decide

logger = logging.getLogger(__name__)


class RankPilot(Readings):
    """Moves LoRA rank between modules during one fine-tune, inside a hard budget.

    `begin` measures what plans cost on the run's model and data, probes which modules matter, and applies the first
    plan. Then a loop calls three methods in each optimiser step: `before_step`, `before_optimizer_step`, `after_step`.
    `RankPilotCallback` does so for the transformers Trainer.

    Args:
        policy: "default", which ships with the package, the folder of a trained policy, the name of a rule
            ("signal-mean", "top-down"), a plan that a person edited ("plan.yaml"), or a policy object.
        budget: bytes at the peak of a step ("350MB", "6GiB", an int from 1024 on), a share of what plain LoRA takes,
            rank 8 on all modules ("80%", 0.8), most of the memory that is free on the device ("auto"), or a number of
            adapter parameters ("300k params").
        log: the folder of the decision log; None for no log.
        schedule: when to decide; by default as the policy was trained to.
        seed: of the probe and of fresh rows.
        measure_every: measure the real peak every so many steps, and after each change of ranks.
        bounds: the rank of single modules, or their least and largest rank, by the module's name or the end of it:
            `{"q_proj": 8, "layers.0.mlp.down_proj": (0, 4)}`.
        fresh: begin with new adapters. By default trained ones are kept, and the first plan resizes them.
        tell: called with a line for each decision and each correction; by default they go to the log of this module.
        progress: shows how far the probe has come.
        recompute: let as few layers as each plan needs run again in the backward pass (gradient checkpointing, layer by
            layer): less memory, more time, the same losses. A share is then one of what plain LoRA takes without.
            A policy with networks uses it only where they expect that to pay; see `time_before_training.decide`.
        time: what a step may take in time: a share of what plain LoRA takes with no layer run again ("75%"), or
            seconds ("0.8s"), measured on the device before training.
        explore: draw each plan at this temperature and log the probabilities (`exploring`); by default take the best.
        scaling: what stays when a rank changes: "alpha", the model's `lora_alpha`, so that one learning rate fits all
            ranks; or "constant", the factor `lora_alpha / r` that the model begins with. See docs/scaling.md.
        goal: "quality"; "time" or "bytes" for the cheapest plan that loses surely no more than `tolerance`; see `Goal`.
        tolerance: in log loss against rank 8 on all modules; 0.01 by default.

    Attributes:
        controller: observes the adapters and changes their ranks; None before `begin`.
        decision: the policy's latest one; None before `begin`.
        journal: writes down the decisions.

    Raises:
        ConfigError, UnknownNameError, PolicyFileError, BudgetError: an argument that cannot be used.
    """

    def __init__(
        self,
        policy: str | Path | Policy = DEFAULT,
        budget: str | float | Budget = "100%",
        *,
        log: str | Path | None = None,
        schedule: DecisionSchedule | None = None,
        seed: int = 0,
        measure_every: int = 100,
        bounds: Bounds | None = None,
        fresh: bool = False,
        tell: Callable[[str], None] | None = None,
        progress: Progress[Any] | None = None,
        recompute: bool = False,
        time: str | TimeBudget | None = None,
        explore: float | None = None,
        scaling: Scaling = "alpha",
        goal: str = "quality",
        tolerance: float | None = None,
    ) -> None:
        check_options(schedule, measure_every, bounds, scaling, seed, fresh=fresh, recompute=recompute)
        loaded = load_policy(policy)
        self.budget: Budget = readable_budget(budget, recompute=recompute)
        aim = goal_of(goal, tolerance, budget_unit=self.budget.unit, recompute=recompute)
        self.policy: Policy = with_goal(loaded if explore is None else exploring(loaded, explore, seed), aim)
        self.decision: Decision | None = None
        self.schedule: DecisionSchedule = schedule or policy_schedule(policy)
        self.seed, self.fresh, self.scaling, self.bounds = seed, fresh, scaling, dict(bounds or {})
        self.controller: RankController[PeftAdapters] | None = None
        self.recompute, self.times_plans = recompute, aim.kind == "time"
        self.time: TimeBudget | None = None if time is None else TimeBudget.parse(time)
        decisions = DecisionLog(Path(log)) if log else None
        self.journal: Journal = Journal(decisions, self.policy, tell or logger.info, recompute)
        self._measure_every = measure_every
        self._guard, self._losses, self._progress = PeakGuard(measure_every), LossMeter(), progress

    # The events of a run, in their order ------------------------------------------------------------------------------

    def begin(self, run: TrainingRun, *, name: str = "") -> None:
        """Measure, probe, and apply the first plan. An earlier run that has no `finish` ends here.

        Args:
            run: what is about to begin.
            name: of the run, for the decision log.

        Raises:
            BudgetError: no plan fits the budget.
            UnsupportedError: the model, the optimiser or the loss cannot be handled.
            DataError, NonFiniteError: the training set is empty, or the loss is NaN or infinite.
            ProcessError: the first of several processes failed, or they no longer hold the same adapters.
        """
        self._start(run)
        targets = resizable_targets(run.model, self.scaling)
        self.journal.open(name, [], writes=run.replicas.processes.first)
        kept = start_kept(run.model, targets, self.fresh, self.journal.note)
        with put_back_on_error(run, targets), kept, recomputing(run.model, self.recompute) as recomputation:
            self.controller, memory = prepare(
                run,
                targets,
                self.budget,
                self.schedule,
                self.bounds,
                self.seed,
                fresh=self.fresh,
                recomputation=recomputation,
                time=self.time or (TimeBudget.unlimited() if self.times_plans else None),
                progress=self._progress,
            )
            self._guard.attach(run, self._controller, memory, self._corrected, recomputation)
            if self.time:
                StepTimer(run, targets, memory, self.controller.limit, recomputation).settle(self.controller, self._ask)
            self._decide()

    def resume(self, run: TrainingRun, state: Mapping[str, Any], *, step: int, name: str = "") -> None:
        """Go on from `state_dict`, with the adapters and the optimiser then. Another budget or time counts at once.

        Args:
            run: the run, whose model holds the adapters of that time.
            state: what `state_dict` returned.
            step: the optimiser steps done.
            name: of the run, for the decision log.

        Raises:
            RunFolderError: policy, schedule, bounds or the model's ranks are others than those of that time.
            BudgetError: no plan fits another budget.
        """
        self._start(run)
        targets = resizable_targets(run.model, self.scaling)
        low, high = rank_bounds(targets, self.bounds)
        adapters, schedule = PeftAdapters(run.model, targets), self.schedule
        with readable_state():
            before = check_same(settings := self._settings(), state, targets)
            adapters.meter.load_state_dict(state["signals"])
            controller = RankController.from_state_dict(state["controller"], adapters, schedule, low=low, high=high)
            self._losses.load_state_dict(state["losses"])
            self._guard.load_state_dict(state["guard"])
            known, layers = predictions_of(state), frozenset(state["recomputed"])
            self._step, self._shown = step, int(state["peaks_shown"])
        self.controller, limit = controller, controller.limit
        finish_load(run.model, targets)
        self.journal.open(name, known, writes=run.replicas.processes.first)
        with recomputing(run.model, self.recompute) as recomputation:
            memory = run_memory(run, targets, signals=True) if recomputation else None
            if recomputation:
                recomputation.take(layers)
            if (was := before.get("budget")) != settings["budget"]:
                budget, on_first = within_all(run, self.budget), run.replicas.processes.on_first
                limit = on_first(lambda: controller.limit_of(beside_model(budget, run.model), run.device, was))
            if before.get("time") != settings["time"]:
                timer = StepTimer(run, targets, memory, limit, recomputation)
                controller.time = timer.other_limit(controller.time, self.time)
            self._guard.attach(run, self._controller, memory, self._corrected, recomputation)
            run.replicas.changed(targets, step)
            if changed := changes(settings, before):
                self.journal.note(f"step {step}: {changed}")
                self._guard.new_limit(limit, step)

    def before_step(self, *batches: Batch) -> None:
        """Look at the batches of the step that begins, before the model sees them, and measure it if it is due.

        A batch that is larger than all before may shrink the plan. A decision that was put off is made here.

        Raises:
            BudgetError: no plan fits the larger batch, or the plan of the decision does not fit.
        """
        self._decide_if_due()
        self._calls.made("before_step")
        self._guard.before_step(self._step, batches)

    def before_optimizer_step(self, loss: torch.Tensor | float) -> None:
        """Read the gradients, which are complete now; call before they are cleared.

        Args:
            loss: the mean loss of the step.

        Raises:
            NoGradientError: the adapters receive none.
        """
        controller = self._controller
        self._calls.made("before_optimizer_step")
        self._guard.meter.passed()
        try:
            self._gradients.look(controller.targets, self._step + 1, closely=self._guard.meter.measuring)
        except NoGradientError:
            self._guard.meter.close()
            raise
        self._losses.add(loss)
        if not controller.finished:
            controller.adapters.meter.accumulate()

    def after_step(self, *, decide: bool = True) -> None:
        """Compare the peak with the budget, and decide if a decision is due; call after the optimiser's step.

        Args:
            decide: False puts a decision that is due off to the next step, so that none follows the last one.

        Raises:
            ConfigError: the step had no `before_step`, or no `before_optimizer_step`.
            BudgetError: the step was above the budget, and no plan fits.
        """
        self._check_begun()
        self._calls.end_step(self._step + 1)
        self._step += 1
        self._guard.after_step(self._step)
        if decide:
            self._decide_if_due()

    def take(self, ranks: Mapping[str, int]) -> None:
        """Give the modules these ranks now, by full name, whatever the policy says; it is logged.

        They stand for a decision that is due, and leave the schedule as it is where none is.

        Raises:
            BudgetError: they are above the budget.
            UnknownNameError, ConfigError: see `given_ranks`.
        """
        controller, step, loss = self._controller, self._step, self._losses.mean()
        self._guard.deciding()
        observation = controller.observation_now(step)
        decision, plan = given_ranks(observation, ranks)
        controller.set_plan(decision.ranks, step, self._run.optimizer, decides=self._is_due())
        self._losses.restart()
        self._guard.decided(observation.problem.ranks, step)
        self._record(step, loss, observation, decision, plan, correction=True)

    def out_of_memory(self) -> None:
        """Shrink the plan after a step that ran out of memory; afterwards take the step again, without gradients.

        Raises:
            BudgetError: no smaller plan is possible.
        """
        self._check_begun()
        self._guard.out_of_memory()

    def finish(self) -> None:
        """Stop measuring, put back which layers run again, and write the ranks to PEFT's configuration for saving.

        Raises:
            ProcessError: the processes do not hold the same adapters.
        """
        self.break_off()
        if self.controller:
            self._run.replicas.compare(self.controller.targets, self._step)

    def break_off(self) -> None:
        """As `finish`, after an error: other processes are not heard."""
        self._guard.finish()
        if self.controller:
            finish_load(self.controller.adapters.model, self.controller.targets)

    def state_dict(self) -> dict[str, Any]:
        """All that `resume` needs beside adapters and optimiser: dictionaries of tensors, arrays and JSON values.

        All processes call this.

        Raises:
            ProcessError: the processes do not hold the same adapters.
        """
        controller = self._controller
        self._run.replicas.compare(controller.targets, self._step)
        return {
            "processes": self._run.replicas.processes.count,
            "step": self._step,
            **adapter_settings(controller.targets),
            "controller": controller.state_dict(),
            "signals": controller.adapters.meter.state_dict(),
            "losses": self._losses.state_dict(),
            "guard": self._guard.state_dict(),
            "predictions": self.predictions,
            "peaks_shown": self._shown,
            "recomputed": list(self._guard.recomputed),
            "settings": self._settings(),
        }

    # What the events do -----------------------------------------------------------------------------------------------

    def _start(self, run: TrainingRun) -> None:
        check_run(run)
        self._run = run
        self._guard.finish()  # of an earlier run that did not end
        self._step, self._shown, self._gradients, self._calls = 0, 0, GradientWatch(), LoopCalls()
        self._guard, self._losses = PeakGuard(self._measure_every), LossMeter(run.replicas.processes)

    def _decide_if_due(self) -> None:
        if self._is_due():
            self._decide()

    @without_autocast()
    def _decide(self) -> None:
        controller, step, loss = self._controller, self._step, self._losses.mean()
        self._guard.deciding()
        by_hand = isinstance(self.policy, PlanFile)  # who wrote the plan may shrink trained adapters
        keeps = not by_hand and not controller.decision
        with learned_kept(self._run, controller, self.journal.note) if keeps else nullcontext():
            observation, decision = decide(
                self._guard, controller, self._ask, self.journal.note, step, loss, recomputes=self.recompute
            )
            self.decision = decision
            plan = controller.apply(decision, step, self._run.optimizer)
        self._losses.restart()
        self._guard.decided(observation.problem.ranks, step)
        self._record(step, loss, observation, decision, plan)

    def _ask(self, observation: Observation) -> Decision:
        return self._run.replicas.processes.on_first(lambda: self.policy.decide(observation))

    def _corrected(self, correction: Correction) -> None:
        """Record a change of ranks by the guard like a decision."""
        made = correction.observation, correction.decision, correction.plan, correction.notes
        self._record(correction.step, self._losses.mean(), *made, correction=True)

    def _record(
        self,
        step: int,
        loss: float | None,
        observation: Observation,
        decision: Decision,
        plan: Plan,
        notes: dict[str, str] | None = None,
        *,
        correction: bool = False,
    ) -> None:
        self.journal.record(
            self._controller,
            observation,
            decision,
            plan,
            step=step,
            loss=loss,
            peak=self.peaks[-1][1] if self.peaks else None,
            notes=notes,
            remark=self._guard.remark(),
            correction=correction,
        )
        self._run.replicas.changed(self._controller.targets, step)
