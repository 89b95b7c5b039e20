"""Suites: fixed sets of tasks, split by base, domain and budget, each with the results of fixed allocations.

| split | bases | texts of shifts | classification |
|---|---|---|---|
| train | Llama and BERT of 4 layers | code, reviews, german, tables | sentiment |
| validation | those; Llama and BERT of 8 layers, width 32 | newsgroups, spanish | newsgroups |
| test | those of train; Llama and BERT of 8 layers, width 64; GPT-2 | five others, see `make_suites` | topics |

No seed, and no text except the planted teachers' (documentation), is in two splits. Learning rates are tuned for the
uniform run of each task, and its result and the oracle's (planted) or full rank's (shift) are kept with it.
`python -m tools.make_suites` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..common.checks import is_real
from ..common.files import read_json
from ..errors import ConfigError, UnknownNameError, first_line, shown
from .bases import PROXY_BASES, find_base
from .proxy_task import FineTune, ProxyTask, Reference
from .suite_names import SPLITS, SUITES

VERSION = 4
"""Rises when a suite's tasks or results change."""

FOLDER = Path(__file__).parent / "suite_cards"

FRESH_SEEDS = 10_000_000
"""Seeds of fresh tasks lie above this, those of suites below."""


@lru_cache(maxsize=len(SUITES) * len(SPLITS))
def load_suite(name: str, split: str) -> tuple[ProxyTask, ...]:
    """The tasks of one split of a suite, each with its `reference`.

    Raises:
        UnknownNameError: no such suite or split.
    """
    if name not in SUITES:
        raise UnknownNameError.of("suite", name, SUITES)
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    return tuple(_task(card) for card in read_json(FOLDER / f"{name}-{split}.json")["tasks"])


def _task(card: dict[str, Any]) -> ProxyTask:
    return ProxyTask(**{**card, "reference": Reference(**card["reference"])})


def find_tasks(
    suites: Sequence[str], split: str, bases: Sequence[str] | None = None, overrides: dict[str, Any] | None = None
) -> tuple[ProxyTask, ...]:
    """The tasks of some suites, in a fixed order.

    Args:
        suites: names of `SUITES`; each counts once.
        split: one of `SPLITS`.
        bases: only those on these proxy bases.
        overrides: fields of `ProxyTask` that each gets; their references are dropped then, and measured when needed.

    Raises:
        UnknownNameError: no such suite, split or base.
        ConfigError: there are none.
    """
    for base in bases or ():
        find_base(base)
    tasks = [
        task for suite in dict.fromkeys(suites) for task in load_suite(suite, split) if not bases or task.base in bases
    ]
    if not tasks:
        raise ConfigError(
            f"No task of the {split} split of {tuple(suites)} is on {tuple(bases or ())}. Suites are {SUITES}; bases "
            f"are {tuple(PROXY_BASES)}, of which each split has some."
        )
    if overrides:
        tasks = _overridden(tasks, overrides)
    return tuple(tasks)


def _overridden(tasks: Sequence[ProxyTask], overrides: dict[str, Any]) -> list[ProxyTask]:
    """The tasks with other fields."""
    if not isinstance(overrides, dict):
        raise ConfigError(f"task_overrides are a dictionary of fields of ProxyTask; got {overrides!r}.")
    names = [field.name for field in fields(ProxyTask)]
    for name in overrides:
        if name not in names:
            raise UnknownNameError.of("field of ProxyTask", str(name), names)
    try:
        return [replace(task, **{"reference": None, **overrides}) for task in tasks]
    except TypeError as error:
        raise ConfigError(f"task_overrides hold a value of a wrong type, {overrides!r}: {first_line(error)}") from error


def evenly(tasks: Sequence[ProxyTask], count: int) -> tuple[ProxyTask, ...]:
    """So many of some tasks, evenly spread over their order; all of them if there are fewer."""
    count = min(count, len(tasks))
    return tuple(tasks[index * len(tasks) // count] for index in range(count))


def check_task(task: object) -> None:
    """Raise ConfigError if it is neither None nor a task of any kind."""
    if task is not None and not isinstance(task, ProxyTask) and not callable(getattr(task, "adapted", None)):
        raise ConfigError(f"task is a ProxyTask or an OwnTask; got {task!r}.")


def fresh_task(template: ProxyTask, generator: np.random.Generator) -> ProxyTask:
    """The template with a seed that no suite has: another teacher, data and adapters.

    It keeps the template's reference, as a measure of how the headroom compares with what uniform gains.
    """
    return replace(template, seed=FRESH_SEEDS + int(generator.integers(2**30)))


class TaskStream:
    """Tasks drawn without end, each as likely as the others.

    Args:
        tasks: to draw from.
        generator: draws.
        fresh_seeds: whether each drawn task gets a fresh seed; only proxy tasks can.
    """

    def __init__(
        self, tasks: Sequence[ProxyTask | FineTune], generator: np.random.Generator, *, fresh_seeds: bool = False
    ) -> None:
        self._tasks, self._generator, self._fresh_seeds = tasks, generator, fresh_seeds

    def take(self, options: Mapping[str, Any] | None = None) -> ProxyTask | FineTune:
        """The task of the next episode.

        Args:
            options: of `reset`: "task" in place of a drawn one; "budget", as a share of what rank 8 on all modules
                takes.

        Raises:
            ConfigError: an unknown option, or a budget that the task cannot have.
        """
        options = options or {}
        unknown = sorted(set(options) - {"task", "budget"})
        if unknown:
            raise ConfigError(f"Options of reset are 'task' and 'budget'; got {unknown}.")
        given = options.get("task")
        check_task(given)
        task: ProxyTask | FineTune = self._draw() if given is None else given
        if "budget" not in options:
            return task
        budget = options["budget"]
        if not is_real(budget):
            raise ConfigError(
                f"The option budget is a share of what rank 8 on all modules takes, such as 0.5; got {shown(budget)}."
            )
        if not isinstance(task, ProxyTask):
            raise ConfigError(f"The option budget is for proxy tasks; give task {task.id} its budget when you make it.")
        return replace(task, budget=float(budget), reference=None)

    def _draw(self) -> ProxyTask | FineTune:
        task = self._tasks[int(self._generator.integers(len(self._tasks)))]
        return fresh_task(task, self._generator) if self._fresh_seeds and isinstance(task, ProxyTask) else task
