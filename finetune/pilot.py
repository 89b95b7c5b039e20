"""What decides the ranks of one fine-tune, between a model, an optimiser and a loss; it knows no Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..agents.policy_file import load_policy, policy_schedule
from ..cost.batch_shape import Batch
from ..cost.budget import Budget, GivenBudget, TimeBudget
from ..decide.applier import PlanApplier
from ..decide.chooser import DEFAULT, with_goal
from ..decide.log import DecisionLog
from ..decide.policy import Decision, Policy, steers_rate
from ..decide.settings import DecisionSchedule
from ..errors import ConfigError
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import resizable_targets
from .journal import Journal
from .options import GivenOptions, PilotOptions
from .peak_guard import PeakGuard
from .piloted_run import PilotedRun
from .plan_rate import check_follows
from .probing import Progress
from .run import TrainingRun, check_run

logger = logging.getLogger(__name__)


class RankPilot:
    """Moves LoRA rank between modules during one fine-tune, inside a hard budget.

    `begin` measures what plans cost on the run's model and data, probes which modules matter if the policy reads that,
    and applies the first plan. Then a loop calls three methods in each optimiser step: `before_step`,
    `before_optimizer_step`, `after_step`. `attach` has them called in the runs of a transformers Trainer.

    Args:
        policy: "default", "agent", which was trained and ships, the folder of a trained policy, a rule's name
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
        seed: of all that the next run draws: the rows of the probe, and fresh adapters.
        times_plans: whether the time of steps is measured, limited or not.
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
        decisions = DecisionLog(Path(options.log)) if options.log else None
        self.journal: Journal = Journal(decisions, self.policy, tell or logger.info)
        self._progress = progress
        self._piloted: PilotedRun | None = None

    # The events of a run, in their order ------------------------------------------------------------------------------

    def begin(self, run: TrainingRun, *, name: str = "") -> None:
        """Measure, probe, and apply the first plan. An earlier run that has no `finish` ends here.

        Args:
            run: what is about to begin.
            name: of the run, for the decision log.

        Raises:
            BudgetError: no plan fits the budget.
            UnsupportedError: the model, the optimiser or the loss cannot be handled, or another thread trains.
            DataError, NonFiniteError: the training set is empty, or the loss is NaN or infinite.
            ProcessError: the first of several processes failed, or they no longer hold the same adapters.
        """
        with _taking_over(self, run) as piloted:
            piloted.begin(self.seed, name=name, times_plans=self.times_plans, progress=self._progress)

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
        with _taking_over(self, run) as piloted:
            piloted.resume(state, step, name=name)

    def before_step(self, *batches: Batch) -> None:
        """Look at the batches of the step that begins, before the model sees them, and measure it if it is due.

        A batch that is larger than all before may shrink the plan, and so does memory that others have taken under a
        budget of "auto". A decision that was put off is made here.

        Raises:
            BudgetError: no plan fits the larger batch or the memory that is left, or that of the decision does not fit.
        """
        _begun(self._piloted).before_step(batches)

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Yield the parts of a batch of this step, and by what the loss of each is multiplied.

        All parts run, forward and backward, one after the other: their gradients, and their losses times these factors,
        add up to those of the batch. Where steps run as a whole, the one part is the batch.

        Args:
            batch: one of those that `before_step` got.

        Raises:
            BudgetError: a row does not fit alone.

        Example:
            >>> for part, share in pilot.parts(batch):  # doctest: +SKIP
            ...     loss = share * model(**part).loss
            ...     loss.backward()
        """
        return self.guard.parts.of(batch)

    def hear_loss(self, loss: torch.Tensor) -> None:
        """Hear of the loss of a part, with its graph, before its backward pass; a Trainer's steps call this.

        Where it is computed in a way that is new in this run, it is tested before the next step whether parts still
        have the gradient of the batch. Without this, a loop is tested before its second step and each hundredth.
        """
        self.guard.parts.hear(loss)

    def before_optimizer_step(self, loss: torch.Tensor | float) -> None:
        """Read the gradients, which are complete now; call before they are cleared.

        Args:
            loss: the mean loss of the step.

        Raises:
            NoGradientError: the adapters receive none.
        """
        _begun(self._piloted).before_optimizer_step(loss)

    def after_step(self, *, decide: bool = True) -> None:
        """Compare the peak with the budget, and decide if a decision is due; call after the optimiser's step.

        Args:
            decide: False puts a decision that is due off to the next step, so that none follows the last one.

        Raises:
            ConfigError: the step had no `before_step`, or no `before_optimizer_step`.
            BudgetError: the step was above the budget, and no plan fits.
            NonFiniteError: what trains is not finite any more, and control of the run cannot undo that.
        """
        piloted = _begun(self._piloted)
        piloted.after_step()
        if decide and piloted.due:
            piloted.decide()

    def take(self, ranks: Mapping[str, int]) -> None:
        """Give the modules these ranks now, by full name, whatever the policy says; it is logged.

        They stand for a decision that is due, and leave the schedule as it is where none is.

        Raises:
            BudgetError: they are above the budget.
            UnknownNameError, ConfigError: see `given_ranks`.
        """
        _begun(self._piloted).take(ranks)

    def set_budget(self, budget: GivenBudget) -> None:
        """Give the run another budget from its next step on, or a function that is asked before each step.

        A lower one checkpoints more layers first, and then shrinks the plan; a higher one gives back what was taken.

        Raises:
            BudgetError, ConfigError: it cannot be read.
        """
        options = replace(self.options, budget=budget)
        if self.applier:
            _begun(self._piloted).elastic.give(budget, self.applier)
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
        error = error or torch.OutOfMemoryError("A training step ran out of memory.")
        self.guard.out_of_memory(error)

    def finish(self) -> None:
        """Stop measuring, checkpoint the layers of before, and write the ranks to PEFT's configuration for saving.

        Raises:
            ProcessError: the processes do not hold the same adapters.
            NonFiniteError: what was trained is not finite.
        """
        if self._piloted:
            self._piloted.finish(checks=True)

    def break_off(self, *, as_found: bool = False) -> None:
        """As `finish`, after an error: other processes are not heard, and what the step has changed is put back.

        Args:
            as_found: undo the first plan as well if no step has passed under it, since the run begins again.
        """
        if self._piloted:
            self._piloted.break_off(as_found=as_found)

    def state_dict(self) -> dict[str, Any]:
        """All that `resume` needs beside adapters and optimiser: dictionaries of tensors, arrays and JSON values.

        All processes call this.

        Raises:
            ProcessError: the processes do not hold the same adapters.
            NonFiniteError: what trains is not finite, so that no checkpoint is to hold it.
        """
        return _begun(self._piloted).state()

    # What can be read while the run lasts -----------------------------------------------------------------------------

    @property
    def applier(self) -> PlanApplier[PeftAdapters] | None:
        """Observes the adapters and changes their ranks; None before `begin`."""
        return self._piloted.applier if self._piloted and self._piloted.begun else None

    @property
    def decision(self) -> Decision | None:
        """The policy's latest decision; None before `begin`."""
        return self._piloted.decision if self._piloted else None

    @property
    def predictions(self) -> list[tuple[int, float]]:
        """(step, cost of the plan) of each decision and correction."""
        return self.journal.predictions

    @property
    def peaks(self) -> list[tuple[int, int]]:
        """(step, bytes at its peak) of each measured step; the highest of all processes."""
        return self._piloted.guard.meter.history if self._piloted else []

    @property
    def checks(self) -> list[tuple[int, float, int]]:
        """(step, predicted bytes, measured bytes) of the first measured step after each change of ranks."""
        return self._piloted.guard.checks if self._piloted else []

    @property
    def limit(self) -> float:
        """What a plan may cost, in bytes or parameters. It is known from `begin` on."""
        return float(_begun(self._piloted).applier.limit)

    @property
    def rate_factor(self) -> float:
        """By what the optimizer's learning rate is multiplied in each step; see `PlanRate`."""
        return self._piloted.rate.factor if self._piloted and self._piloted.rate else 1.0

    @property
    def rates(self) -> tuple[float, float] | None:
        """The peak of the learning rate for plain LoRA, and under the plan; None before `begin`."""
        return self._piloted.rate.rates if self._piloted and self._piloted.rate else None

    def aside(self) -> AbstractContextManager[None]:
        """Let what runs inside the block be no part of a step, as where the model writes what it learns from."""
        return self.guard.aside()

    @property
    def guard(self) -> PeakGuard:
        """Watches what the run's steps and evaluations take, and runs them in parts; it is there from `begin` on."""
        return _begun(self._piloted).guard

    def figures(self) -> dict[str, float]:
        """What a training log shows of the ranks: mean rank, adapted modules, cost of the plan and limit.

        The highest peak is among them if a step was measured since the last call, and after a step its learning rate.
        """
        piloted = _begun(self._piloted)
        fresh, piloted.shown = self.peaks[piloted.shown :], len(self.peaks)
        applier, keeper, predictions = piloted.applier, piloted.guard.plan, self.predictions
        ranks, unit = applier.ranks, applier.cost.unit
        figures = {
            "rank_mean": float(ranks.mean()),
            "rank_modules": float((ranks > 0).sum()),
            f"plan_{unit}": predictions[-1][1],
            f"budget_{unit}": float(applier.limit),
            "rank_decisions": float(len(predictions)),
        }
        if keeper.checkpointing:
            figures["checkpointed_layers"] = float(len(keeper.checkpointed))
        if applier.time:
            figures["plan_seconds"] = applier.time.of(ranks)
            if applier.time.beside is None:
                figures["budget_seconds"] = applier.time.seconds
        figures |= piloted.guard.parts.figures()
        if piloted.rate and piloted.rate.last is not None:
            figures["learning_rate"] = float(piloted.rate.last)
        if fresh:
            figures["peak_bytes"] = float(max(peak for _, peak in fresh))
        return figures


@contextmanager
def _taking_over(pilot: RankPilot, run: TrainingRun) -> Iterator[PilotedRun]:
    """Begin a run in the place of an earlier one, which ends if it did not; after an error inside, end it."""
    targets = resizable_targets(run.model, pilot.options.scaling)
    check_run(run, targets)
    if pilot.options.control:
        check_follows(run.optimizer, "control=True", "Leave control out.")
    if steers_rate(pilot.policy):
        check_follows(run.optimizer, f"policy {pilot.policy.name!r}", f"Pass another, such as {DEFAULT!r}.")
    if pilot._piloted:
        pilot._piloted.stop()
    pilot._piloted = piloted = PilotedRun(run, targets, pilot.journal, pilot.policy, pilot.schedule, pilot.options)
    pilot.budget = piloted.elastic.budget
    try:
        yield piloted
    except BaseException:
        piloted.stop()
        raise


def _begun(piloted: PilotedRun | None) -> PilotedRun:
    """The run of a pilot, once it has begun.

    Raises:
        ConfigError: it has not.
    """
    if piloted is None or not piloted.begun:
        raise ConfigError("The run has not begun: call `begin` first, or `rankpilot.load_checkpoint`.")
    return piloted
