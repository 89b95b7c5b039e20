"""Policies fly proxy tasks, many at a time, on one frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..env.observation import Observation
from ..env.rounds import Round
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
        some = attempts[start : start + slots]
        flown = Round(episodes, [task for task, _ in some])
        while flown.flying:
            decided = {slot: some[slot][1].decide(flown.observations[slot]) for slot in flown.flying}
            flown.step({slot: (decision.deltas, decision.scores) for slot, decision in decided.items()})
        losses += flown.losses()
    return losses


def measure_references(episodes: StackedEpisodes, tasks: Sequence[ProxyTask], slots: int) -> list[Reference]:
    """Run the uniform plan of tasks that do not know its result.

    Args:
        episodes: of the base of all tasks.
        tasks: of one batch shape.
        slots: how many run at once.
    """
    for some in _batches(tasks, slots):
        episodes.measure_references(some)
    return [episodes.reference(task) for task in tasks]


def first_observations(episodes: StackedEpisodes, tasks: Sequence[ProxyTask], slots: int) -> list[Observation]:
    """What a policy sees at the first decision of each task.

    Args:
        episodes: of the base of all tasks.
        tasks: of one batch shape.
        slots: how many are probed at once.
    """
    found = []
    for some in _batches(tasks, slots):
        episodes.start(some)
        found += [episodes.observe(slot) for slot in some]
    return found


def _batches(tasks: Sequence[ProxyTask], slots: int) -> Iterator[dict[int, ProxyTask]]:
    """Tasks by slot, so many at a time."""
    for start in range(0, len(tasks), slots):
        yield dict(enumerate(tasks[start : start + slots]))
