"""Which tasks each stage of training draws.

They follow from the settings alone, so that a run that was interrupted draws the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..env.proxy_task import ProxyTask, evenly, find_tasks, fresh_task
from ..errors import ConfigError
from .config import TrainConfig

WARM_ROUND = 1_000_000
"""Tasks of the warm start are drawn as those of rounds from this one on."""


@dataclass(frozen=True)
class FreshTasks:
    """Tasks like those of suites, with seeds of their own.

    Attributes:
        templates: tasks by suite; fresh ones differ from one of them in the seed alone. Suites take turns, and what
            budgets count (`ProxyTask.cost_kind`) is drawn evenly.
        count: tasks of each stack.
        seed: of the draws.
    """

    templates: tuple[tuple[ProxyTask, ...], ...]
    count: int
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of every task.

        Raises:
            ConfigError: tasks have several numbers of steps.
        """
        steps = {task.steps for suite in self.templates for task in suite}
        if len(steps) != 1:
            raise ConfigError(f"All tasks of a rollout have the same number of steps; got {sorted(steps)}.")
        return steps.pop()

    def draw(self, round_: int, stack: int) -> list[ProxyTask]:
        """The tasks of one stack in one round, all on one base."""
        generator = np.random.default_rng([self.seed, round_, stack])
        bases = sorted({task.base for suite in self.templates for task in suite})
        base = bases[int(generator.integers(len(bases)))]
        suites = [on_base for suite in self.templates if (on_base := [task for task in suite if task.base == base])]
        tasks = []
        for place in range(self.count):
            suite = suites[(round_ + stack + place) % len(suites)]
            cost_kinds = sorted({task.cost_kind for task in suite})
            cost_kind = cost_kinds[int(generator.integers(len(cost_kinds)))]
            alike = [task for task in suite if task.cost_kind == cost_kind]
            tasks.append(fresh_task(alike[int(generator.integers(len(alike)))], generator))
        return tasks


def fresh_tasks(config: TrainConfig) -> FreshTasks:
    """What a training run draws its tasks from.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks.
    """
    templates = tuple(_tasks((suite,), "train", config) for suite in dict.fromkeys(config.suites))
    return FreshTasks(templates, config.tasks_per_stack, config.seed)


def validation_tasks(config: TrainConfig) -> tuple[ProxyTask, ...]:
    """The tasks on which a policy is measured while it trains, spread evenly over the suites.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks.
    """
    return evenly(_tasks(config.suites, "validation", config), config.validation_tasks)


def warm_draws(fresh: FreshTasks, tasks: int) -> list[ProxyTask]:
    """Fresh tasks of the warm start, so many."""
    numbers = range(WARM_ROUND, WARM_ROUND - (-tasks // fresh.count))
    return [task for number in numbers for task in fresh.draw(number, 0)][:tasks]


def _tasks(suites: Sequence[str], split: str, config: TrainConfig) -> tuple[ProxyTask, ...]:
    """Tasks of a split; with other steps, they keep their references as a measure of headroom."""
    tasks = find_tasks(suites, split, config.bases or None)
    return tuple(replace(task, **config.task_overrides) for task in tasks)
