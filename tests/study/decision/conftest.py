"""Decisions to explain: on random states of a run, and on one in which bytes and time count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.cost import ByteCost
from rankpilot.cost.step_time import PlanSeconds
from rankpilot.decide.chooser import PlanChooser
from rankpilot.decide.log import DecisionRecord
from rankpilot.decide.observation import MODULE_FEATURES, Observation
from rankpilot.decide.plan.goal import Goal, GoalKind
from rankpilot.decide.plan.worth import FEATURES, PlanWorth
from rankpilot.decide.policy import Policy, decided_plan
from rankpilot.decide.settings import DecisionClock, DecisionSchedule

Observe, Decide = Callable[..., Observation], Callable[..., DecisionRecord]
"""What makes a state of a run, and a decision on it."""

MODULES, LAYERS = 24, 6
BLOCKS = np.arange(MODULES) // 4
ROWS = np.arange(LAYERS)[:, None] >= BLOCKS[None]
COST = ByteCost(("backward",), np.array([1000.0]), np.full((1, MODULES), 10.0), np.full((1, LAYERS), 700.0), ROWS)
SECONDS = PlanSeconds(0.01, np.full(MODULES, 1e-6), np.full(MODULES, 0.001), np.eye(MODULES, dtype=np.bool_))

EFFECTS = np.pad([0.02, 0.02, 0.01, 0.01, 0.01, 0.0, -0.01, -0.005, 0.004], (0, len(FEATURES) - 9))
WORTH = PlanWorth(EFFECTS, 1e-5 * np.eye(len(FEATURES)), 0.002)
"""Modules without adapter and low ranks are expected to lose some per cent."""


def chooser(goal: GoalKind = "quality", tolerance: float = 0.01) -> PlanChooser:
    """The policy that ships, with expectations that no fit changes."""
    return PlanChooser(goal=Goal(goal, tolerance), worth=WORTH)


@pytest.fixture
def log_decision() -> Decide:
    """A policy's decision on an observation, as its log would tell it."""

    def decide(observation: Observation, policy: Policy, number: int = 0, **changes: Any) -> DecisionRecord:
        applier: Any = SimpleNamespace(notes={}, seed=0, clock=DecisionClock(DecisionSchedule(), 60, reads=True))
        decision = policy.decide(observation)
        plan = decided_plan(observation.problem, decision)
        return DecisionRecord.of(
            applier, observation, decision, plan, policy=policy, number=number, step=4 * number, **changes
        )

    return decide


@pytest.fixture
def first(make_observation: Observe) -> Observation:
    """A first decision with room for plain LoRA and more, where the time of a step is known."""
    given = make_observation(
        MODULES, blocks=BLOCKS, cost=COST, limit=20_000.0,
        ranks=np.ones(MODULES, dtype=np.int64), max_ranks=np.full(MODULES, 512),
    )  # fmt: skip
    modules = given.modules.copy()
    modules[:, MODULE_FEATURES.index("wide")] = np.arange(MODULES) % 4 >= 2
    modules[:, MODULE_FEATURES.index("relative_depth")] = BLOCKS / (LAYERS - 1)
    return replace(given, modules=modules, problem=replace(given.problem, time=SECONDS))
