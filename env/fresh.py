"""Fresh tasks that differ in more than their seed, so that few templates stand for many budgets and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .tasks import ProxyTask


def vary(task: ProxyTask, suite: Sequence[ProxyTask]) -> ProxyTask:
    """A task like some of its suite, but none of them: drawn by its seed, without a reference.

    What is learned (the text, or what a planted teacher has changed) is that of any task of the suite, and the
    budget lies between two on the same base that count the same; the learning rate is that of the nearest one.

    Args:
        task: on one of the suite's bases, at a budget of theirs.
        suite: what it is varied with.
    """
    generator = np.random.default_rng(task.seed)
    places = sorted({(other.kind, other.placement, other.corpus) for other in suite})
    kind, placement, corpus = places[int(generator.integers(len(places)))]
    alike = [other for other in suite if _counts(other) == _counts(task)]
    level = float(generator.uniform())
    budget = task.budget * (alike[int(generator.integers(len(alike)))].budget / task.budget) ** level
    nearest = min(
        (other for other in alike if other.kind == kind),
        key=lambda other: abs(np.log(other.budget / budget)),
        default=task,
    )
    return replace(
        task,
        kind=kind,
        placement=placement,
        corpus=corpus,
        budget=float(f"{budget:.3g}"),
        learning_rate=nearest.learning_rate,
        reference=None,
    )


def _counts(task: ProxyTask) -> tuple[object, ...]:
    return task.base, task.price, task.priced_rows
