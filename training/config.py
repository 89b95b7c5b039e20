"""Settings of `rankpilot policy train`, with its presets, and of `rankpilot policy evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..cost.step_config import check_seed
from ..data.task import SUITES, Split
from ..decide.settings import ONCE, DecisionSchedule, NetworkConfig
from ..errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Which policies are compared, and on what.

    Attributes:
        policies: default, rules, folders of trained policies, or oracle.
        suite: suites that the tasks come from: "planted", "shift" or both.
        split: which part of a suite's tasks.
        bases: use only tasks on these proxy bases; all bases by default.
        tasks: use at most so many tasks, spread evenly over the suites; all of them by default.
        seeds: how often each task is run, each time with another teacher, other data and other adapters.
        task_steps: optimizer steps of a run; by default as many as the suite sets. With another number, the uniform run
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
                "Name at least one policy: the folder of a trained one, or a rule. rankpilot policy evaluate --help "
                "lists the rules."
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


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained.

    Attributes:
        iterations: PPO updates, each on stacks x tasks_per_stack x episodes_per_task new episodes.
        stacks: groups of episodes that train together on one base; each can use a core of its own.
        tasks_per_stack: fresh tasks of each stack.
        episodes_per_task: episodes of each task; PPO compares their returns with one another.
        workers: worker processes; 0 for one on each core. Results do not depend on it.
        learning_rate: PPO's learning rate at the start; it falls to zero along a straight line.
        epochs: passes over the decisions of each iteration.
        clip_range: how far PPO may change the probability of an action at once, as a share of it.
        target_kl: an update ends early when the policy has moved this far from the one that acted.
        warm_tasks: fresh tasks of the warm start, which teaches what modules are worth where that is known; 0 for no
            warm start.
        suites: suites that the tasks come from: "planted", "shift" or both.
        bases: use only tasks on these proxy bases; by default all bases of the training split.
        task_steps: optimizer steps of an episode; by default as many as the suite sets.
        validation_tasks: at most so many tasks of the validation split, on which the policy is measured during training
            and after it; 0 for none.
        validate_every: iterations from one of these measurements to the next; the best policy is kept.
        schedule: when ranks are decided in an episode, and by default in the runs of the policy: once, before step 0.
        network: size of the policy network, and where it starts.
        seed: seed of all random numbers.
        device: where episodes train; "auto" is CUDA where there is one.

    Raises:
        ConfigError: a value is out of range.
    """

    iterations: int = 10
    stacks: int = 2
    tasks_per_stack: int = 3
    episodes_per_task: int = 8
    workers: int = 0
    learning_rate: float = 1e-3
    epochs: int = 6
    clip_range: float = 0.2
    target_kl: float = 0.05
    warm_tasks: int = 0
    suites: tuple[str, ...] = SUITES
    bases: tuple[str, ...] = ()
    task_steps: int | None = None
    validation_tasks: int = 32
    validate_every: int = 20
    schedule: DecisionSchedule = ONCE
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        steps = 1 if self.task_steps is None else self.task_steps
        counts = (self.iterations, self.stacks, self.tasks_per_stack, self.epochs, steps, self.validate_every)
        if min(counts) < 1 or self.episodes_per_task < 2:
            raise ConfigError(
                "iterations, stacks, tasks_per_stack, epochs, task_steps and validate_every are at least 1, and "
                "episodes_per_task at least 2 (their returns are compared with one another); got "
                f"{', '.join(map(str, counts))} and {self.episodes_per_task}."
            )
        if min(self.workers, self.validation_tasks, self.warm_tasks) < 0:
            raise ConfigError(
                "workers, validation_tasks and warm_tasks are at least 0; got "
                f"{self.workers}, {self.validation_tasks} and {self.warm_tasks}."
            )
        rates = (self.learning_rate, self.clip_range, self.target_kl)
        if not all(0 < rate < math.inf for rate in rates):
            raise ConfigError(f"learning_rate, clip_range and target_kl are above 0; got {', '.join(map(str, rates))}.")
        check_seed(self.seed)

    @property
    def worker_count(self) -> int:
        """Worker processes that run."""
        from ..common.workers import count_workers

        return count_workers(self.workers)

    @property
    def task_overrides(self) -> dict[str, Any]:
        """Fields that every task gets."""
        return {} if self.task_steps is None else {"steps": self.task_steps}


PRESETS: dict[str, TrainConfig] = {
    "quick": TrainConfig(iterations=8, bases=("llama-4x32",), validation_tasks=6, validate_every=4, learning_rate=3e-3),
    "default": TrainConfig(iterations=80, warm_tasks=960),
    "full": TrainConfig(iterations=200, warm_tasks=960),
}
"""Presets of `rankpilot policy train`: minutes on two cores, and ten and 25 times as many rounds after a warm start."""
