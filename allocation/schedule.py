"""When ranks are decided: shared by the environment, the Trainer callback and the policy card."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class DecisionSchedule:
    """A probe before the run, the first plan at its start, a few changes, then frozen ranks.

    Attributes:
        probe_steps: optimiser steps of the probe, all modules at rank 1; it reads the signals and is then undone.
        probe_batch: rows of a probe batch, small enough for any budget.
        fractions: when decisions fall, as shares of the run's steps; rises from 0. Later than about half of the run,
            a change is not worth its bump (docs/experiments.md).
        max_step: rungs that a module may move at each decision after the first, which may use the whole ladder.

    Raises:
        ConfigError: a value out of range.
    """

    probe_steps: int = 40
    probe_batch: int = 2
    fractions: tuple[float, ...] = (0.0, 0.18, 0.34, 0.5)
    max_step: int = 2

    def __post_init__(self) -> None:
        if self.probe_steps < 1 or self.probe_batch < 1 or self.max_step < 1:
            raise ConfigError(
                f"probe_steps, probe_batch and max_step are at least 1; got {self.probe_steps}, {self.probe_batch}, "
                f"{self.max_step}."
            )
        rising = all(a < b for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not self.fractions or self.fractions[0] != 0 or not rising or self.fractions[-1] >= 1:
            raise ConfigError(f"fractions rise from 0 and stay below 1; got {self.fractions}.")

    def steps(self, total_steps: int) -> tuple[int, ...]:
        """The optimiser steps before which a decision falls, for a run of `total_steps`; repeated ones merge."""
        return tuple(sorted({int(fraction * total_steps) for fraction in self.fractions}))

    def reach(self, decision: int) -> int | None:
        """How many rungs a module may move at this decision, counted from 0; None for any number."""
        return None if decision == 0 else self.max_step
