"""Settings of `rankpilot evaluate`: which policies are compared, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from ...env.tasks.suite_names import SUITES, Split
from ...errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Which policies are compared, and on what.

    Attributes:
        policies: rules, folders of trained policies, explore-TEMPERATURE:FOLDER, static:LOGS, shuffled:LOGS, or oracle.
        suite: suites that the tasks come from: "planted", "shift" or both.
        split: which part of a suite's tasks.
        bases: use only tasks on these proxy bases; all bases by default.
        tasks: use at most so many tasks, spread evenly over the suites; all of them by default.
        seeds: how often each task is run, each time with another teacher, other data and other adapters.
        task_steps: optimiser steps of a run; by default as many as the suite sets. With another number, the uniform run
            is repeated with it, and the best known allocation counts as unknown: the reward's headroom is then a tenth
            of what the uniform run gained, so that in short runs rewards easily reach their bounds of -3 and 3.
        against: the rule or folder that each policy is compared with, run by run.
        workers: worker processes; 0 for one on each core.

    Raises:
        ConfigError: a value is out of range.
    """

    policies: tuple[str, ...]
    suite: tuple[str, ...] = SUITES
    split: Split = "validation"
    bases: tuple[str, ...] = ()
    tasks: int | None = None
    seeds: int = 1
    task_steps: int | None = None
    against: str = "signal-mean"
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.policies:
            raise ConfigError(
                "Name at least one policy: the folder of a trained one, or a rule. rankpilot evaluate --help lists the "
                "rules."
            )
        if self.tasks is not None and self.tasks < 2:
            raise ConfigError(f"Intervals need at least 2 tasks; got {self.tasks}.")
        steps = 1 if self.task_steps is None else self.task_steps
        if min(self.seeds, steps) < 1 or self.workers < 0:
            raise ConfigError(
                f"seeds and task_steps are at least 1 and workers at least 0; got {self.seeds}, {self.task_steps} and "
                f"{self.workers}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All competitors as given, each once."""
        return tuple(dict.fromkeys((*self.policies, self.against)))
