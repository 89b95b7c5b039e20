"""Compare policies on the same fine-tunes: same tasks, seeds, batches and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.statistics import Estimate, estimate
from ..decide.groups import STEERING
from ..decide.policy import Policy
from ..decide.rules import FixedPlan
from .fine_tune import FAILED
from .stack.episodes import StackedEpisodes
from .task_data import first_problem, oracle_plan
from .tasks import REGIMES, SPLITS, FineTuneTask, Regime, draw_task

TOGETHER = 24
"""Maximum number of runs trained together."""

ORACLE = "oracle"
"""Name of the oracle, a plan computed from the planted changes; planted tasks only."""


@dataclass(frozen=True)
class Row:
    """Result of one policy on one run.

    Attributes:
        policy: name of the policy.
        task: id of the task.
        regime: the problem with the run.
        kind: kind of the task.
        base: base of the task.
        loss: held-out loss in nats; infinite for a failed run.
    """

    policy: str
    task: str
    regime: str
    kind: str
    base: str
    loss: float


def _oracle(task: FineTuneTask) -> Policy:
    """Policy that takes the ranks that capture the most of the planted changes, and keeps them."""
    return FixedPlan(ORACLE, lambda _: oracle_plan(task, first_problem(task)))


def evaluation_tasks(count: int, *, split: str = "test", seed: int = 0) -> dict[FineTuneTask, Regime]:
    """Draw a number of tasks for each regime, paired with their regimes; the bases of the split alternate.

    Raises:
        UnknownNameError: no such split.
    """
    found: dict[FineTuneTask, Regime] = {}
    for place, regime in enumerate(REGIMES):
        generator = np.random.default_rng([seed, place])
        bases = SPLITS[split].bases if split in SPLITS else (None,)
        for number in range(count):
            found[draw_task(generator, split, bases[number % len(bases)], regime)] = regime
    return found


def compare(
    policies: Mapping[str, Policy],
    tasks: Mapping[FineTuneTask, Regime],
    *,
    oracle: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Row]:
    """Run every policy on every task.

    Args:
        policies: policies by the name used in rows.
        tasks: tasks with their regimes.
        oracle: also run the oracle on planted tasks.
        on_progress: called with the number of finished tasks and the total.
    """
    runs_per_task, done = len(policies) + oracle, 0
    size = max(1, TOGETHER // runs_per_task)
    for base in dict.fromkeys(task.base for task in tasks):
        own = [task for task in tasks if task.base == base]
        stack = StackedEpisodes(base, size * runs_per_task, STEERING)
        for start in range(0, len(own), size):
            runs = [
                (name, policy, task)
                for task in own[start : start + size]
                for name, policy in [*policies.items(), *([(ORACLE, _oracle(task))] if oracle else [])]
                if name != ORACLE or task.kind == "planted"
            ]
            stack.begin({slot: task for slot, (_, _, task) in enumerate(runs)})
            losses = stack.play({slot: policy for slot, (_, policy, _) in enumerate(runs)})
            for slot, (name, _, task) in enumerate(runs):
                yield Row(name, task.id, tasks[task], task.kind, base, losses[slot])
            done += len(own[start : start + size])
            on_progress(done, len(tasks))


def beside(rows: Sequence[Row], policy: str, other: str) -> dict[str, float]:
    """100 log(loss of a policy / loss of another) by task: negative is better; clipped to `FAILED` either way."""
    losses = {(row.policy, row.task): row.loss for row in rows}
    found = {}
    for name, task in losses:
        if name == policy and (other, task) in losses:
            own, its = losses[policy, task], losses[other, task]
            finite = math.isfinite(own) and math.isfinite(its)
            found[task] = 100 * math.log(own / its) if finite else FAILED * (math.isinf(own) - math.isinf(its))
    return found


def table(rows: Sequence[Row], other: str) -> dict[str, dict[str, Estimate]]:
    """Mean of `beside` by policy and regime, with its interval over tasks."""
    found: dict[str, dict[str, Estimate]] = {}
    for policy in dict.fromkeys(row.policy for row in rows):
        found[policy] = {}
        for regime in dict.fromkeys(row.regime for row in rows):
            if changes := beside([row for row in rows if row.regime == regime], policy, other):
                found[policy][regime] = estimate(list(changes.values()), list(changes))
    return found
