"""Which tasks each stage of training draws.

They follow from the settings alone, so that a run that was interrupted and a study of its plan runs draw the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...allocation.schedule import DecisionSchedule
from ...common.devices import find_device
from ...env.tasks.proxy_task import ProxyTask
from ...env.tasks.suites import evenly, find_tasks
from .config import TrainConfig

WARM_ROUND, PLAN_ROUND = 1_000_000, 2_000_000
"""Tasks of the warm start and of the plan runs are drawn as those of rounds from these on."""


def rounds_of(config: TrainConfig) -> RolloutConfig:
    """What rounds of a training run are drawn from, and where they run.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks, or no such device.
    """
    return RolloutConfig(
        tuple(_tasks((suite,), "train", config) for suite in config.suites),
        config.stacks,
        config.tasks_per_stack,
        config.episodes_per_task,
        config.schedule,
        config.seed,
        config.worker_count,
        str(find_device(config.device)),
    )


def validation_tasks(config: TrainConfig) -> tuple[ProxyTask, ...]:
    """The tasks on which a policy is measured while it trains, spread evenly over the suites.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks.
    """
    return evenly(_tasks(config.suites, "validation", config), config.validation_tasks)


def warm_draws(rounds: RolloutConfig, tasks: int) -> list[ProxyTask]:
    """Fresh tasks of the warm start, so many."""
    numbers = range(WARM_ROUND, WARM_ROUND - (-tasks // rounds.tasks_per_stack))
    return [task for number in numbers for task in rounds.draw(number, 0)][:tasks]


def plan_draws(rounds: RolloutConfig, tasks: int) -> list[tuple[ProxyTask, ...]]:
    """The fresh tasks of each stack of plan runs, in the order in which they are run; at least so many in all.

    The first half are like those of rounds; the second half are the same ones varied, see `vary`.
    """
    numbers = range(PLAN_ROUND, PLAN_ROUND - (-tasks // (2 * rounds.tasks_per_stack)))
    plain = sorted((tuple(rounds.draw(number, 0)) for number in numbers), key=_base)  # bases take long to load
    suites = {(task.kind, task.base): suite for suite in rounds.templates for task in suite}
    return plain + [tuple(vary(task, suites[task.kind, task.base]) for task in drawn) for drawn in plain]


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


def _counts(task: ProxyTask) -> tuple[object, ...]:
    return task.base, task.price, task.priced_rows


FRESH_SEEDS = 10_000_000
"""Seeds of fresh tasks lie above this, those of suites below."""


@dataclass(frozen=True)
class RolloutConfig:
    """What is trained on.

    Attributes:
        templates: tasks by suite; fresh ones differ from one of them in the seed alone. Suites take turns, and what
            budgets count (`ProxyTask.price`) is drawn evenly.
        stacks: how many stacks of episodes a round has, each on one base.
        tasks_per_stack: fresh tasks of each stack.
        episodes_per_task: episodes of each fresh task.
        schedule: when ranks are decided.
        seed: of the tasks.
        workers: processes, at least 1; no more than stacks are of use.
        device: where they train.
    """

    templates: tuple[tuple[ProxyTask, ...], ...]
    stacks: int
    tasks_per_stack: int
    episodes_per_task: int
    schedule: DecisionSchedule
    seed: int = 0
    workers: int = 1
    device: str = "cpu"

    @property
    def worker_count(self) -> int:
        """Processes that run."""
        return min(self.workers, self.stacks)

    def draw(self, round_: int, stack: int) -> list[ProxyTask]:
        """The fresh tasks of a stack, each of which keeps its template's reference, as a measure of headroom."""
        generator = np.random.default_rng([self.seed, round_, stack])
        bases = sorted({task.base for suite in self.templates for task in suite})
        base = bases[int(generator.integers(len(bases)))]
        suites = [own for suite in self.templates if (own := [task for task in suite if task.base == base])]
        tasks = []
        for number in range(self.tasks_per_stack):
            suite = suites[(round_ + stack + number) % len(suites)]
            prices = sorted({task.price for task in suite})
            price = prices[int(generator.integers(len(prices)))]
            alike = [task for task in suite if task.price == price]
            template = alike[int(generator.integers(len(alike)))]
            tasks.append(replace(template, seed=FRESH_SEEDS + int(generator.integers(2**30))))
        return tasks
