"""Which task each episode of an environment has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...common.given_numbers import is_real
from ...errors import ConfigError, shown
from .finetune import FineTune
from .proxy_task import ProxyTask

FRESH_SEEDS = 10_000_000
"""Seeds of fresh tasks lie above this, those of suites below."""


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
