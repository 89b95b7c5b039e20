"""Rounds: episodes of any tasks on one base that begin and end together, decision by decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...allocation.observation import Observation
from ...common.arrays import FloatArray, IntArray
from ..reward import churn_cost
from ..tasks.proxy_task import ProxyTask
from .stacked import StackedEpisodes


class Rollout:
    """One round; an episode whose training fails sits out the rest of it.

    Args:
        episodes: of the base of all tasks; no other episodes may be under way.
        tasks: by slot.

    Attributes:
        observations: the latest one of each episode.
        ranks: those of each, after its latest decision.
        churn: cost of the rungs that each has moved after its first decision.
        decisions: how many have been taken.
    """

    def __init__(self, episodes: StackedEpisodes, tasks: Sequence[ProxyTask]) -> None:
        episodes.start(dict(enumerate(tasks)))
        self.tasks = list(tasks)
        self._episodes = episodes
        self.observations: list[Observation] = [episodes.observe(slot) for slot in range(len(tasks))]
        self.ranks = [observation.problem.ranks for observation in self.observations]
        self.churn = [0.0] * len(tasks)
        self.decisions = 0

    @property
    def flying(self) -> list[int]:
        """Slots of the episodes that go on."""
        return [slot for slot in range(len(self.tasks)) if not self._episodes.flights[slot].ended]

    def initial_loss(self, slot: int) -> float:
        """Held-out loss before training, in nats; to be asked before the first step."""
        return self._episodes.held_out_losses([slot])[slot]

    def step(self, decisions: Mapping[int, tuple[IntArray, FloatArray]]) -> None:
        """Take a decision in every episode that goes on, and train all until the next one, or the end.

        Args:
            decisions: wanted ranks and scores by slot, (modules,) each; those of episodes that are over are ignored.
        """
        flying = self.flying
        for slot in flying:
            problem = self.observations[slot].problem
            plan = self._episodes.apply(slot, *decisions[slot])
            self.ranks[slot] = plan.ranks
            if self.decisions:
                self.churn[slot] += churn_cost(problem.rungs, problem.ladder.rung(plan.ranks))
        losses = self._episodes.advance(flying)
        self.decisions += 1
        for slot in self.flying:
            self.observations[slot] = self._episodes.observe(slot, losses[slot])

    def losses(self) -> list[float]:
        """Held-out losses in nats, NaN for episodes that failed."""
        whole = [slot for slot in range(len(self.tasks)) if not self._episodes.flights[slot].failed]
        found = self._episodes.held_out_losses(whole)
        return [found.get(slot, math.nan) for slot in range(len(self.tasks))]
