"""Rank decisions for one fine-tune, given its model, optimizer and loss; independent of any Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..agents.policy_file import load_policy, policy_schedule
from ..common.errors import ConfigError
from ..cost.batch_shape import Batch
from ..cost.budget import Budget, GivenBudget
from ..decide.applier import PlanApplier
from ..decide.chooser import DEFAULT, with_goal
from ..decide.log import DecisionLog
from ..decide.policy import Decision, Policy, steers_rate
from ..decide.rules import AsConfigured
from ..decide.settings import DecisionSchedule
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import resizable_targets
from .options import GivenOptions, PilotOptions
from .piloted_run import PilotedRun
from .plan_rate import check_follows
from .probing import Progress
from .step.journal import Journal
from .step.peak_guard import PeakGuard
from .step.run import TrainingRun, check_run

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RankPilot:
    """Plans one fine-tune, and keeps it inside a hard budget of memory.

    `begin` measures the cost of plans on the run's model and data, probes which modules matter if the policy uses that,
    and applies the first plan: by default the ranks of the LoraConfig, made to fit. A loop then calls three methods per
    optimizer step: `before_step`, `before_optimizer_step`, `after_step`. `attach` arranges these calls in a
    transformers Trainer.

    Args:
        policy: None keeps the ranks of the LoraConfig as long as a step with them can be made to fit, unless an
            option asks for other ranks (`goal`, `tolerance`, `bounds`, `schedule`, `fresh`). "default" chooses
            the best plan; "agent" is trained, and shipped with rankpilot; or the folder of a trained policy, a rule's
            name ("signal-mean", "top-down"), a plan edited by hand ("plan.yaml"), or a policy object.
        options: all options, or the budget alone.
        tell: called with a line for each decision and correction; defaults to this module's logger.
        progress: shows the progress of the probe.
        changes: single options by name; see `PilotOptions`.

    Attributes:
        options: as above, with the changes.
        budget: maximum cost of a plan.
        policy: decides the ranks.
        schedule: when it does.
        seed: seed of the next run: of the rows of the probe, and of fresh adapters.
        journal: records the decisions.

    Raises:
        ConfigError, UnknownNameError, PolicyFileError, BudgetError: an argument is invalid.
    """

    def __init__(
        self,
        policy: str | Path | Policy | None = None,
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
        if policy is None:
            policy = DEFAULT if options.asks_for_ranks else AsConfigured()
        self.policy: Policy = with_goal(load_policy(policy), aim)
        self.schedule: DecisionSchedule = options.schedule or policy_schedule(policy)
        self.budget: Budget = options.budget_read
        decisions = DecisionLog(Path(options.log)) if options.log else None
        self.journal: Journal = Journal(decisions, self.policy, tell or logger.info)
        self._progress = progress
        self._piloted: PilotedRun | None = None

    # The events of a run, in order ------------------------------------------------------------------------------------

    def begin(self, run: TrainingRun, *, name: str = "") -> None:
        """Measure, probe, and apply the first plan. An earlier run without a `finish` ends here.

        Args:
            run: the run about to begin.
            name: its name in the decision log.

        Raises:
            BudgetError: no plan fits the budget.
            UnsupportedError: the model, the optimizer or the loss is not supported, or another thread is training.
            DataError, NonFiniteError: the training set is empty, or the loss is NaN or infinite.
            ProcessError: the first of several processes failed, or their adapters differ.
        """
        with _taking_over(self, run) as piloted:
            piloted.begin(self.seed, name=name, progress=self._progress)

    def load_state_dict(self, run: TrainingRun, state: Mapping[str, Any], *, name: str = "") -> int:
        """Continue a run instead of `begin`. A changed budget applies at once.

        Args:
            run: the run, whose model and optimizer have loaded what was saved with the state.
            state: the return value of `state_dict`.
            name: the run's name in the decision log.

        Returns:
            The number of optimizer steps done.

        Raises:
            RunFolderError: policy, schedule, bounds or the model's adapters differ from the saved ones.
            BudgetError: no plan fits the changed budget.

        Example:
            >>> saved = torch.load("checkpoint.pt")  # doctest: +SKIP
            >>> set_peft_model_state_dict(model, saved["adapter"])  # doctest: +SKIP
            >>> optimizer.load_state_dict(saved["optimizer"])  # doctest: +SKIP
            >>> done = pilot.load_state_dict(run, saved["pilot"])  # doctest: +SKIP
        """
        with _taking_over(self, run) as piloted:
            piloted.resume(state, name=name)
        return piloted.step

    def before_step(self, *batches: Batch) -> None:
        """Inspect the batches of the next step before the model sees them, and measure the step if due.

        A batch larger than all earlier ones may shrink the plan, as may memory taken by other programs under a budget
        of "auto". A postponed decision is made here.

        Raises:
            BudgetError: no plan fits the larger batch or the memory left, or the decided plan does not fit.
        """
        _begun(self._piloted).before_step(batches)

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Yield the parts of a batch of this step, each with the factor of its loss.

        Run all parts, forward and backward, one after another: their gradients, and their losses times these factors,
        add up to those of the batch. If steps run whole, the only part is the batch.

        Args:
            batch: one of the batches passed to `before_step`.

        Raises:
            BudgetError: a row does not fit alone.

        Example:
            >>> for part, share in pilot.parts(batch):  # doctest: +SKIP
            ...     loss = share * model(**part).loss
            ...     loss.backward()
        """
        return self.guard.parts.of(batch)

    def lanes(self, batch: T, scaler: Any = None) -> Iterator[T]:
        """Yield what to train on for each learning rate of a race, with its copy of adapters and optimizer in place.

        Run the whole optimizer step each time, from the forward pass to `optimizer.zero_grad()`, but the scheduler once
        after all. Each copy trains as it would alone, with the same random numbers; one that is called late gets all
        earlier batches first. The turn of the run itself comes last, and is the only one without a race.

        Args:
            batch: the batch of the step, or all of its batches.
            scaler: the loop's loss scaler, such as torch.amp.GradScaler, of which each copy keeps a state.

        Example:
            >>> for inputs in pilot.lanes(batch):  # doctest: +SKIP
            ...     loss = model(**inputs).loss
            ...     loss.backward()
            ...     pilot.before_optimizer_step(loss)
            ...     optimizer.step()
            ...     optimizer.zero_grad()
        """
        return _begun(self._piloted).turns(batch, scaler)

    def before_optimizer_step(self, loss: torch.Tensor | float) -> None:
        """Read the gradients, which are now complete; call before they are cleared.

        Args:
            loss: the mean loss of the step.

        Raises:
            NoGradientError: the adapters receive none.
        """
        _begun(self._piloted).before_optimizer_step(loss)

    def after_step(self, *, decide: bool = True) -> None:
        """Compare the peak with the budget, and decide if a decision is due; call after the optimizer step.

        Args:
            decide: False postpones a due decision to the next step, so that none follows the last step.

        Raises:
            BudgetError: the step exceeded the budget, and no plan fits.
            NonFiniteError: a trained tensor is no longer finite, and control of the run cannot undo that.
        """
        piloted = _begun(self._piloted)
        piloted.after_step()
        if decide and piloted.due:
            piloted.decide()

    def take(self, ranks: Mapping[str, int]) -> None:
        """Set the ranks of modules now, by full name, regardless of the policy; logged.

        This replaces a due decision, and otherwise leaves the schedule unchanged.

        Raises:
            BudgetError: the ranks exceed the budget.
            UnknownNameError, ConfigError: see `given_ranks`.
        """
        _begun(self._piloted).take(ranks)

    def set_budget(self, budget: GivenBudget) -> None:
        """Set another budget from the next step on, or a function called before each step.

        A lower budget first checkpoints more layers, then shrinks the plan; a higher one reverses this.

        Raises:
            BudgetError, ConfigError: it cannot be parsed.
        """
        options = replace(self.options, budget=budget)
        if self.applier:
            _begun(self._piloted).elastic.give(budget, self.applier)
        self.options, self.budget = options, options.budget_read

    def out_of_memory(self, error: torch.OutOfMemoryError | None = None) -> None:
        """Shrink the plan after a step ran out of memory; then repeat the step from its first batch.

        Gradients are cleared. If the repeated step passes, the lost rank comes back after some good steps.

        Args:
            error: the error of the step.

        Raises:
            torch.OutOfMemoryError: this error, or a new one. Smaller plans do not help; ranks, adapters, optimizer and
                decision log are restored to their state before the step.
            BudgetError: other processes are in the middle of the step.
        """
        error = error or torch.OutOfMemoryError("A training step ran out of memory.")
        _begun(self._piloted).out_of_memory(error)

    def finish(self) -> None:
        """Stop measuring, restore the original checkpointing, and write the ranks to PEFT's configuration for saving.

        Raises:
            ProcessError: the processes' adapters differ.
            NonFiniteError: a trained tensor is not finite.
        """
        if self._piloted:
            self._piloted.finish(checks=True)

    def break_off(self, *, as_found: bool = False) -> None:
        """Like `finish`, after an error: without contacting other processes, and undoing the changes of the step.

        Args:
            as_found: also undo the first plan if no step has passed under it, since the run starts over.
        """
        if self._piloted:
            self._piloted.break_off(as_found=as_found)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`: nested dictionaries of tensors and JSON values, as for `torch.save`.

        Save the model's adapters and the optimizer with it. All processes must call this.

        Raises:
            ProcessError: the processes' adapters differ.
            NonFiniteError: a trained tensor is not finite, and must not enter a checkpoint.
        """
        return _begun(self._piloted).state()

    # Properties that can be read during the run -----------------------------------------------------------------------

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
        """(step, peak bytes) of each measured step; the maximum over all processes."""
        return self._piloted.guard.meter.history if self._piloted else []

    @property
    def checks(self) -> list[tuple[int, float, int]]:
        """(step, predicted bytes, measured bytes) of the first measured step after each change of ranks."""
        return self._piloted.guard.checks if self._piloted else []

    @property
    def limit(self) -> float:
        """Maximum cost of a plan, in bytes or parameters. Known once `begin` has run."""
        return float(_begun(self._piloted).applier.limit)

    @property
    def beside(self) -> bool:
        """True in the turn of a learning rate other than that of the run itself; see `lanes`."""
        race = self._piloted.rate.race if self._piloted else None
        return race is not None and race.beside

    @property
    def rates(self) -> tuple[float, float] | None:
        """Peak learning rate for plain LoRA, and under the plan; None before `begin`."""
        return self._piloted.rate.of_plan.rates if self._piloted and self._piloted.rate.of_plan else None

    @property
    def guard(self) -> PeakGuard:
        """Watches the memory of the run's steps and evaluations, and runs them in parts; available after `begin`."""
        return _begun(self._piloted).guard

    def figures(self) -> dict[str, float]:
        """Return figures on the ranks for a training log: mean rank, adapted modules, cost of the plan and limit.

        They include the highest peak if a step was measured since the last call, and after a step its learning rate.
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
            figures["plan_time"] = float(applier.time(ranks) / applier.time(applier.reference))
        figures |= piloted.guard.parts.figures()
        rate = piloted.rate.of_plan
        if rate and rate.last is not None and rate.changes:  # otherwise the trainer logs its own
            figures["learning_rate"] = float(rate.last)
        if fresh:
            figures["peak_bytes"] = float(max(peak for _, peak in fresh))
        return figures


@contextmanager
def _taking_over(pilot: RankPilot, run: TrainingRun) -> Iterator[PilotedRun]:
    """Begin a run in place of an earlier one, which ends if still active; end the new run after an error inside."""
    targets = resizable_targets(run.model, pilot.options.scaling)
    check_run(run, targets)
    if pilot.options.control:
        check_follows(run.optimizer, "control=True", "Drop control.")
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
    """Return the run of a pilot.

    Raises:
        ConfigError: it has not begun.
    """
    if piloted is None or not piloted.begun:
        raise ConfigError("The run has not begun. Call `begin` or `load_state_dict` first.")
    return piloted
