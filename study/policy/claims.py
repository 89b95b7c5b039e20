"""The claims that a policy is measured against on the test split, and whether it reaches them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...agents.evaluation.evaluate import ACTOR, CONSTANT
from ...agents.evaluation.results import Row
from ...agents.training.train import WARM_START
from ...common.arrays import FloatArray, IntArray
from ...common.statistics import Estimate, PairedComparison, compare_pairs, estimate, interquartile_means

UNIFORM = "uniform"
"""Stands for the uniform run of each task, at the learning rate that is best for it; every row holds its loss."""

WORSE = 1.01
"""A run counts as worse where its loss is more than so many times the other's."""


@dataclass(frozen=True)
class Measured:
    """A policy against another on the same runs.

    Attributes:
        tasks: how many different ones.
        runs: how many in all.
        gain: nats by which its held-out loss is lower; a failed run has gained nothing over the untrained model.
        middle: interquartile mean of the same.
        versus: run by run.
        worse: runs whose loss is higher by more than 1 %.
    """

    tasks: int
    runs: int
    gain: Estimate
    middle: Estimate
    versus: PairedComparison
    worse: int


@dataclass(frozen=True)
class Bar:
    """What is asked for.

    Attributes:
        text: in words.
        reached: whether a measurement reaches it.
    """

    text: str
    reached: Callable[[Measured], bool]


BETTER = Bar("chance above 50 %", lambda m: m.versus.better.low > 0.5)
NOT_WORSE = Bar("at most .005 nats worse", lambda m: m.gain.low >= -0.005)
NOWHERE_WORSE = Bar("better on average, no run 1 % worse", lambda m: m.gain.low > 0 and m.worse == 0)


@dataclass(frozen=True)
class Claim:
    """Runs on which a policy is compared with another.

    Attributes:
        title: which runs.
        keep: whether a row belongs to them.
        other: a competitor, or UNIFORM.
        bar: what is asked for; None where a figure is only shown.
    """

    title: str
    keep: Callable[[Row], bool]
    other: str
    bar: Bar | None


def _plain_bytes(low: float, high: float) -> Callable[[Row], bool]:
    return lambda row: row.price == "bytes" and low <= row.budget <= high


def _shift(keep: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: row.kind != "planted" and keep(row)


def _large_batch(row: Row) -> bool:
    return row.price == "large batch"


def _everything(row: Row) -> bool:
    return True


BLIND: dict[str, Callable[[Row], bool]] = {
    "planted in low layers, bytes": lambda row: row.place == "low" and row.price != "parameters",
    "checkpointed": lambda row: row.price == "checkpointed",
    "30 % of the bytes and less": _plain_bytes(0, 0.3),
}
"""Where the rules are blind."""


def claims(policy: str) -> list[Claim]:
    """All claims about a policy of that name."""
    return [
        Claim("real shifts, equal parameters", _shift(lambda row: row.price == "parameters"), UNIFORM, BETTER),
        Claim("real shifts, 30 to 50 % of the bytes", _shift(_plain_bytes(0.3, 0.5)), "fracrule", NOT_WORSE),
        Claim("real shifts, 50 to 75 %", _shift(_plain_bytes(0.5, 0.75)), "fracrule", NOT_WORSE),
        Claim("real shifts, 75 to 100 %", _shift(_plain_bytes(0.75, 1)), "fracrule", NOT_WORSE),
        Claim("real shifts, bytes", _shift(_plain_bytes(0, math.inf)), UNIFORM, BETTER),
        Claim("real shifts, bytes of a large batch", _shift(_large_batch), UNIFORM, BETTER),
        Claim("real shifts, bytes of a large batch", _shift(_large_batch), "fracrule", NOT_WORSE),
        Claim(
            "planted, bytes of a large batch", lambda row: row.kind == "planted" and _large_batch(row), UNIFORM, BETTER
        ),
        *(Claim(title, keep, "fracrule", BETTER) for title, keep in BLIND.items()),
        Claim("all tasks", _everything, f"{CONSTANT}{policy}", BETTER),
        Claim("all tasks", _everything, WARM_START, BETTER),
        Claim("all tasks", _everything, f"{policy} {ACTOR}", None),
        Claim("all tasks", _everything, "heur3", None),
        Claim("all tasks", _everything, "fracrule-mlp", None),
        Claim("real shifts, bytes", _shift(_plain_bytes(0, math.inf)), "fracrule-mlp", None),
        Claim("all tasks", _everything, UNIFORM, None),
        Claim("bases that are twice as deep", lambda row: row.depth == 8, UNIFORM, NOWHERE_WORSE),
        Claim("another family (GPT-2)", lambda row: row.family == "gpt2", UNIFORM, NOWHERE_WORSE),
    ]


def measure(rows: Sequence[Row], policy: str, claim: Claim) -> Measured | None:
    """Compare a policy with another on a claim's runs; None where they have fewer than two tasks in common.

    Args:
        rows: of all competitors.
        policy: its name.
        claim: which runs, and with what.
    """
    pairs = _pairs([row for row in rows if claim.keep(row)], policy, claim.other)
    tasks = [row.task for row, _ in pairs]
    if len(set(tasks)) < 2:
        return None
    losses, others = [_loss(row) for row, _ in pairs], [other for _, other in pairs]
    starts = [row.initial_loss for row, _ in pairs]
    gains = _finite(others, starts) - _finite(losses, starts)
    return Measured(
        tasks=len(set(tasks)),
        runs=len(tasks),
        gain=estimate(gains, tasks),
        middle=estimate(gains, tasks, interquartile_means),
        versus=compare_pairs([-loss for loss in losses], [-other for other in others], tasks),
        worse=sum(loss > WORSE * other for loss, other in zip(losses, others, strict=True)),
    )


def share(rows: Iterable[Row], policy: str, best: str, other: str, *, logs: bool = False) -> Estimate | None:
    """How much of what the best gains over another competitor a policy gains.

    Args:
        rows: of all three, on the runs that count.
        policy: its name.
        best: what could be gained.
        other: a competitor, or UNIFORM.
        logs: compare logs of losses, where those differ in size from task to task.

    Returns:
        A ratio of means; its interval is a bootstrap over tasks. None where nothing was measured, or nothing could be
        gained.
    """
    rows = list(rows)
    tops = {row.key[1:]: _loss(row) for row in rows if row.policy == best}
    pairs = [(row, loss) for row, loss in _pairs(rows, policy, other) if row.key[1:] in tops]
    if not pairs:
        return None
    starts = [row.initial_loss for row, _ in pairs]
    others, losses = [loss for _, loss in pairs], [_loss(row) for row, _ in pairs]
    sides = [_finite(side, starts) for side in (others, losses, [tops[row.key[1:]] for row, _ in pairs])]
    base, reached, top = [np.log(side) for side in sides] if logs else sides
    if not (base - top).any():
        return None

    def ratio(values: FloatArray, counts: IntArray) -> FloatArray:
        whole = counts @ (base - top)
        return np.divide(counts @ values, whole, out=np.zeros(len(whole)), where=whole != 0)

    return estimate(base - reached, [row.task for row, _ in pairs], ratio)


def _pairs(rows: Sequence[Row], policy: str, other: str) -> list[tuple[Row, float]]:
    """Rows of a policy, and the other's loss on the same run."""
    mine = [row for row in rows if row.policy == policy]
    if other == UNIFORM:
        return [(row, row.uniform_loss) for row in mine]
    theirs = {row.key[1:]: _loss(row) for row in rows if row.policy == other}
    return [(row, theirs[row.key[1:]]) for row in mine if row.key[1:] in theirs]


def _loss(row: Row) -> float:
    """The held-out loss, infinite for a run that failed."""
    return math.inf if row.loss is None else row.loss


def _finite(losses: Sequence[float], starts: Sequence[float]) -> FloatArray:
    """Losses, with that of the untrained model for runs that failed, (runs,)."""
    return np.where(np.isfinite(losses), losses, starts)
