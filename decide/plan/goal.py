"""Goals of a policy: the lowest loss within the budget, or the cheapest plan without a loss in quality.

The loss of a plan is relative to plain LoRA, rank 8 on every target module, with the same task, seed and batches, at
its own best learning rate. Differences of log losses are stated as shares: 0.01 is 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...common.errors import ConfigError

GoalKind = Literal["quality", "time", "bytes"]
GOALS: tuple[GoalKind, ...] = get_args(GoalKind)

TOLERANCE = 0.01
"""Default tolerance, in log loss."""

CAUTION = 0.5
"""Standard deviations added to a plan's expected loss under quality, to discount uncertain plans. On held-out
fine-tunes, less caution picks worse plans, and more picks plain LoRA (benchmarks/EXPERIMENTS.md)."""

SURE = 1.8
"""Standard deviations above a plan's expected loss for a sure upper bound. It holds for 19 of 20 plans of held-out
models: their errors have longer tails than a normal distribution, for which 1.64 would suffice."""


@dataclass(frozen=True)
class Goal:
    """Goal of a policy.

    Attributes:
        kind: "quality", the lowest loss within the budget; "time" or "bytes", the plan with the least time or the
            fewest peak bytes per step, among those whose loss is surely within the tolerance of plain LoRA.
        tolerance: maximum excess of the log loss over that of plain LoRA, 0 to 1: 0.01 is 1 % of the loss. Ignored
            under
            "quality".

    Raises:
        ConfigError: there is no such goal, or the tolerance is out of range.
    """

    kind: GoalKind = "quality"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.kind not in GOALS:
            raise ConfigError(f"goal must be one of {', '.join(GOALS)}; got {self.kind!r}.")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance <= 1:
            raise ConfigError(
                "tolerance, the allowed log loss above that of rank 8 on all modules, must be a number from 0 to "
                f"1, such as 0.01 for 1 %; got {self.tolerance!r}."
            )

    @property
    def saves(self) -> bool:
        """True if the goal is a cheap plan."""
        return self.kind != "quality"

    def __str__(self) -> str:
        """Describe the goal in words."""
        if not self.saves:
            return "the lowest loss within the budget"
        cost = {"time": "least time per step", "bytes": "least memory"}[self.kind]
        return (
            f"the {cost}, with a loss very likely at most {self.tolerance:.2g} (log) above "
            "that of rank 8 on all modules"
        )


def goal_of(goal: str, tolerance: float | None, *, budget_unit: str | None = None) -> Goal:
    """Build the goal from a run's options.

    Args:
        goal: "quality", "time" or "bytes".
        tolerance: see `Goal`; 1 % by default.
        budget_unit: unit of the budget; None for either unit.

    Raises:
        ConfigError: there is no such goal, the tolerance is out of range, or an option conflicts with the goal.
    """
    found = Goal(goal, TOLERANCE if tolerance is None else tolerance)  # type: ignore[arg-type]
    if tolerance is not None and not found.saves:
        raise ConfigError("tolerance applies only to goal='time' or goal='bytes'. Set one of them, or drop tolerance.")
    if found.kind == "bytes" and budget_unit == "parameters":
        raise ConfigError("goal='bytes' requires a budget in bytes ('24GiB', '80%'), not in parameters.")
    return found
