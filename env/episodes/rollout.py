"""Rollouts: episodes of any tasks on one base that begin and end together, decision by decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from ...allocation.observation import Observation
from ...allocation.plan import Plan
from ...allocation.policy import Decision
from ...common.arrays import IntArray
from ..tasks.proxy_task import ProxyTask
from .episode_log import EpisodeLog
from .stacked import StackedEpisodes

SeenT = TypeVar("SeenT")
ChosenT = TypeVar("ChosenT")
SeenT_co = TypeVar("SeenT_co", covariant=True)
ChosenT_contra = TypeVar("ChosenT_contra", contravariant=True)


class Running(Protocol[SeenT_co, ChosenT_contra]):
    """Episodes under way that take their decisions at the same time."""

    @property
    def ended(self) -> bool:
        """Whether all of them are over."""

    @property
    def seen(self) -> SeenT_co:
        """What the next decisions are made from."""

    def step(self, chosen: ChosenT_contra) -> None:
        """Take a decision in every episode that goes on, and train all until the next one, or the end."""


def rollout(
    running: Running[SeenT, ChosenT],
    decide: Callable[[SeenT], ChosenT],
    note: Callable[[SeenT, ChosenT], None] | None = None,
) -> None:
    """Take decisions until all episodes are over.

    Args:
        running: the episodes.
        decide: makes the decisions of all of them.
        note: called after each step with what was seen before it and what was decided.
    """
    while not running.ended:
        seen = running.seen
        chosen = decide(seen)
        running.step(chosen)
        if note:
            note(seen, chosen)


class Rollout:
    """Episodes of a stack that begin now; one whose training fails sits out the rest.

    Args:
        episodes: of the base of all tasks; no other episodes may be under way.
        tasks: by slot.
        logs: where the decisions of some slots are written down.

    Attributes:
        seen: the latest observation of each episode, by slot.
        ranks: of each, after its latest decision.
        decided: slots of the episodes that took the latest decision.
        decisions: how many have been taken.
    """

    def __init__(
        self, episodes: StackedEpisodes, tasks: Sequence[ProxyTask], logs: Mapping[int, EpisodeLog] | None = None
    ) -> None:
        episodes.start(dict(enumerate(tasks)))
        self._logs = logs or {}
        self._losses: dict[int, float | None] = {}
        self._episodes, self._slots = episodes, range(len(tasks))
        self.seen: list[Observation] = [episodes.observe(slot) for slot in self._slots]
        self.ranks: list[IntArray] = [observation.problem.ranks for observation in self.seen]
        self.decided: list[int] = []
        self.decisions: int = 0

    @property
    def active(self) -> list[int]:
        """Slots of the episodes that go on."""
        return [slot for slot in self._slots if not self._episodes.under_way[slot].ended]

    @property
    def ended(self) -> bool:
        """Whether no episode goes on."""
        return not self.active

    def initial_loss(self, slot: int) -> float:
        """Held-out loss before training, in nats; to be asked before the first step."""
        return self._episodes.held_out_losses([slot])[slot]

    def step(self, chosen: Sequence[Decision]) -> None:
        """Take a decision in every episode that goes on, and train all until the next one, or the end.

        Args:
            chosen: a decision for each slot; those of episodes that are over are ignored.
        """
        self.decided = self.active
        for slot in self.decided:
            plan = self._episodes.apply(slot, chosen[slot])
            self.ranks[slot] = plan.ranks
            if slot in self._logs:
                self._log(slot, chosen[slot], plan)
        self._losses = self._episodes.advance(self.decided)
        self.decisions += 1
        self.seen = list(self.seen)  # whoever was given the last list may keep it
        for slot in self.active:
            self.seen[slot] = self._episodes.observe(slot, self._losses[slot])

    def _log(self, slot: int, decision: Decision, plan: Plan) -> None:
        """Write down the latest decision of an episode."""
        episode, loss = self._episodes.under_way[slot], self._losses.get(slot)
        seen = self.seen[slot]
        self._logs[slot].append(episode.controller, seen, decision, plan, step=episode.step, loss=loss)

    def losses(self) -> list[float]:
        """Held-out losses in nats, NaN for episodes that failed."""
        sound = [slot for slot in self._slots if not self._episodes.under_way[slot].failed]
        losses = self._episodes.held_out_losses(sound)
        return [losses.get(slot, math.nan) for slot in self._slots]
