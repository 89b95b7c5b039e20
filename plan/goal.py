"""What a policy aims at: the lowest loss within the budget, or the cheapest plan that loses nothing.

The loss of a plan is measured against plain LoRA, rank 8 on every target module, of the same task, seed and batches, at
its own best learning rate. The difference of log losses is told as a share: 0.01 is 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ConfigError

GoalKind = Literal["quality", "time", "bytes"]
GOALS: tuple[GoalKind, ...] = get_args(GoalKind)

TOLERANCE = 0.01
"""The tolerance where none is given, in log loss."""

CAUTION = 0.5
"""Under quality, a plan is as good as its expected loss and so many standard deviations: what is unsure counts less. On
fine-tunes left out, less caution takes worse plans, and more takes plain LoRA (docs/experiments.md)."""

SURE = 1.8
"""A plan surely ends below its expected loss and so many standard deviations. 19 of 20 plans of models left out do:
their errors have longer tails than a normal distribution, of which 1.64 would be enough."""


@dataclass(frozen=True)
class Goal:
    """What a policy aims at.

    Attributes:
        kind: "quality", the lowest loss within the budget; "time" or "bytes", the plan that takes the least time or the
            fewest bytes at the peak of a step, among those whose loss is surely within the tolerance of plain LoRA.
        tolerance: by how much the log loss may be above that of plain LoRA, 0 to 1: 0.01 is 1 % of the loss. It does
            not count under "quality".

    Raises:
        ConfigError: there is no such goal, or the tolerance is out of range.
    """

    kind: GoalKind = "quality"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.kind not in GOALS:
            raise ConfigError(f"goal is one of {', '.join(GOALS)}; got {self.kind!r}.")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance <= 1:
            raise ConfigError(
                "tolerance, by which the log loss may be above that of rank 8 on all modules, is a number from 0 to 1, "
                f"such as 0.01 for 1 %; got {self.tolerance!r}."
            )

    @property
    def saves(self) -> bool:
        """Whether it asks for a cheap plan."""
        return self.kind != "quality"

    def __str__(self) -> str:
        """The goal in words."""
        if not self.saves:
            return "the lowest loss within the budget"
        cost = {"time": "least time a step", "bytes": "fewest bytes"}[self.kind]
        return (
            f"the {cost}, with a loss that is surely at most {self.tolerance:.2g} (log) above "
            "that of rank 8 on all modules"
        )


def goal_of(goal: str, tolerance: float | None, *, budget_unit: str | None = None) -> Goal:
    """The goal of a run's options.

    Args:
        goal: "quality", "time" or "bytes".
        tolerance: see `Goal`; 1 % by default.
        budget_unit: what the budget counts; None for either unit.

    Raises:
        ConfigError: there is no such goal, the tolerance is out of range, or an option does not go with the goal.
    """
    found = Goal(goal, TOLERANCE if tolerance is None else tolerance)  # type: ignore[arg-type]
    if tolerance is not None and not found.saves:
        raise ConfigError("tolerance counts under goal='time' or goal='bytes' alone: give one, or leave tolerance out.")
    if found.kind == "bytes" and budget_unit == "parameters":
        raise ConfigError(
            "goal='bytes' does not go with a budget of parameters: give a budget of bytes ('24GiB', '80%')."
        )
    return found
