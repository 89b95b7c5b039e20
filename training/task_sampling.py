"""Which tasks each stage of training draws.

They follow from the settings alone, so that a run that was interrupted and a study of its plan runs draw the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..env.proxy_finetune import first_problem
from ..env.proxy_task import ProxyTask, evenly, find_tasks, fresh_task
from ..errors import ConfigError
from ..plan.plan import uniform_ranks
from .config import TrainConfig

OFF = (-0.75, 0.75)
"""How far the learning rate of plan runs lies from the best one of plain LoRA, in powers of 2."""

WARM_ROUND, PLAN_ROUND = 1_000_000, 2_000_000
"""Tasks of the warm start and of the plan runs are drawn as those of rounds from these on."""


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
        """Optimiser steps of every task.

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


def plan_draws(fresh: FreshTasks, tasks: int) -> list[tuple[ProxyTask, ...]]:
    """The fresh tasks of each stack of plan runs, in the order in which they are run; at least so many in all.

    The first half are like those of PPO; the second half are the same ones varied, see `vary` and `vary_length`. All
    have a learning rate for plain LoRA, see `for_plain_lora`.
    """
    numbers = range(PLAN_ROUND, PLAN_ROUND - (-tasks // (2 * fresh.count)))
    plain = sorted((tuple(fresh.draw(number, 0)) for number in numbers), key=_base)  # bases take long to load
    suites = {(task.kind, task.base): suite for suite in fresh.templates for task in suite}
    varied = [[vary(task, suites[task.kind, task.base]) for task in drawn] for drawn in plain]
    return [tuple(map(for_plain_lora, drawn)) for drawn in (*plain, *map(vary_length, varied))]


def _base(tasks: Sequence[ProxyTask]) -> str:
    return tasks[0].base


def _tasks(suites: Sequence[str], split: str, config: TrainConfig) -> tuple[ProxyTask, ...]:
    """Tasks of a split; with other steps, they keep their references as a measure of headroom."""
    tasks = find_tasks(suites, split, config.bases or None)
    return tuple(replace(task, **config.task_overrides) for task in tasks)


def vary(task: ProxyTask, suite: Sequence[ProxyTask]) -> ProxyTask:
    """A task like some of its suite, but none of them: drawn by its seed, without a reference.

    What is learned (the text, or what a planted teacher has changed) is that of any task of the suite, and the
    budget lies between two on the same base that count the same; the learning rate is that of the nearest one.

    Args:
        task: on one of the suite's bases, at a budget of theirs.
        suite: what it is varied with.
    """
    generator = np.random.default_rng(task.seed)
    places = sorted({(other.kind, other.placement, other.corpus) for other in suite})
    kind, placement, corpus = places[int(generator.integers(len(places)))]
    alike = [other for other in suite if _counts(other) == _counts(task)]
    level = float(generator.uniform())
    budget = task.budget * (alike[int(generator.integers(len(alike)))].budget / task.budget) ** level
    nearest = min(
        (other for other in alike if other.kind == kind),
        key=lambda other: abs(np.log(other.budget / budget)),
        default=task,
    )
    return replace(
        task,
        kind=kind,
        placement=placement,
        corpus=corpus,
        budget=float(f"{budget:.3g}"),
        learning_rate=nearest.learning_rate,
        reference=None,
    )


def vary_length(tasks: Sequence[ProxyTask]) -> list[ProxyTask]:
    """The same tasks of one stack with half as many steps, as many or twice as many, and rows likewise.

    A step whose bytes are counted at more rows keeps those, as long as they are more.

    Args:
        tasks: of one stack, which shares its number of steps and of rows; the first one's seed decides both.
    """
    generator = np.random.default_rng([tasks[0].seed, 1])
    longer, wider = (float(generator.choice([0.5, 1.0, 2.0])) for _ in range(2))
    return [
        replace(task, steps=max(1, round(longer * task.steps)), batch_size=rows, priced_rows=_more(task, rows))
        for task in tasks
        for rows in [max(1, round(wider * task.batch_size))]
    ]


def for_plain_lora(task: ProxyTask) -> ProxyTask:
    """The task at a learning rate near the best one of rank 8 on all modules, as people tune it; drawn by its seed.

    Those of suites are tuned for uniform rank under the task's budget. The fewer modules are adapted, the higher is the
    best rate: as the inverse root of their share (docs/scaling.md). Where the budget leaves uniform rank no
    module, it counts as one.
    """
    adapted = uniform_ranks(first_problem(task)) > 0
    share = max(float(adapted.mean()), 1 / len(adapted))
    factor = 2.0 ** float(np.random.default_rng([task.seed, 2]).uniform(*OFF))
    return replace(task, learning_rate=float(f"{task.learning_rate * share**0.5 * factor:.3g}"))


def _more(task: ProxyTask, rows: int) -> int | None:
    return task.priced_rows if task.priced_rows and task.priced_rows > rows else None


def _counts(task: ProxyTask) -> tuple[object, ...]:
    return task.base, task.cost_kind, task.priced_rows
