"""The learning rate of one run: it follows the plan, and is corrected during the run if requested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..common.errors import ConfigError
from ..decide.plan.rate import InitialLoss
from ..decide.policy import Policy, steers_rate
from ..decide.rate_control import SHORTEST, AlignmentRule, RateControl, decision_steps
from ..decide.rules import AsConfigured
from ..decide.settings import DecisionSchedule
from ..lora.targets import TargetModule
from .controlled_rate import ControlledRate
from .options import PilotOptions
from .plan_rate import PlanRate, chooses_own_rate, rule_knows
from .race import RateRace, middle
from .run_settings import readable_state
from .step.journal import Journal
from .step.run import TrainingRun

CONTROL: RateControl = AlignmentRule()
"""Controls the learning rate."""


class RunRate:
    """The learning rate of one run.

    Args:
        run: the run.
        targets: the target modules of its model.
        policy: decides the ranks, and may steer the rate.
        schedule: optimizer steps before which the policy decides.
        options: options of the run.

    Attributes:
        auto: True if the run starts from the rule's rate.
        steers: True if the policy's decisions change the rate.
        controls: True if the rate is corrected during the run.
        race: races learning rates; None without a race, and before it is prepared.
        of_plan: multiplies the rate by the factor of the plan; None before `begin`.
        control: corrects the rate; None without control.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        policy: Policy,
        schedule: DecisionSchedule,
        options: PilotOptions,
    ) -> None:
        self._run, self._targets, self._schedule = run, targets, schedule
        self.steers: bool = steers_rate(policy)
        in_long_run = options.learning_rate == "auto" and run.total_steps >= SHORTEST
        self.controls: bool = self.steers or (in_long_run if options.control is None else options.control)
        self._rates, self._factors = options.learning_rate, options.raced_factors
        self.auto: bool = self._rates == "auto" or (bool(self._factors) and rule_knows(run))
        self._keep = options.keep_rate or (isinstance(policy, AsConfigured) and not self.auto)
        self.of_plan: PlanRate | None = None
        self.control: ControlledRate | None = None
        self.race: RateRace | None = None

    def begin(self, initial: InitialLoss | None, own: float | None = None) -> None:
        """Make the rate follow the plan until the run ends; see `PlanRate` for the arguments.

        Raises:
            ConfigError: rates cannot race in this run.
        """
        run, races = self._run, self._rates not in (None, "auto")
        unsuited = run.learns_preferences or run.generates or chooses_own_rate(run.optimizer)
        if races and (unsuited or self.steers):
            raise ConfigError(
                f"learning_rate={self._rates!r} compares rates by their training losses. That is not for losses that "
                "compare or generate answers (DPO, GRPO), for optimizers that set their own rate (Prodigy, Adafactor, "
                "schedule-free ones), or for policies that steer the rate. Leave it out, and set the optimizer's rate."
            )
        self.of_plan = PlanRate(
            self._run,
            self._targets,
            auto=self.auto,
            controlled=self.controls,
            keep=self._keep,
            raced=races,
            initial=initial,
            own=own,
        )

    def begin_race(
        self, state: Mapping[str, Any] | None, room: Callable[[], float], seed: int, journal: Journal
    ) -> RateRace | None:
        """Race learning rates, if requested, and return what does so.

        Args:
            state: the state of a resumed run; None for a new one.
            room: returns the bytes of main memory for further lanes.
            seed: seed of new rows, if ranks change meanwhile.
            journal: gets the reports.
        """
        if self._rates in (None, "auto"):
            return None
        run, rate = self._run, self.of_plan
        assert rate is not None, "begin comes first"
        own = self._rates if not isinstance(self._rates, str) else ()
        factors = self._factors or [each / rate.own for each in own]
        reason = "the model is sharded" if run.replicas.sharded else run.whole
        reason = f"{run.total_steps} steps are too few" if run.total_steps < SHORTEST else reason
        if reason:
            rate.move(middle(factors))
            journal.note(f"Learning rates do not race: {reason}. The run trains at {rate.rate:.2g}.")
            return None
        self.race = RateRace(run, self._targets, rate, factors, room(), seed, journal)
        with readable_state():
            self.race.begin(state)
        return self.race

    def begin_control(self, state: Mapping[str, Any] | None, journal: Journal) -> ControlledRate | None:
        """Start correcting the rate during the run, if requested, and return what does so.

        Args:
            state: the state of a resumed run; None for a new one.
            journal: gets a line if the run gives too little evidence.
        """
        if not self.controls:
            return None
        assert self.of_plan is not None, "begin comes first"
        total = self._run.total_steps
        labels = self.of_plan.of_labels and not self.steers
        steps = () if labels else self._schedule.steps(total) if self.steers else decision_steps(total)
        if not steps:
            shows = "steps on labels give" if labels else f"{total} steps give"
            journal.note(f"The learning rate is not controlled: {shows} too little evidence.")
        control = None if self.steers else CONTROL
        self.control = ControlledRate(self._run, self._targets, self.of_plan, control, steps, journal)
        with readable_state():
            self.control.begin(state)
        return self.control
