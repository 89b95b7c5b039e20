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

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...common.files import read_json
from ...errors import ConfigError, UnknownNameError, first_line
from ..proxies.bases import PROXY_BASES, find_base
from .finetune import Reference
from .proxy_task import ProxyTask
from .suite_names import SPLITS, SUITES

VERSION = 4
"""Rises when a suite's tasks or results change."""

FOLDER = Path(__file__).parent / "suite_cards"


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
