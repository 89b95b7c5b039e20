"""Settings of training and fine-tuning: what the command line shows and what each run's `config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...allocation.schedule import DecisionSchedule
from ...env.tasks.suite_names import SUITES
from ...errors import ConfigError
from ..learned.config import NetworkConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained.

    Attributes:
        iterations: PPO updates; each follows a round of stacks * groups * group episodes.
        stacks: of episodes that train together on one base; each can have a core of its own.
        groups: fresh tasks of each stack.
        group: episodes of each task, whose returns are compared.
        workers: worker processes; 0 for as many as there are cores. Results do not depend on it.
        learning_rate: of PPO at the start; it falls to zero along a line.
        epochs: passes over each iteration's decisions.
        clip_range: PPO's clip on the probability ratio.
        target_kl: an update ends early when the policy has moved so far.
        warm_tasks: fresh tasks of the warm start, which teaches what modules are worth where that is known; 0 for none.
        plan_tasks: fresh tasks of the plan runs after PPO, from which plan critics learn, half of them varied in text,
            place and budget; 0 for none, and the actor decides alone.
        suites: where tasks come from, "planted" and "shift".
        bases: proxy bases of the tasks; all of the training split if none is given.
        task_steps: optimiser steps of an episode; None for as many as the suites' tasks have.
        validation_tasks: tasks of the validation split on which the policy is measured on the way and at the end, at
            most; 0 for none.
        validate_every: iterations between measurements; the best policy is kept.
        schedule: when ranks are decided in an episode.
        network: size and start of the network.
        seed: of everything.
        device: where episodes train; "auto" is CUDA where there is one.

    Raises:
        ConfigError: a value out of range.
    """

    iterations: int = 10
    stacks: int = 2
    groups: int = 3
    group: int = 8
    workers: int = 0
    learning_rate: float = 1e-3
    epochs: int = 6
    clip_range: float = 0.2
    target_kl: float = 0.05
    warm_tasks: int = 0
    plan_tasks: int = 0
    suites: tuple[str, ...] = SUITES
    bases: tuple[str, ...] = ()
    task_steps: int | None = None
    validation_tasks: int = 32
    validate_every: int = 20
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        steps = 1 if self.task_steps is None else self.task_steps
        if (
            min(self.iterations, self.stacks, self.groups, self.epochs, steps, self.validate_every) < 1
            or self.group < 2
        ):
            raise ConfigError(
                "iterations, stacks, groups, epochs, task_steps and validate_every are at least 1 and group at least "
                f"2 (returns are compared inside it); got {self.iterations}, {self.stacks}, {self.groups}, "
                f"{self.epochs}, {self.task_steps}, {self.validate_every} and {self.group}."
            )
        if min(self.workers, self.validation_tasks, self.warm_tasks, self.plan_tasks) < 0 or self.learning_rate <= 0:
            raise ConfigError(
                "workers, validation_tasks, warm_tasks and plan_tasks are at least 0 and learning_rate above 0; got "
                f"{self.workers}, {self.validation_tasks}, {self.warm_tasks}, {self.plan_tasks} and "
                f"{self.learning_rate}."
            )

    @property
    def worker_count(self) -> int:
        """Worker processes that run."""
        from ...common.workers import count_workers  # loads torch

        return count_workers(self.workers)

    @property
    def task_overrides(self) -> dict[str, Any]:
        """Fields that every task gets."""
        return {} if self.task_steps is None else {"steps": self.task_steps}


PRESETS: dict[str, TrainConfig] = {
    "quick": TrainConfig(iterations=8, bases=("llama-4x32",), validation_tasks=6, validate_every=4, learning_rate=3e-3),
    "default": TrainConfig(iterations=80, warm_tasks=960, plan_tasks=600),
    "full": TrainConfig(iterations=100, warm_tasks=960, plan_tasks=1200),
}
"""Presets of `rankpilot train`: a few minutes, an hour and a half, and more than two hours on two cores. More plan runs
make better policies, more rounds of PPO hardly do (docs/experiments.md)."""
