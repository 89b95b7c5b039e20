"""Figures with intervals, for comparisons of few runs.

With few runs of few tasks, every figure has an interval; means come with the interquartile mean, robust to a single
failed run (Agarwal et al., 2021, arXiv 2108.13264). Repetitions of a task are correlated, so the bootstrap draws tasks,
each with all its repetitions. Timing benchmarks use the same bootstrap: consecutive steps are correlated, so it draws
whole cycles of steps.

Plain quantiles of the draws are too narrow for few tasks: with six tasks they contain the truth in 85 % of the cases.
`estimate` widens them by the ratio of Student's t to the normal distribution (the expanded percentile interval of
Hesterberg, 2015, "What teachers should know about the bootstrap", The American Statistician 69).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from .arrays import FloatArray, IntArray
from .errors import naming_extras

with naming_extras():
    from scipy.special import ndtr, stdtrit

DRAWS = 4000
"""Bootstrap draws."""

Statistic = Callable[[FloatArray, IntArray], FloatArray]
"""Statistic of each draw, (draws,), from values, (runs,), and the count of each run in each draw, (draws, runs)."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; `f"{estimate:.3f}"` gives "1.042 (1.004 to 1.077)".

    For a single task there is no interval, and only the figure is shown.

    Attributes:
        value: figure over all runs.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        interval = f" ({self.low:{form}} to {self.high:{form}})" if self.low < self.high else ""
        return f"{self.value:{form}}{interval}"


def means(values: FloatArray, counts: IntArray) -> FloatArray:
    """Mean of each draw; see `Statistic`."""
    return np.asarray(counts @ values / counts.sum(axis=1))


def estimate(
    values: Sequence[float] | FloatArray, tasks: Sequence[str | int], statistic: Statistic = means
) -> Estimate:
    """Compute a statistic of several runs, with a bootstrap interval over tasks.

    With many tasks, 2.5 % of the draws lie on either side, with few tasks fewer: see the module docstring. Below four
    tasks hardly any do, and the interval is about as wide as the range of the tasks.

    Args:
        values: one per run, (runs,), or (runs, ...) if the statistic supports it; at least one run.
        tasks: task of each run.
        statistic: the statistic.
    """
    array = np.asarray(values, dtype=np.float64)
    whole = np.ones((1, len(array)), dtype=np.int64)
    tail = _tail(len(set(tasks)))
    low, high = np.quantile(statistic(array, _draws(tasks)), [tail, 1 - tail])
    return Estimate(float(statistic(array, whole)[0]), float(low), float(high))


@cache
def _tail(tasks: int) -> float:
    """Share of the draws outside the interval on either side; half of them for a single task."""
    if tasks < 2:
        return 0.5
    return float(ndtr(-stdtrit(tasks - 1, 0.975) * np.sqrt(tasks / (tasks - 1))))


def _draws(tasks: Sequence[str | int]) -> IntArray:
    """Count of each run in each bootstrap draw of tasks, (DRAWS, runs); deterministic."""
    _, task_of = np.unique(np.asarray(tasks), return_inverse=True)
    return np.asarray(_task_draws(int(task_of.max()) + 1)[:, task_of])


@lru_cache(maxsize=1)
def _task_draws(count: int) -> IntArray:
    """Count of each task in each draw, (DRAWS, count), read-only; the last result is cached."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.int64)
    drawn.flags.writeable = False
    return drawn
