"""Decision schedules, in a module without heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.checks import is_count, is_real
from ..common.errors import ConfigError, shown

MOST = 10_000
"""Upper bound of a schedule's integers: they come from a policy's card, and it may be untrusted."""

MOST_DECISIONS = 1000
"""Maximum number of decisions per run."""


@dataclass(frozen=True)
class DecisionSchedule:
    """A probe before the run, a first plan at its start, a few changes, and then none.

    Attributes:
        probe_steps: optimizer steps of the probe; short real runs use fewer.
        probe_batch: rows of each probe batch; small enough for any budget.
        fractions: times of the decisions, as increasing shares of the run's steps, the first at 0. After about half of
            the run a change costs more than it gains (benchmarks/EXPERIMENTS.md).
        max_step: maximum rungs per module at a later decision; the first one may use the whole ladder.

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
                f"probe_steps, probe_batch and max_step must be whole numbers from 1 to {MOST:,}; got "
                f"{', '.join(map(shown, counts))}."
            )
        given = shown(self.fractions)
        if not isinstance(self.fractions, tuple | list) or not all(map(is_real, self.fractions)):
            raise ConfigError(f"fractions must be a tuple of shares of the run, such as (0.0, 0.5); got {given}.")
        if len(self.fractions) > MOST_DECISIONS:
            raise ConfigError(f"At most {MOST_DECISIONS} fractions are allowed; got {len(self.fractions)}.")
        rising = all(a < b for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not self.fractions or self.fractions[0] != 0 or not rising or self.fractions[-1] >= 1:
            raise ConfigError(f"fractions must ascend from 0 and stay below 1; got {given}.")

    def steps(self, total_steps: int) -> tuple[int, ...]:
        """Return the optimizer steps before which a decision is taken in a run of `total_steps`, without duplicates."""
        return tuple(sorted({int(fraction * total_steps) for fraction in self.fractions}))

    def reach(self, decision: int) -> int | None:
        """Maximum rungs a module may move at this decision, counted from 0; None for no limit."""
        return None if decision == 0 else self.max_step


ONCE = DecisionSchedule(fractions=(0.0,))
"""One plan, after the probe. All gains of policies came from their first decision (benchmarks/EXPERIMENTS.md)."""


@dataclass
class DecisionClock:
    """The decisions of one run: taken, due, and the times between which signals are measured.

    Attributes:
        schedule: times of the decisions, as shares of the run.
        total_steps: optimizer steps of the run.
        reads: True if the policy reads signals; otherwise none are measured.
        taken: number of decisions taken.
        steps: optimizer steps before which the decisions fall.
    """

    schedule: DecisionSchedule
    total_steps: int
    reads: bool
    taken: int = 0

    def __post_init__(self) -> None:
        self.steps: tuple[int, ...] = self.schedule.steps(self.total_steps)

    @property
    def left(self) -> int:
        """Number of decisions still to take."""
        return max(0, len(self.steps) - self.taken)

    @property
    def measures(self) -> bool:
        """True if signals are measured until the next decision."""
        return self.reads and self.left > 0

    @property
    def will_measure(self) -> bool:
        """True if signals are measured after the next decision; the last one may spend the memory of their buffers."""
        return self.reads and self.left > 1

    @property
    def until(self) -> int:
        """Optimizer step before which the next decision falls, or the end of the run."""
        return self.steps[self.taken] if self.left else self.total_steps

    def due(self, step: int) -> bool:
        """True if the next decision falls before optimizer step `step` (counted from 0)."""
        return self.left > 0 and step >= self.until
