"""From rows of results to who is better: overall, and by kind of task and by what the budget counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.statistics import Estimate, PairedComparison, compare_pairs, estimate, interquartile_means
from .results import Row


@dataclass(frozen=True)
class PolicyResult:
    """How one policy does on a group of tasks.

    Attributes:
        policy: its name.
        runs: how many runs count.
        failed: runs among them whose loss was not finite.
        loss: mean held-out loss of those that did not fail, in nats; None if all did.
        improvement: mean improvement over uniform, in shares of the headroom.
        interquartile: interquartile mean of the same.
        uniform: run by run against the uniform run.
        difference: mean difference of improvements to the policy that all are compared with; None for itself, and
            where the two have no run in common.
        against: run by run against that policy; None likewise.
    """

    policy: str
    runs: int
    failed: int
    loss: float | None
    improvement: Estimate
    interquartile: Estimate
    uniform: PairedComparison
    difference: Estimate | None
    against: PairedComparison | None


@dataclass(frozen=True)
class Group:
    """Results of all policies on some tasks.

    Attributes:
        name: which tasks, such as "planted, bytes".
        tasks: how many different ones.
        against: the policy that all are compared with, as rows call it.
        results: best mean improvement first.
    """

    name: str
    tasks: int
    against: str
    results: tuple[PolicyResult, ...]


def groups_of(rows: Sequence[Row], against: str) -> list[Group]:
    """Results on all tasks, and on those of each kind and unit of the budget of which there are at least two.

    Args:
        rows: of all policies.
        against: name of the policy that all are compared with.
    """
    groups = [_group("all tasks", rows, against)]
    places = sorted({(row.kind, row.cost_kind) for row in rows})
    if len(places) > 1:
        for kind, cost_kind in places:
            alike = [row for row in rows if (row.kind, row.cost_kind) == (kind, cost_kind)]
            groups.append(_group(f"{kind}, {cost_kind}", alike, against))
    return [group for group in groups if group.tasks > 1]


def _group(name: str, rows: Sequence[Row], against: str) -> Group:
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row.policy, []).append(row)
    others = {row.key[1:]: row for row in by_policy.get(against, ())}
    results = [
        _result(policy, of_policy, {} if policy == against else others) for policy, of_policy in by_policy.items()
    ]
    results.sort(key=lambda result: -result.improvement.value)
    return Group(name, len({row.task for row in rows}), against, tuple(results))


def _result(policy: str, rows: Sequence[Row], others: dict[tuple[str, int], Row]) -> PolicyResult:
    tasks = [row.task for row in rows]
    improvements = [row.improvement for row in rows]
    losses = [row.loss for row in rows if row.loss is not None]
    pairs = [(row, others[row.key[1:]]) for row in rows if row.key[1:] in others]
    paired, other = [row for row, _ in pairs], [row for _, row in pairs]
    shared = [row.task for row in paired]
    differences = [row.improvement - second.improvement for row, second in pairs]
    return PolicyResult(
        policy=policy,
        runs=len(rows),
        failed=len(rows) - len(losses),
        loss=float(np.mean(losses)) if losses else None,
        improvement=estimate(improvements, tasks),
        interquartile=estimate(improvements, tasks, interquartile_means),
        uniform=compare_pairs(_negative_losses(rows), [-row.uniform_loss for row in rows], tasks),
        difference=estimate(differences, shared) if pairs else None,
        against=compare_pairs(_negative_losses(paired), _negative_losses(other), shared) if pairs else None,
    )


def _negative_losses(rows: Iterable[Row]) -> list[float]:
    """More is better, and a failed run is worse than all others. Improvements would tie where they are clipped."""
    return [-math.inf if row.loss is None else -row.loss for row in rows]
