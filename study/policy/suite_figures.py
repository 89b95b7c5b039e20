"""Figures of a suite, each with the interval of a bootstrap over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import rankdata

from ...common.arrays import FloatArray, IntArray
from ...common.statistics import Estimate, estimate

WORST = 0.1
"""Share of the runs, those that ended worst, that are held against the rest."""


@dataclass(frozen=True)
class Driver:
    """What one group of features adds to the lower bound of the first plan over uniform rank, in the unit of votes.

    Attributes:
        name: of the group, one of `study.decision.shapley.GROUPS`.
        size: mean size of what it adds.
        mean: mean of what it adds; near 0 beside a large size where it speaks for as many plans as against.
    """

    name: str
    size: Estimate
    mean: float


@dataclass(frozen=True)
class Part:
    """The runs on one kind of task.

    Attributes:
        name: what they have in common.
        runs: how many there are.
        tasks: on how many tasks.
        improvement: their mean improvement over uniform rank, in shares of the headroom; None for a single task, which
            tells no interval.
    """

    name: str
    runs: int
    tasks: int
    improvement: Estimate | None


@dataclass(frozen=True)
class Trait:
    """What the worst runs have more or less of than the rest.

    Attributes:
        name: of the trait.
        worst: mean over the worst runs.
        rest: mean over the others.
        distance: their difference in standard deviations over all runs. Its interval chooses the worst runs anew in
            each draw.
    """

    name: str
    worst: float
    rest: float
    distance: Estimate


@dataclass(frozen=True)
class Third:
    """A third of the runs that left uniform rank, by the expected gain over the spread of the votes.

    Attributes:
        runs: how many.
        surety: their mean expected gain over the spread.
        claimed: their mean chance to gain, as the votes claim it.
        gained: share of them that ended better than uniform rank.
    """

    runs: int
    surety: float
    claimed: float
    gained: Estimate


@dataclass(frozen=True)
class Promise:
    """What the votes claim of first plans that leave uniform rank, against what came of them.

    Attributes:
        correlation: rank correlation of expected and real improvement, -1 to 1.
        claimed: mean chance to gain, as the votes claim it: that of a normal distribution with their mean and spread.
        gained: share of runs that ended better than uniform rank.
        thirds: by how sure the votes were, the least sure first.
    """

    correlation: Estimate
    claimed: float
    gained: Estimate
    thirds: tuple[Third, ...]


def decides_nothing(found: Estimate) -> bool:
    """Whether the interval of a difference holds 0."""
    return found.low <= 0 <= found.high


def worst_count(runs: int) -> int:
    """How many of some runs are the worst."""
    return max(1, round(WORST * runs))


def worst_against_rest(values: FloatArray, counts: IntArray) -> FloatArray:
    """Mean of a trait over the worst runs of each draw less that over the others; see `statistics.Statistic`.

    Args:
        values: improvement and trait of each run, (runs, 2).
        counts: how often each run is in each draw, (draws, runs); two runs a draw at least.
    """
    order = np.argsort(values[:, 0], kind="stable")
    trait, ordered = values[order, 1], counts[:, order]
    ends = np.cumsum(ordered, axis=1)
    total = ends[:, -1:]
    cut = np.maximum(1, np.round(WORST * total))
    worst = np.clip(np.minimum(ends, cut) - (ends - ordered), 0, None)
    return np.asarray(worst @ trait / cut[:, 0] - (ordered - worst) @ trait / (total - cut)[:, 0])


def correlations(values: FloatArray, counts: IntArray) -> FloatArray:
    """Correlation of two columns in each draw, 0 where one of them is constant; see `statistics.Statistic`.

    Args:
        values: (runs, 2); of ranks it is the rank correlation.
        counts: how often each run is in each draw, (draws, runs).
    """
    total = counts.sum(axis=1, keepdims=True)
    first, second = (column - counts @ column[:, None] / total for column in values.T)
    products = [
        (counts * left * right).sum(axis=1) for left, right in ((first, second), (first, first), (second, second))
    ]
    scale = np.sqrt(np.maximum(products[1] * products[2], 0))
    # What rounding leaves of a constant column is no spread.
    return np.asarray(np.where(scale > 1e-12, products[0] / np.maximum(scale, 1e-12), 0.0))


def promise_of(
    expected: FloatArray, spread: FloatArray, improvements: FloatArray, tasks: Sequence[str]
) -> Promise | None:
    """Hold what votes claim against what came of it; None of fewer than six runs.

    Args:
        expected: mean vote on the first plan of each run, (runs,).
        spread: standard deviation of those votes, (runs,).
        improvements: what the runs gained over uniform rank, (runs,).
        tasks: of each run.
    """
    if len(expected) < 6 or len(set(tasks)) < 2:
        return None
    surety = expected / np.maximum(spread, 1e-9)
    claimed = np.array([NormalDist().cdf(value) for value in surety])
    gained = (improvements > 0).astype(float)
    thirds = [
        Third(
            len(part),
            float(surety[part].mean()),
            float(claimed[part].mean()),
            estimate(gained[part], [tasks[place] for place in part]),
        )
        for part in np.array_split(np.argsort(surety, kind="stable"), 3)
    ]
    ranks = np.stack([rankdata(expected), rankdata(improvements)], axis=1)
    return Promise(estimate(ranks, tasks, correlations), float(claimed.mean()), estimate(gained, tasks), tuple(thirds))
