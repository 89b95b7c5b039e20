"""Results of comparisons: one row for each run that counts, as JSON lines, and from rows to who is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import numpy as np

from ..common.files import append_json_line, read_json_lines, write_json_lines
from ..common.statistics import (
    Estimate,
    PairedComparison,
    compare_pairs,
    estimate,
    interquartile_means,
    mean_and_interval,
)
from ..env.bases import find_base
from ..env.episode_record import Comparison
from ..env.proxy_task import ProxyTask, Reference
from ..errors import RunFolderError, first_line, shown

Key = tuple[str, str, int]
"""Policy, task and seed: what makes a row unique."""


@dataclass(frozen=True)
class Row:
    """The result of one policy on one run of a task. Losses are on the held-out set, in nats.

    Attributes:
        policy: its name.
        task: id of the suite's task; repetitions with other seeds share it.
        seed: of this repetition.
        kind: "planted", "shift" or "classify".
        base: proxy base.
        family: "llama", "bert" or "gpt2".
        depth: layers of the base.
        budget: share of what rank 8 on all modules takes.
        cost_kind: what is counted; see `ProxyTask.cost_kind`.
        place: where a change was planted, or the text that was shifted to.
        initial_loss: before training.
        uniform_loss: of the uniform run in the same budget, at the learning rate that is best for it.
        best_loss: of the best known allocation; None if none is known.
        loss: at the end; None for a run that failed.
        improvement: over uniform, in shares of the headroom, -3 to 3; -3 for a run that failed.
        failed: whether a loss was not finite.
    """

    policy: str
    task: str
    seed: int
    kind: str
    base: str
    family: str
    depth: int
    budget: float
    cost_kind: str
    place: str
    initial_loss: float
    uniform_loss: float
    best_loss: float | None
    loss: float | None
    improvement: float
    failed: bool

    @property
    def key(self) -> Key:
        """What tells it from other rows."""
        return self.policy, self.task, self.seed

    @property
    def reference(self) -> Reference:
        """What fixed allocations achieve."""
        return Reference(self.initial_loss, self.uniform_loss, self.best_loss)


def row_of(policy: str, origin: ProxyTask, task: ProxyTask, reference: Reference, loss: float) -> Row:
    """The row of a finished run.

    Args:
        policy: its name.
        origin: the suite's task.
        task: the repetition of it that was run.
        reference: of the repetition.
        loss: held-out, in nats; NaN if the run failed.
    """
    base = find_base(task.base)
    failed = not math.isfinite(loss)
    return Row(
        policy=policy,
        task=origin.id,
        seed=task.seed,
        kind=task.kind,
        base=task.base,
        family=base.family,
        depth=base.depth,
        budget=task.budget,
        cost_kind=task.cost_kind,
        place=task.placement if task.kind == "planted" else task.corpus,
        initial_loss=reference.initial,
        uniform_loss=reference.uniform,
        best_loss=reference.best,
        loss=None if failed else loss,
        improvement=Comparison.with_uniform(reference).improvement(loss),
        failed=failed,
    )


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file, each at once on disk."""
    for row in rows:
        append_json_line(path, asdict(row))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of rows in one step."""
    write_json_lines(path, [asdict(row) for row in rows])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, the last of each key; none if it is absent.

    A torn last line is left out.

    Raises:
        RunFolderError: it holds something else.
    """
    lines: list[Any] = read_json_lines(path)
    try:
        rows = [Row(**line) for line in lines]
        for row in rows:
            _check(row)
    except (TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} holds no results of this version of rankpilot ({first_line(error)}).") from error
    return list({row.key: row for row in rows}.values())


_TYPES: dict[str, tuple[type, ...]] = {
    name: {float: (float, int), float | None: (float, int, NoneType)}.get(kind, (kind,))
    for name, kind in get_type_hints(Row).items()
}


def _check(row: Row) -> None:
    """Refuse a row whose values have other types, or are not finite; TypeError."""
    for name, kinds in _TYPES.items():
        value = getattr(row, name)
        if not isinstance(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
            raise TypeError(f"{name} is {shown(value)}")


# Who is better --------------------------------------------------------------------------------------------------------


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


def summarise(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By policy: mean improvement over uniform in shares of the headroom, its interval, wins and losses."""
    improvements: dict[str, list[float]] = {}
    for row in rows:
        improvements.setdefault(row.policy, []).append(row.improvement)
    summary = {}
    for name, values in improvements.items():
        mean, low, high = mean_and_interval(values)
        summary[name] = {
            "tasks": len(values),
            "improvement": mean,
            "low": low,
            "high": high,
            "wins": int(sum(value > 0 for value in values)),
            "losses": int(sum(value < 0 for value in values)),
        }
    return summary
