"""The options of a run, declared once for the Trainer, loops, plans ahead of a run and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..agents.schedule import DecisionSchedule
from ..cost.budget import Budget, TimeBudget
from ..cost.step_config import check_seed
from ..errors import BudgetError, ConfigError, UnknownNameError
from ..lora.spec import Scaling, check_scaling
from ..plan.goal import Goal, GoalKind, goal_of

if TYPE_CHECKING:
    from ..plan.problem import Bounds


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan may take, and what it aims at: the options that the command line has as well.

    Attributes:
        budget: limit that no training step may exceed: "6GiB", "350MB", "80%" of what plain LoRA takes (rank 8 on all
            modules), "auto" for nine tenths of what is free on the device, or "300k params", which counts the adapter's
            parameters alone.
        time: what a step may take in time, beside the budget: "75%" of what plain LoRA takes where no layer runs
            again, or "0.8s". Measured before training.
        recompute: run as few layers again in the backward pass as the plan needs (gradient checkpointing, layer by
            layer): less memory, more time, the same losses. A share is then one of what plain LoRA takes without.
            A policy with networks uses it only where it expects a loss that is lower by more than 1 %.
        goal: quality, the lowest loss within the budget; time or bytes, the cheapest plan whose loss is surely within
            the tolerance of rank 8 on all modules.
        tolerance: by how much the log loss may be higher under goal time or bytes: 0.01, the default, is 1 %.
        explore: draw each plan at this temperature (0.05, say) and log its probability, so that the log can tell what
            other policies would have been worth.

    Raises:
        BudgetError: the budget or the time cannot be read, or the budget counts parameters, of which `recompute` saves
            none.
        ConfigError: a value is out of range, or two options do not go together.
    """

    budget: str | float | Budget = "100%"
    time: str | TimeBudget | None = None
    recompute: bool = False
    goal: GoalKind = "quality"
    tolerance: float | None = None
    explore: float | None = None

    def __post_init__(self) -> None:
        _check_switch("recompute", self.recompute)
        if self.recompute and self.budget_read.kind == "parameters":
            raise BudgetError(
                f"The budget {str(self.budget)!r} counts parameters, and a layer that runs again saves none. Give a "
                "budget of bytes ('6GiB', '80%') or leave `recompute` out."
            )
        _ = self.time_read, self.aim
        explore = self.explore
        if explore is not None and not (isinstance(explore, int | float) and explore > 0):
            raise ConfigError(f"explore is a temperature above 0, such as 0.05; got {explore!r}.")

    @property
    def budget_read(self) -> Budget:
        """The budget, read from what its user wrote."""
        return Budget.parse(self.budget)

    @property
    def time_read(self) -> TimeBudget | None:
        """The limit of a step's time, read from what its user wrote; None without a limit."""
        return None if self.time is None else TimeBudget.parse(self.time)

    @property
    def aim(self) -> Goal:
        """The goal with its tolerance."""
        return goal_of(self.goal, self.tolerance, budget_unit=self.budget_read.unit, recompute=self.recompute)


@dataclass(frozen=True, kw_only=True)
class PilotOptions(PlanOptions):
    """The options of a run, whoever decides its ranks: `attach`, `RankPilot` and `allocate` take them.

    Each takes single options by name as well: `attach(trainer, budget="80%", goal="time")` is
    `attach(trainer, "default", PilotOptions(budget="80%", goal="time"))`.

    Attributes:
        bounds: the rank of single modules, or their least and largest rank, by the module's name or the end of it:
            `{"q_proj": 8, "layers.0.mlp.down_proj": (0, 4)}`.
        schedule: when to decide; by default as the policy was trained to.
        scaling: what stays when a rank changes: "alpha", the model's `lora_alpha`, so that one learning rate fits all
            ranks; or "constant", the factor `lora_alpha / r` that the model begins with (docs/scaling.md).
        fresh: begin with new adapters. By default trained ones are kept, and the first plan resizes them.
        seed: of the probe and of fresh rows; by default `TrainingArguments.seed` under a Trainer, and 0 in a loop.
        measure_every: measure the real peak every so many steps, and after each change of ranks.
        log: the folder of the decision log. By default `decisions` in a Trainer's output folder, and none in a loop.

    Example:
        >>> options = PilotOptions(budget="80%", time="75%", bounds={"q_proj": 8})
    """

    bounds: Bounds | None = None
    schedule: DecisionSchedule | None = None
    scaling: Scaling = "alpha"
    fresh: bool = False
    seed: int | None = None
    measure_every: int = 100
    log: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None and not isinstance(self.schedule, DecisionSchedule):
            raise ConfigError(f"schedule is a rankpilot.DecisionSchedule or None; got {self.schedule!r}.")
        if not isinstance(self.measure_every, int) or self.measure_every < 1:
            raise ConfigError(f"measure_every is a number of steps, at least 1; got {self.measure_every!r}.")
        if self.seed is not None:
            check_seed(self.seed)
        check_scaling(self.scaling)
        _check_switch("fresh", self.fresh)
        if self.bounds is not None and not isinstance(self.bounds, Mapping):
            raise ConfigError(f"bounds are a dictionary from module names to ranks; got {self.bounds!r}.")

    @classmethod
    def of(cls, options: GivenOptions, changes: Mapping[str, Any]) -> PilotOptions:
        """Options, with some of them changed.

        Args:
            options: those that runs share, or a budget alone; None for the defaults.
            changes: other values by the names of options.

        Raises:
            UnknownNameError: there is no such option.
            ConfigError, BudgetError: a value cannot be used.
        """
        names = [each.name for each in fields(cls)]
        for name in changes:
            if name not in names:
                raise UnknownNameError.of("option", name, names)
        if isinstance(options, cls):
            return replace(options, **changes)
        alone: dict[str, Any] = {} if options is None else {"budget": options}
        return cls(**alone | dict(changes))


GivenOptions = PilotOptions | str | float | Budget | None
"""All options, the budget alone, or None for the defaults."""


def _check_switch(name: str, switch: object) -> None:
    if not isinstance(switch, bool):
        raise ConfigError(f"{name} is True or False; got {switch!r}.")
