"""The best allocation of a planted task, and the least loss of any other.

Two measures without training:

* *utility* of a rank on a module: how much the teacher's divergence falls if the module's change is undone, times the
  share of the change that the rank captures. Utilities add up nearly, so `best_plan` finds the oracle's plan;
* *attainable loss* of a plan: divergence of the base plus the best approximation of each change at its rank.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ...allocation.optimum import best_plan
from ...allocation.problem import AllocationProblem
from ...common.arrays import FloatArray, IntArray
from ...errors import ConfigError
from ..proxies.adapted import adapted_base
from .proxy_finetune import CACHED_TASKS, Change, changed_weights, load_task
from .proxy_task import ProxyTask


def oracle_plan(task: ProxyTask, problem: AllocationProblem) -> IntArray:
    """The ranks that capture most of what was planted within the budget, (modules,).

    Args:
        task: a planted one.
        problem: prices, budget and ladder; current ranks play no part.

    Raises:
        ConfigError: the task has no teacher.
    """
    return best_plan(problem, utilities(task, problem))


def utilities(task: ProxyTask, problem: AllocationProblem) -> FloatArray:
    """What each rung of the ladder is worth on each module, in nats, (modules, rungs)."""
    _, targets = adapted_base(task.base)
    order = {target.name: index for index, target in enumerate(targets)}
    worth = np.zeros((len(targets), len(problem.ladder.ranks)))
    for change, loss in zip(_changes(task), _worth(task), strict=True):
        captured = np.concatenate([[0.0], np.cumsum(change.energy)])
        ranks = np.minimum(problem.ladder.array, len(captured) - 1)
        worth[order[change.name]] = loss * captured[ranks]
    return worth


def attainable_loss(task: ProxyTask, ranks: IntArray) -> float:
    """The least divergence from the teacher that these ranks allow, nearly, in nats.

    Args:
        task: a planted one.
        ranks: int64 (modules,).
    """
    names = [target.name for target in adapted_base(task.base)[1]]
    by_name = dict(zip(names, ranks.tolist(), strict=True))
    return _loss(task, [by_name[change.name] for change in _changes(task)])


@lru_cache(maxsize=CACHED_TASKS)
def _worth(task: ProxyTask) -> list[float]:
    """The divergence of the teacher from itself without each of its changes, in nats."""
    ranks = [change.left.shape[1] for change in _changes(task)]
    return [max(_loss(task, [*ranks[:index], 0, *ranks[index + 1 :]]), 0.0) for index in range(len(ranks))]


def _changes(task: ProxyTask) -> tuple[Change, ...]:
    if task.kind != "planted":
        raise ConfigError(f"Task {task.id} has no teacher, so its best allocation is not known.")
    return load_task(task).changes


@torch.no_grad()
def _loss(task: ProxyTask, ranks: list[int]) -> float:
    """Divergence of the base with each change at some rank from the teacher, in nats."""
    data = load_task(task)
    model, targets = adapted_base(task.base)
    with changed_weights(targets, data.changes, ranks), model.disable_adapter():
        return data.held_out_loss(model)
