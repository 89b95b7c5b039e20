"""Which tasks each stage of training draws.

They follow from the settings alone, so that a run that was interrupted and a study of its trials draw the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..devices import find_device
from ..env.fresh import vary
from ..env.suites import evenly, find_tasks
from ..env.tasks import ProxyTask
from .config import TrainConfig
from .rounds_vec_env import RoundsConfig

WARM_ROUND, TRIAL_ROUND = 1_000_000, 2_000_000
"""Tasks of the warm start and of the trials are drawn as those of rounds from these on."""


def rounds_of(config: TrainConfig) -> RoundsConfig:
    """What rounds of a training run are drawn from, and where they are flown.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks, or no such device.
    """
    return RoundsConfig(
        tuple(_tasks((suite,), "train", config) for suite in config.suites),
        config.stacks,
        config.groups,
        config.group,
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


def warm_draws(rounds: RoundsConfig, tasks: int) -> list[ProxyTask]:
    """Fresh tasks of the warm start, so many."""
    numbers = range(WARM_ROUND, WARM_ROUND - (-tasks // rounds.groups))
    return [task for number in numbers for task in rounds.draw(number, 0)][:tasks]


def trial_draws(rounds: RoundsConfig, tasks: int) -> list[tuple[ProxyTask, ...]]:
    """The fresh tasks of each stack of trials, in the order in which they are flown; at least so many in all.

    The first half are like those of rounds; the second half are the same ones varied, see `vary`.
    """
    numbers = range(TRIAL_ROUND, TRIAL_ROUND - (-tasks // (2 * rounds.groups)))
    plain = sorted((tuple(rounds.draw(number, 0)) for number in numbers), key=_base)  # bases take long to load
    suites = {(task.kind, task.base): suite for suite in rounds.templates for task in suite}
    return plain + [tuple(vary(task, suites[task.kind, task.base]) for task in drawn) for drawn in plain]


def _base(tasks: Sequence[ProxyTask]) -> str:
    return tasks[0].base


def _tasks(suites: Sequence[str], split: str, config: TrainConfig) -> tuple[ProxyTask, ...]:
    """Tasks of a split; with other steps, they keep their references as a measure of headroom."""
    tasks = find_tasks(suites, split, config.bases or None)
    return tuple(replace(task, **config.task_overrides) for task in tasks)
