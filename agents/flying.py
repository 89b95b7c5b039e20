"""Policies fly proxy tasks, many at a time, on one frozen base."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..env.observation import Observation
from ..env.stacked_episodes import StackedEpisodes
from ..env.tasks import ProxyTask, Reference
from .task_rules import Attempt


def fly(episodes: StackedEpisodes, attempts: Sequence[Attempt], slots: int) -> list[float]:
    """Run policies on tasks; each result is as if it had run alone.

    Args:
        episodes: of the base of all tasks.
        attempts: tasks, of one batch shape and each with its reference, and who decides.
        slots: how many run at once.

    Returns:
        Held-out losses in nats, NaN for a run that failed.
    """
    losses: list[float] = []
    for start in range(0, len(attempts), slots):
        losses += _fly_together(episodes, attempts[start : start + slots])
    return losses


def _fly_together(episodes: StackedEpisodes, attempts: Sequence[Attempt]) -> list[float]:
    episodes.start({slot: task for slot, (task, _) in enumerate(attempts)})
    flying = list(range(len(attempts)))
    interval_losses: dict[int, float | None] = {}
    while flying:
        for slot in flying:
            decision = attempts[slot][1].decide(episodes.observe(slot, interval_losses.get(slot)))
            episodes.apply(slot, decision.deltas, decision.scores)
        interval_losses = episodes.advance(flying)
        flying = [slot for slot in flying if not episodes.flights[slot].ended]
    whole = [slot for slot in range(len(attempts)) if not episodes.flights[slot].failed]
    losses = episodes.held_out_losses(whole)
    return [losses.get(slot, math.nan) for slot in range(len(attempts))]


def measure_references(episodes: StackedEpisodes, tasks: Sequence[ProxyTask], slots: int) -> list[Reference]:
    """Run the uniform plan of tasks that do not know its result.

    Args:
        episodes: of the base of all tasks.
        tasks: of one batch shape.
        slots: how many run at once.
    """
    references: list[Reference] = []
    for start in range(0, len(tasks), slots):
        some = tasks[start : start + slots]
        episodes.start(dict(enumerate(some)))
        references += [episodes.reference(task) for task in some]
    return references


def first_observations(episodes: StackedEpisodes, tasks: Sequence[ProxyTask], slots: int) -> list[Observation]:
    """What a policy sees at the first decision of each task.

    Args:
        episodes: of the base of all tasks.
        tasks: of one batch shape.
        slots: how many are probed at once.
    """
    observations: list[Observation] = []
    for start in range(0, len(tasks), slots):
        some = tasks[start : start + slots]
        episodes.start(dict(enumerate(some)))
        observations += [episodes.observe(slot) for slot in range(len(some))]
    return observations
