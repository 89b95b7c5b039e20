"""A fine-tune whose loss has a closed form: everything of an episode is real but the training of adapters.

Module m is worth w_m log(1 + rank_m), and the first signal shows w, so the best ranks are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from rankpilot.agents.learned_policy import LearnedPolicy
from rankpilot.agents.networks import RankNetwork
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.cost.budget import reference_cost
from rankpilot.cost.cost import ParameterCost
from rankpilot.decide.applier import PlanApplier, ProbeResult
from rankpilot.decide.observation import Observation
from rankpilot.decide.policy import Decision
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.proxy_task import Reference
from rankpilot.lora.adapters import SIGNALS
from rankpilot.plan.plan import uniform_ranks
from rankpilot.plan.problem import best_plan

MODULES = 12
SCHEDULE = DecisionSchedule(fractions=(0.0,))
TRAINING_TASKS = 64
HELD_OUT_TASKS = range(1000, 1030)


@dataclass(frozen=True)
class Target:
    """The shape of a target module."""

    name: str
    block: int
    d_in: int = 64
    d_out: int = 64
    max_rank: int = 64
    rank: int = 1


TARGETS = [Target(f"layers.{index}.proj", index) for index in range(MODULES)]


@dataclass(eq=False)
class Adapters:
    """Ranks and signals without weights, for `PlanApplier`."""

    ranks: IntArray = field(default_factory=lambda: np.ones(MODULES, dtype=np.int64))
    targets: Any = field(default_factory=lambda: TARGETS)

    def __post_init__(self) -> None:
        self.meter = self
        self.values = np.zeros((MODULES, len(SIGNALS)))
        self.age = np.zeros(MODULES, dtype=np.int64)

    def set_ranks(self, ranks: IntArray, optimizer: object, *, seed: int, step: int) -> None:
        self.ranks = ranks

    def non_finite(self, optimizer: object) -> list[str]:
        return []


@dataclass(frozen=True)
class ClosedForm:
    """A task: one draw of worths."""

    seed: int
    steps: int = 10
    id: str = "closed form"

    @property
    def worth(self) -> FloatArray:
        """Of each module, (MODULES,)."""
        return np.exp(np.random.default_rng(self.seed).normal(size=MODULES))

    def adapted(self) -> tuple[None, list[Target]]:
        return None, TARGETS

    def loss(self, ranks: IntArray) -> float:
        return float(10 - self.worth @ np.log1p(ranks) / self.worth.sum())


class Episode:
    """Stands for `rankpilot.env.episode.Episode`."""

    def __init__(self, task: ClosedForm, schedule: DecisionSchedule = SCHEDULE) -> None:
        self.task, self.step = task, 0
        cost = ParameterCost.of(TARGETS)  # type: ignore[arg-type]
        limit = 0.6 * reference_cost(cost, np.full(MODULES, 64))
        signals = np.ones((MODULES, len(SIGNALS)))
        signals[:, 0] = task.worth
        result = ProbeResult(signals, 10.0)
        self.applier: PlanApplier[Any] = PlanApplier(Adapters(), cost, limit, schedule, task.steps, result, rows=1)

    def observe(self, loss: float | None = None) -> Observation:
        return self.applier.observe(self.step, loss)

    def apply(self, decision: Decision) -> None:
        self.applier.apply(decision, self.step)

    def advance(self) -> float:
        self.step = self.task.steps
        return self.held_out_loss()

    def held_out_loss(self) -> float:
        return self.task.loss(self.applier.ranks)


@lru_cache(maxsize=1024)
def reference_of(task: ClosedForm, schedule: DecisionSchedule = SCHEDULE) -> Reference:
    """Losses before training, of uniform rank, and of the best ranks."""
    problem = Episode(task, schedule).applier.problem()
    utility = task.worth[:, None] * np.log1p(problem.ladder.array)
    return Reference(10.0, task.loss(uniform_ranks(problem)), task.loss(best_plan(problem, utility)))


def share_reached(task: ClosedForm, episode: Episode, decision: Decision) -> float:
    """How far a decision goes on the way from uniform rank (0) to the best ranks (1)."""
    reference = reference_of(task)
    assert reference.best is not None
    episode.apply(decision)
    return (reference.uniform - episode.held_out_loss()) / (reference.uniform - reference.best)


def mean_share_reached(network: RankNetwork) -> float:
    """The same of a network's mean actions, over tasks that are not for training."""
    shares = []
    for seed in HELD_OUT_TASKS:
        task = ClosedForm(seed)
        episode = Episode(task)
        shares.append(share_reached(task, episode, LearnedPolicy("learned", network).decide(episode.observe())))
    return float(np.mean(shares))
