"""When a policy decides, in a module that imports no library."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.checks import is_count, is_real
from ..errors import ConfigError, shown

MOST = 10_000
"""The highest value of a schedule's whole numbers: a policy's card sets them, and it may be a stranger's."""

MOST_DECISIONS = 1000
"""Decisions of a run, at most."""


@dataclass(frozen=True)
class DecisionSchedule:
    """A probe before the run, the first plan at its start, a few changes, and no more changes after them.

    Attributes:
        probe_steps: optimizer steps of the probe; before a short real run it takes fewer.
        probe_batch: rows of each batch of the probe; so few that any budget is enough.
        fractions: when decisions are taken, in rising shares of the run's steps, the first at 0. After about half of
            the run a change gains less than it costs (docs/experiments.md).
        max_step: the most rungs that a module may move at a later decision; the first one may use the whole ladder.

    Raises:
        ConfigError: a value out of range.
    """

    probe_steps: int = 40
    probe_batch: int = 2
    fractions: tuple[float, ...] = (0.0, 0.18, 0.34, 0.5)
    max_step: int = 2

    def __post_init__(self) -> None:
        counts = (self.probe_steps, self.probe_batch, self.max_step)
        if not all(is_count(value) and value <= MOST for value in counts):
            raise ConfigError(
                f"probe_steps, probe_batch and max_step are whole numbers from 1 to {MOST:,}; got "
                f"{', '.join(map(shown, counts))}."
            )
        if not isinstance(self.fractions, tuple | list) or not all(map(is_real, self.fractions)):
            raise ConfigError(
                f"fractions are a tuple of shares of the run, as (0.0, 0.5); got {shown(self.fractions)}."
            )
        if len(self.fractions) > MOST_DECISIONS:
            raise ConfigError(f"fractions are at most {MOST_DECISIONS} in number; got {len(self.fractions)}.")
        rising = all(a < b for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not self.fractions or self.fractions[0] != 0 or not rising or self.fractions[-1] >= 1:
            raise ConfigError(f"fractions rise from 0 and stay below 1; got {shown(self.fractions)}.")

    def steps(self, total_steps: int) -> tuple[int, ...]:
        """The optimizer steps before which a decision is taken in a run of `total_steps`, each once."""
        return tuple(sorted({int(fraction * total_steps) for fraction in self.fractions}))

    def reach(self, decision: int) -> int | None:
        """The most rungs that a module may move at this decision, counted from 0; None for any number."""
        return None if decision == 0 else self.max_step


ONCE = DecisionSchedule(fractions=(0.0,))
"""One plan, after the probe. What policies gained, they gained at their first decision (docs/experiments.md)."""
