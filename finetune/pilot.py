"""What decides the ranks of one fine-tune, between a model, an optimiser and a loss; it knows no Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..agents.chooser import DEFAULT, with_goal
from ..agents.control import CONTROLLERS, SHORTEST
from ..agents.controller import RankController
from ..agents.learned.policy_file import load_policy, policy_schedule
from ..agents.log import DecisionLog
from ..agents.observation import Observation
from ..agents.policy import Decision, Policy, asked, reads_signals, rounding
from ..agents.rules import AsConfigured, PlanFile, given_ranks
from ..agents.settings import DecisionSchedule
from ..common.checks import finite
from ..common.devices import without_autocast
from ..common.text import plural
from ..cost.budget import Budget, GivenBudget, TimeBudget
from ..cost.recording import Batch
from ..cost.savers import CACHE, SAVERS, TILES, ExactSavers, is_compiled
from ..errors import ConfigError, NoGradientError
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import finish_load, resizable_targets, start_kept
from ..lora.targets import TargetModule
from ..plan.plan import Plan
from ..plan.problem import rank_bounds
from ..plan.rate import Look
from . import before_training
from .elastic import ElasticBudget
from .journal import Correction, Journal
from .left_as_found import Kept, Recomputation, all_running_again, recomputing
from .loop_calls import LoopCalls
from .options import GivenOptions, PilotOptions
from .peak_guard import PeakGuard
from .plan_rate import PlanRate, look_at
from .prefix_cache import PrefixCache
from .probing import Progress
from .run import TrainingRun, check_run
from .run_control import RunControl
from .run_settings import adapter_settings, changes, check_same, predictions_of, readable_state, run_settings
from .watches import FiniteWatch, GradientWatch, LossMeter

logger = logging.getLogger(__name__)

CONTROLLER = "alignment"
"""Who controls the learning rate; see `CONTROLLERS`."""


class RankPilot:
    """Moves LoRA rank between modules during one fine-tune, inside a hard budget.

    `begin` measures what plans cost on the run's model and data, probes which modules matter if the policy reads that,
    and applies the first plan. Then a loop calls three methods in each optimiser step: `before_step`,
    `before_optimizer_step`, `after_step`. `attach` has them called in the runs of a transformers Trainer.

    Args:
        policy: "default", which ships with the package, the folder of a trained policy, the name of a rule
            ("signal-mean", "top-down"), a plan that a person edited ("plan.yaml"), or a policy object.
        options: all options, or the budget alone.
        tell: called with a line for each decision and each correction; by default they go to the log of this module.
        progress: shows how far the probe has come.
        changes: single options by their names; see `PilotOptions`.

    Attributes:
        options: as above, with the changes.
        budget: what a plan may cost.
        time: what a step may take in time; None without a limit.
        policy: decides.
        schedule: when it does.
        seed: of all that is drawn.
        times_plans: whether the time of steps is measured, limited or not.
        controller: observes the adapters and changes their ranks; None before `begin`.
        decision: the policy's latest one; None before `begin`.
        journal: writes down the decisions.

    Raises:
        ConfigError, UnknownNameError, PolicyFileError, BudgetError: an argument that cannot be used.
    """

    def __init__(
        self,
        policy: str | Path | Policy = DEFAULT,
        options: GivenOptions = None,
        *,
        tell: Callable[[str], None] | None = None,
        progress: Progress[Any] | None = None,
        **changes: Any,
    ) -> None:
        self.options: PilotOptions = PilotOptions.of(options, changes)
        options = self.options
        self.seed: int = options.seed or 0
        aim = options.aim
        self.policy: Policy = with_goal(load_policy(policy), aim)
        self.schedule: DecisionSchedule = options.schedule or policy_schedule(policy)
        self.budget: Budget = options.budget_read
        self.time: TimeBudget | None = options.time_read
        self.times_plans: bool = aim.kind == "time"
        self.controller: RankController[PeftAdapters] | None = None
        self.decision: Decision | None = None
        decisions = DecisionLog(Path(options.log)) if options.log else None
        self.journal: Journal = Journal(decisions, self.policy, tell or logger.info)
        self._guard, self._losses, self._progress = PeakGuard(options.measure_every), LossMeter(), progress
        self._calls = LoopCalls()
        self._found: Kept | None = None
        self._put_back = ExitStack()
        self._prefix: PrefixCache | None = None
        self._savers: ExactSavers | None = None
        self._rate: PlanRate | None = None
        self._control: RunControl | None = None
        self._finite: FiniteWatch
        self._elastic: ElasticBudget
        self._followed = b""

    def draw_from(self, seed: int) -> None:
        """Draw with another seed from the next run on: the rows of the probe, and fresh adapters."""
        self.seed = seed

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
        targets = self._start(run)
        if self.budget.kind == "parameters":
            before_training.warn_of_other_adapters(run, targets)
        self.journal.open(name, [], writes=run.replicas.processes.first)
        stay, fresh = self._stay, self.options.fresh
        kept = nullcontext() if stay else start_kept(run.model, targets, fresh, self.journal.note)
        with (
            before_training.put_back_on_error(run, targets) as found,
            kept,
            self._as_wanted(run.model) as (savers, recomputation),
        ):
            auto = self.options.learning_rate == "auto"
            probes = reads_signals(self.policy)
            looks = auto or not probes
            looked = before_training.UNSEEN if stay else run.look(self.seed) if looks else None
            self._rate = self._plan_rate(targets, look_at(run, looked) if looked and not stay else None)
            self.controller, costs = before_training.prepare(
                run,
                targets,
                self.budget,
                self.schedule,
                self.options.bounds or {},
                self.seed,
                looked=None if probes else looked,
                fresh=fresh,
                stay=stay,
                savers=savers,
                recomputation=recomputation,
                time=self.time or (TimeBudget.unlimited() if self.times_plans else None),
                cache_bytes=self.options.prefix_cache_bytes,
                progress=self._progress,
            )
            self.journal.note(before_training.told_budget(run, targets, self.budget, costs.limit, stay=stay))
            self.journal.note_saved(costs.saved)
            memory = costs.memory
            self._elastic.begin(costs.limit)
            self._guard.attach(run, self._controller, memory, self.journal, self._corrected, recomputation)
            if self.time:
                timer = before_training.StepTimer(run, targets, memory, self.controller.limit, recomputation)
                timer.settle(self.controller, self._ask)
            self.journal.note(before_training.what_times_mean(self.controller.time, run))
            self._decide()
            self.journal.note(self._rate.told())
            self._control = self._run_control(targets)
        self._found = found
        self._calls.begin(run)
        self._begin_prefix_cache()

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
        targets = self._start(run)
        low, high = rank_bounds(targets, self.options.bounds or {})
        adapters, schedule = PeftAdapters(run.model, targets), self.schedule
        with readable_state():
            before = check_same(settings := self._settings(), state, targets)
            adapters.meter.load_state_dict(state["signals"])
            reads = reads_signals(self.policy)
            controller = RankController.from_state_dict(
                state["controller"], adapters, schedule, low=low, high=high, reads=reads
            )
            self._losses.load_state_dict(state["losses"])
            self._guard.load_state_dict(state["guard"])
            if callable(self.options.budget) and self._elastic.moves:  # what it took can come back
                settings["budget"] = before["budget"]
            self._elastic.go_on(before["budget"], state["elastic"])
            known, layers = predictions_of(state), frozenset(state["recomputed"])
            names, look = frozenset(state["savers"]), Look(*map(finite, state["look"])) if state["look"] else None
            own = finite(state["own_rate"])
            self._step, self._shown = step, int(state["peaks_shown"])
        self.controller, limit = controller, controller.limit
        finish_load(run.model, targets)
        self.journal.open(name, known, writes=run.replicas.processes.first)
        self.journal.forget_control(step)
        with self._as_wanted(run.model, names) as (_, recomputation):
            self._rate = self._plan_rate(targets, look, own)
            memory = before_training.run_memory(run, targets, signals=True) if recomputation else None
            if recomputation:
                recomputation.take(layers)
            if before.get("budget") != settings["budget"]:
                limit = self._elastic.limit(controller)
            if before.get("time") != settings["time"]:
                cache_bytes = self.options.prefix_cache_bytes
                timer = before_training.StepTimer(run, targets, memory, limit, recomputation, cache_bytes)
                controller.time = timer.other_limit(controller.time, self.time)
            self._guard.attach(run, self._controller, memory, self.journal, self._corrected, recomputation)
            run.replicas.changed(targets, step)
            self._control = self._run_control(targets)
            if self._control and (seen := state.get("control")):
                with readable_state():
                    self._control.load_state_dict(seen)
            if changed := changes(settings, before):
                self.journal.note(f"step {step}: {changed}")
                self._guard.new_limit(limit, step)
            self._follow_plan()
        self._calls.begin(run)
        self._begin_prefix_cache()
        if self._prefix and self._prefix.layers:
            self.journal.note(
                "What frozen layers returned before is computed anew: beside other padding it may differ in its last "
                "bits from a run without a break. prefix_cache='off' goes on bit for bit."
            )

    def before_step(self, *batches: Batch) -> None:
        """Look at the batches of the step that begins, before the model sees them, and measure it if it is due.

        A batch that is larger than all before may shrink the plan, and so does memory that others have taken under a
        budget of "auto". A decision that was put off is made here.

        Raises:
            BudgetError: no plan fits the larger batch or the memory that is left, or that of the decision does not fit.
        """
        self._decide_if_due()
        with self._ends_on_error():
            self._calls.made("before_step")
        if self._elastic.given or self._elastic.moves or self._guard.follows:
            self._guard.follow(self._elastic.limit(self._controller), self._step)
        self._follow_plan()
        if self._control:
            self._control.before_step(self._step)
        self._guard.before_step(self._step, batches)
        self._follow_plan()

    def before_optimizer_step(self, loss: torch.Tensor | float) -> None:
        """Read the gradients, which are complete now; call before they are cleared.

        Args:
            loss: the mean loss of the step.

        Raises:
            NoGradientError: the adapters receive none.
        """
        controller = self._controller
        with self._ends_on_error():
            self._calls.made("before_optimizer_step")
        self._guard.passed()
        self._found = None
        try:
            self._gradients.look(controller.targets, self._step + 1, closely=self._guard.meter.measuring)
        except NoGradientError:
            self._guard.meter.close()
            raise
        self._losses.add(loss)
        self._finite.look(loss)
        if self._control:
            self._control.look(loss, self._step)
        if controller.measures:
            controller.adapters.meter.accumulate()

    def after_step(self, *, decide: bool = True) -> None:
        """Compare the peak with the budget, and decide if a decision is due; call after the optimiser's step.

        Args:
            decide: False puts a decision that is due off to the next step, so that none follows the last one.

        Raises:
            ConfigError: the step had no `before_step`, or no `before_optimizer_step`.
            BudgetError: the step was above the budget, and no plan fits.
            NonFiniteError: what trains is not finite any more, and control of the run cannot undo that.
        """
        self._check_begun()
        with self._ends_on_error():
            self._calls.end_step(self._step + 1)
        self._step += 1
        self._guard.after_step(self._step)
        self._finite.after_step(self._step)
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
        controller.set_plan(decision.ranks, step, self._run.optimizer, decides=self._due)
        self._losses.restart()
        self._guard.decided(observation.problem.ranks, step, by_hand=True)
        self._record(step, loss, observation, decision, plan, correction=True)

    def set_budget(self, budget: GivenBudget) -> None:
        """Give the run another budget from its next step on, or a function that is asked before each step.

        A lower one checkpoints more layers first, and then shrinks the plan; a higher one gives back what was taken.

        Raises:
            BudgetError, ConfigError: it cannot be read.
        """
        options = replace(self.options, budget=budget)
        if self.controller:
            self._elastic.give(budget, self.controller)
        self.options, self.budget = options, options.budget_read

    def out_of_memory(self, error: torch.OutOfMemoryError | None = None) -> None:
        """Shrink the plan after a step that ran out of memory; afterwards take the step again, from its first batch.

        Gradients are cleared. What a step that passes then has cost in rank comes back after some good steps.

        Args:
            error: of the step.

        Raises:
            torch.OutOfMemoryError: this error, or a new one. Smaller plans are no help, and ranks, adapters, optimizer
                and decision log are as they were before the step.
            BudgetError: other processes are in the middle of the step.
        """
        self._check_begun()
        self._guard.out_of_memory(error or torch.OutOfMemoryError("A training step ran out of memory."))

    def finish(self) -> None:
        """Stop measuring, checkpoint the layers of before, and write the ranks to PEFT's configuration for saving.

        Raises:
            ProcessError: the processes do not hold the same adapters.
            NonFiniteError: what was trained is not finite.
        """
        self._end()
        if self.controller:
            self._finite.check(self._step)
            self._run.replicas.compare(self.controller.targets, self._step)

    def break_off(self, *, as_found: bool = False) -> None:
        """As `finish`, after an error: other processes are not heard, and what the step has changed is put back.

        Args:
            as_found: undo the first plan as well if no step has passed under it, since the run begins again.
        """
        self._guard.put_back()
        if as_found and self._found:
            self._found.put_back()
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """All that `resume` needs beside adapters and optimiser: dictionaries of tensors, arrays and JSON values.

        All processes call this.

        Raises:
            ProcessError: the processes do not hold the same adapters.
            NonFiniteError: what trains is not finite, so that no checkpoint is to hold it.
        """
        controller = self._controller
        self._finite.check(self._step)
        self._run.replicas.compare(controller.targets, self._step)
        return {
            "processes": self._run.replicas.processes.count,
            "step": self._step,
            **adapter_settings(controller.targets),
            "controller": controller.state_dict(),
            "signals": controller.adapters.meter.state_dict(),
            "losses": self._losses.state_dict(),
            "guard": self._guard.state_dict(),
            "elastic": self._elastic.state_dict(),
            "predictions": self.predictions,
            "peaks_shown": self._shown,
            "recomputed": list(self._guard.recomputed),
            "savers": list(self._savers.names) if self._savers else [],
            "own_rate": self._rate.own if self._rate else None,
            "look": list(astuple(self._rate.look)) if self._rate and self._rate.look else None,
            "control": self._control.state_dict() if self._control else None,
            "settings": self._settings(),
        }

    # What can be read while the run lasts --------------------------------------------------------------------------

    @property
    def predictions(self) -> list[tuple[int, float]]:
        """(step, cost of the plan) of each decision and correction."""
        return self.journal.predictions

    @property
    def peaks(self) -> list[tuple[int, int]]:
        """(step, bytes at its peak) of each measured step; the highest of all processes."""
        return self._guard.meter.history

    @property
    def checks(self) -> list[tuple[int, float, int]]:
        """(step, predicted bytes, measured bytes) of the first measured step after each change of ranks."""
        return self._guard.checks

    @property
    def limit(self) -> float:
        """What a plan may cost, in bytes or parameters. It is known from `begin` on."""
        return float(self._controller.limit)

    @property
    def rate_factor(self) -> float:
        """By what the optimizer's learning rate is multiplied in each step; see `PlanRate`."""
        return self._rate.factor if self._rate else 1.0

    @property
    def rates(self) -> tuple[float, float] | None:
        """The peak of the learning rate for plain LoRA, and under the plan; None before `begin`."""
        return (self._rate.plain, self._rate.rate) if self._rate else None

    def aside(self) -> AbstractContextManager[None]:
        """Let what runs inside the block be no part of a step, as where the model writes what it learns from."""
        return self._guard.aside()

    def evaluation(self) -> AbstractContextManager[None]:
        """Measure the evaluation that runs inside the block; see `evaluation_share`."""
        self._check_begun()
        return self._guard.evaluation()

    @property
    def evaluation_share(self) -> float:
        """The peak of the latest evaluation as a share of the budget; above 1 its batch is too large."""
        return self._guard.evaluation_share

    def figures(self) -> dict[str, float]:
        """What a training log shows of the ranks: mean rank, adapted modules, cost of the plan and limit.

        The highest peak is among them if a step was measured since the last call.
        """
        fresh, self._shown = self.peaks[self._shown :], len(self.peaks)
        controller, predictions = self._controller, self.predictions
        ranks, unit = controller.ranks, controller.cost.unit
        figures = {
            "rank_mean": float(ranks.mean()),
            "rank_modules": float((ranks > 0).sum()),
            f"plan_{unit}": predictions[-1][1],
            f"budget_{unit}": float(controller.limit),
            "rank_decisions": float(len(predictions)),
        }
        if self._guard.chooses_layers:
            figures["recomputed_layers"] = float(len(self._guard.recomputed))
        if controller.time:
            figures["plan_seconds"] = controller.time.of(ranks)
            if controller.time.beside is None:
                figures["budget_seconds"] = controller.time.seconds
        if fresh:
            figures["peak_bytes"] = float(max(peak for _, peak in fresh))
        return figures

    # What the events do -----------------------------------------------------------------------------------------------

    @property
    def _controller(self) -> RankController[PeftAdapters]:
        self._check_begun()
        assert self.controller is not None
        return self.controller

    @property
    def _stay(self) -> bool:
        """Whether ranks stay as the LoraConfig has them."""
        return isinstance(self.policy, AsConfigured)

    @property
    def _due(self) -> bool:
        return self._controller.due(self._step) and self._step < self._controller.total_steps

    def _settings(self) -> dict[str, Any]:
        return run_settings(self.options, self._elastic.budget, self.policy, self.schedule)

    def _check_begun(self) -> None:
        if self.controller is None:
            raise ConfigError("The run has not begun: call `begin` first, or `rankpilot.load_checkpoint`.")

    @contextmanager
    def _ends_on_error(self) -> Iterator[None]:
        """Stop measuring where a loop is told that it leaves out a call."""
        try:
            yield
        except ConfigError:
            self.break_off()
            raise

    @contextmanager
    def _as_wanted(
        self, model: nn.Module, savers: Collection[str] = tuple(SAVERS)
    ) -> Iterator[tuple[ExactSavers | None, Recomputation | None]]:
        """Switch on what the options say of how a step runs, until the run ends, or an error in this block."""
        options = self.options
        try:
            if options.gradient_checkpointing is True:
                self._put_back.callback(all_running_again(model))
            if options.exact_savers:
                if self._run.tells_positions:  # without a cache, transformers takes them for those of packed texts
                    savers = [name for name in savers if name != CACHE]
                if self._run.replicas.sharded:  # the head is whole in its own passes alone
                    savers = [name for name in savers if name != TILES]
                if self._stay:  # answers are written with a cache, and read off logits
                    savers = [name for name in savers if name not in (CACHE, TILES)]
                self._savers = ExactSavers(model, savers, compiled=is_compiled(self._run.wrapped))
                self._put_back.callback(self._savers.put_back)
            wanted = options.chooses_layers and self.budget.kind != "parameters"
            with recomputing(model, wanted, whole=options.goal == "bytes") as recomputation:
                yield self._savers, recomputation
        except BaseException:
            self._put_back.close()
            raise

    def _begin_prefix_cache(self) -> None:
        """Let frozen layers run once a row, where later epochs or evaluations are served by that."""
        self._prefix = before_training.prefix_cache(self._run, self.options.prefix_cache_bytes, self.journal.note)
        if self._prefix:
            self._put_back.callback(self._prefix.end)
            self._followed = b""
            self._follow_plan()

    def _plan_rate(self, targets: Sequence[TargetModule], look: Look | None, own: float | None = None) -> PlanRate:
        """Have the learning rate follow the plan until the run ends."""
        auto = self.options.learning_rate == "auto"
        keep, controlled = self.options.keep_rate, self._controls
        rate = PlanRate(self._run, targets, auto=auto, controlled=controlled, keep=keep, look=look, own=own)
        self._put_back.callback(rate.end)
        return rate

    @property
    def _controls(self) -> bool:
        """Whether steps correct the learning rate: as it is asked for, and by default under "auto" in a long run."""
        if self.options.control is None:
            return self.options.learning_rate == "auto" and self._run.total_steps >= SHORTEST
        return self.options.control

    def _run_control(self, targets: Sequence[TargetModule]) -> RunControl | None:
        """What corrects the learning rate while the run goes, if it is wanted."""
        if not self._controls:
            return None
        assert self._rate is not None
        control = RunControl(self._run, targets, self._rate, CONTROLLERS[CONTROLLER], self.journal)
        self._finite.control = control
        return control

    def _follow_plan(self) -> None:
        """Let the learning rate, its control and the prefix cache know of other ranks."""
        ranks = self._controller.ranks.tobytes()
        if ranks != self._followed:
            if self._rate:
                self._rate.follow()
            if self._control:
                self._control.ranks_changed()
            if self._prefix:
                self._prefix.follow()
            self._followed = ranks

    def _end(self) -> None:
        self._guard.finish()
        self._put_back.close()
        self._calls.finish()
        self._found = None
        if self.controller:
            finish_load(self.controller.adapters.model, self.controller.targets)

    def _start(self, run: TrainingRun) -> list[TargetModule]:
        """Take a run that can be trained in the place of an earlier one; returns the target modules of its model."""
        targets = resizable_targets(run.model, self.options.scaling)
        check_run(run, targets)
        self._run = run
        self._guard.finish()  # of an earlier run that did not end
        self._put_back.close()
        self._calls.finish()
        self._prefix = self._savers = self._rate = self._control = None
        self._elastic = ElasticBudget(run, self.options.budget)
        self.budget = self._elastic.budget
        self._followed = b""
        self._step, self._shown, self._gradients, self._calls = 0, 0, GradientWatch(), LoopCalls()
        self._finite = FiniteWatch(run, self.journal)
        self._guard, self._losses = PeakGuard(self.options.measure_every), LossMeter(run.replicas.processes)
        return targets

    def _decide_if_due(self) -> None:
        if self._due:
            self._decide()

    @without_autocast()
    def _decide(self) -> None:
        controller, step, loss = self._controller, self._step, self._losses.mean()
        self._guard.deciding()
        by_hand = isinstance(self.policy, PlanFile)  # who wrote the plan may shrink trained adapters
        keeps = not by_hand and not self._stay and not controller.decision
        with before_training.learned_kept(self._run, controller, self.journal.note) if keeps else nullcontext():
            observation = controller.observe(step, loss)
            self.decision = decision = self._ask(observation)
            self.journal.note(rounding(self.policy, observation, decision))
            faster = ""
            if self._guard.chooses_layers and not controller.decision:
                faster = before_training.faster_plan(self._guard, controller, self._ask, decision)
            plan = controller.stay() if self._stay else controller.apply(decision, step, self._run.optimizer)
        self._losses.restart()
        self._guard.decided(observation.problem.ranks, step)
        self._record(step, loss, observation, decision, plan)
        if decision.exact and (others := int(np.count_nonzero(plan.ranks != decision.ranks))):
            self.journal.note(
                f"step {step}: {plural(others, 'module')} could not have exactly the rank that was decided, within the "
                "budget, the bounds and how far a rank may move; the nearest plan stands."
            )
        if faster and (again := self._guard.recomputed):
            count = plural(len(again), "layer")
            self.journal.note(f"Gradient checkpointing of {count} takes time and changes no loss. {faster}")

    def _ask(self, observation: Observation) -> Decision:
        return self._run.replicas.processes.on_first(lambda: asked(self.policy, observation))

    def _corrected(self, correction: Correction) -> None:
        """Record a change of ranks by the guard like a decision."""
        self._record(
            correction.step,
            self._losses.mean(),
            correction.observation,
            correction.decision,
            correction.plan,
            correction.notes,
            correction=True,
        )

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
        self._follow_plan()
        self.journal.record(
            self._controller,
            observation,
            decision,
            plan,
            step=step,
            loss=loss,
            peak=self.peaks[-1][1] if self.peaks else None,
            notes=notes,
            rates=self.rates,
            remark=self._guard.remark(),
            correction=correction,
        )
        self._run.replicas.changed(self._controller.targets, step)
