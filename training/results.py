"""Results of comparisons: one row for each run that counts, and from rows to who is better, with intervals.

There are few runs of few tasks, so every figure comes with an interval; means come with the interquartile mean, which
one run that went astray hardly moves, and differences with the probability of improvement, which does not depend on a
scale (Agarwal et al., 2021, arXiv 2108.13264). Runs are compared in pairs: same task, seed and batches. Repetitions of
a task are alike, so the bootstrap draws tasks, each with all its repetitions. Benchmarks of time use the same
bootstrap: neighbours in time are alike, so it draws whole cycles of steps.

Plain quantiles of the draws are too narrow where tasks are few: of six tasks they hold the truth in 85 % of the cases.
`estimate` goes further out, as far as Student's t does beyond the normal distribution (the expanded percentile
interval of Hesterberg, 2015, "What teachers should know about the bootstrap", The American Statistician 69).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.files import append_json_line, read_json_lines, write_json_lines
from ..env.episode import Comparison
from ..env.proxy_task import ProxyTask, Reference, find_base
from ..errors import RunFolderError, first_line, naming_extras, shown

with naming_extras():
    from scipy.special import ndtr, stdtrit

DRAWS = 4000
"""Bootstrap draws."""

Statistic = Callable[[FloatArray, IntArray], FloatArray]
"""A figure of each draw, (draws,), from values, (runs,), and how often each run is in each draw, (draws, runs)."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; `f"{estimate:.3f}"` gives "1.042 (1.004 to 1.077)".

    Attributes:
        value: of all runs.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class PairedComparison:
    """One policy against another on the same runs.

    Attributes:
        better: probability that the first is better, a tie counting half, 0 to 1.
        wins: runs on which the first is better.
        ties: runs on which both are equal.
        losses: runs on which the second is better.
    """

    better: Estimate
    wins: int
    ties: int
    losses: int


def means(values: FloatArray, counts: IntArray) -> FloatArray:
    """Mean of each draw; see `Statistic`."""
    return np.asarray(counts @ values / counts.sum(axis=1))


def interquartile_means(values: FloatArray, counts: IntArray) -> FloatArray:
    """Mean of the middle half of each draw: of n values floor(n / 4) are left out at either end."""
    order = np.argsort(values)
    counts = counts[:, order]
    ends = np.cumsum(counts, axis=1)
    total = ends[:, -1:]
    cut = total // 4
    kept = np.clip(np.minimum(ends, total - cut) - np.maximum(ends - counts, cut), 0, None)
    return np.asarray(kept @ values[order] / (total - 2 * cut)[:, 0])


def estimate(
    values: Sequence[float] | FloatArray, tasks: Sequence[str | int], statistic: Statistic = means
) -> Estimate:
    """A statistic of several runs, with the interval of a bootstrap over tasks.

    With many tasks 2.5 % of the draws lie on either side, with few ones less: see the module. Below four tasks hardly
    any do, and the interval is about as wide as the tasks are apart.

    Args:
        values: one a run, (runs,), or (runs, ...) where the statistic takes that; at least one run.
        tasks: the task of each run.
        statistic: which figure.
    """
    array = np.asarray(values, dtype=np.float64)
    whole = np.ones((1, len(array)), dtype=np.int64)
    tail = _tail(len(set(tasks)))
    low, high = np.quantile(statistic(array, _draws(tasks)), [tail, 1 - tail])
    return Estimate(float(statistic(array, whole)[0]), float(low), float(high))


@cache
def _tail(tasks: int) -> float:
    """The share of the draws that an interval leaves out on either side; half of them for a single task."""
    if tasks < 2:
        return 0.5
    return float(ndtr(-stdtrit(tasks - 1, 0.975) * np.sqrt(tasks / (tasks - 1))))


def _draws(tasks: Sequence[str | int]) -> IntArray:
    """How often each run is in each bootstrap draw of tasks, (DRAWS, runs); always the same draws."""
    _, task_of = np.unique(np.asarray(tasks), return_inverse=True)
    return np.asarray(_task_draws(int(task_of.max()) + 1)[:, task_of])


@lru_cache(maxsize=1)
def _task_draws(count: int) -> IntArray:
    """How often each of some tasks is in each draw, (DRAWS, count), read-only; the last is held for the next figure."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.int64)
    drawn.flags.writeable = False
    return drawn


def compare_pairs(
    first: Sequence[float] | FloatArray, second: Sequence[float] | FloatArray, tasks: Sequence[str | int]
) -> PairedComparison:
    """Compare two policies, run by run. For the mean difference, pass differences to `estimate`.

    Args:
        first: results of one policy, (runs,), at least one; more is better, and infinity is allowed.
        second: of the other on the same runs.
        tasks: the task of each run.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    wins, losses = left > right, left < right
    better = estimate(np.where(wins, 1.0, np.where(losses, 0.0, 0.5)), tasks)
    return PairedComparison(better, int(wins.sum()), int((~wins & ~losses).sum()), int(losses.sum()))


def mean_and_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean of runs of different tasks, and its 95 % bootstrap interval."""
    array = np.asarray(list(values), dtype=np.float64)
    mean = estimate(array, [str(index) for index in range(len(array))])
    return mean.value, mean.low, mean.high


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
