"""Decisions under a goal of cost: logged whole, taken again bit for bit, and told in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans, PlanValueConfig
from rankpilot.agents.learned.policy import LearnedPolicy, with_goal
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.observation import MODULE_FEATURES, Observation
from rankpilot.cost.cost import ByteCost
from rankpilot.cost.step_time import SecondsRow
from rankpilot.plan.goal import Goal
from rankpilot.study.replay import redecide
from rankpilot.study.why import Explanation, explain

from .conftest import Decide, Observe, PolicyOf

pytestmark = pytest.mark.usefixtures("narrow_plans_too")

MODULES = 12
BLOCKS = np.arange(MODULES) // 4
WIDE = np.arange(MODULES) % 4 >= 2
COST = ByteCost(
    ("backward",), np.array([1000.0]), np.full((1, MODULES), 10.0), np.full((1, 3), 700.0),
    np.arange(3)[:, None] >= BLOCKS[None],
)  # fmt: skip
SECONDS = SecondsRow(0.01, np.full(MODULES, 1e-6), np.full(MODULES, 0.001), np.eye(MODULES, dtype=np.bool_))
LIMIT = 4100


def say(plans: Plans) -> torch.Tensor:
    """Without a wide module at rank 2 or more, the loss is higher by some per cent."""
    missing = (plans.ranks[..., torch.from_numpy(WIDE)] < 2).to(plans.modules.dtype).mean(dim=2)
    return torch.stack([-3 * missing, -4 * missing])


Aimed = Callable[[str], LearnedPolicy]


@pytest.fixture
def aimed(policy_of: PolicyOf) -> Aimed:
    """A policy with a goal whose networks compute `say`."""

    def make(goal: str) -> LearnedPolicy:
        made = policy_of(say)
        made.value_ensemble.config = PlanValueConfig(count=1, width=1, unit="log loss")
        return with_goal(made, Goal(goal))

    return make


@pytest.fixture
def observation(make_observation: Observe) -> Observation:
    """A first decision with room for plain LoRA, where the time of a step is known."""
    cost = SECONDS.added_to(COST, LIMIT, 1.0)
    ranks = np.ones(MODULES, dtype=np.int64)
    given = make_observation(MODULES, blocks=BLOCKS, cost=cost, limit=float(LIMIT), ranks=ranks)
    modules = given.modules.copy()
    modules[:, MODULE_FEATURES.index("wide")] = WIDE
    return replace(given, modules=modules)


@pytest.mark.parametrize("goal", ["quality", "time", "bytes"])
def test_it_is_taken_again_with_the_goal_of_the_log(
    aimed: Aimed, observation: Observation, log_decision: Decide, tmp_path: Path, goal: str
) -> None:
    logged = log_decision(observation, aimed(goal))
    log = DecisionLog(tmp_path)
    log.append(logged)
    read = log.logged(0)
    found, before = read.deliberation, logged.deliberation
    assert found.goal == Goal(goal)
    assert found.unit == "log loss"
    for name in ("unit", "simple", "plain", "favourite", "costs", "seconds", "allowed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(before, name))
    assert redecide(read, aimed("quality")).differences == ()
    assert explain(read, aimed("quality"), what_ifs=False).attribution is not None


def test_what_was_saved(aimed: Aimed, observation: Observation, log_decision: Decide) -> None:
    logged = log_decision(observation, aimed("bytes"))
    told = Explanation(logged)
    found = logged.deliberation
    within = int(found.within_tolerance.sum())
    assert told.verdict == (
        f"At step 0 the plan of candidate 'wide at 2' was taken: of the {within} plans whose loss is surely "
        f"within 1.00% of rank 8 on all modules it takes the fewest bytes: {found.costs[found.plan] / 1024:.4g} KiB, "
        f"against {found.costs[found.reference] / 1024:.4g} KiB."
    )
    sentences = told.sentences()
    assert sentences[0] == ("The candidate 'wide at 2' is a plan that follows from no scores under this budget.")
    assert sentences[1].startswith("The networks expect a loss of -0.00%, -0.00% against rank 8 on all modules")
    assert sentences[2].startswith("The goal is the fewest bytes, with a loss that is surely at most 0.01 (log) above")
    timed = Explanation(log_decision(observation, aimed("time")))
    assert "it takes the least time a step: " in timed.verdict
    assert timed.verdict.endswith(" ms.")
    json.dumps(timed.to_json())


def test_nothing_was_sure(aimed: Aimed, observation: Observation, log_decision: Decide) -> None:
    policy = aimed("bytes")
    changes: dict[str, Any] = {"say": lambda plans: say(plans) - 9.0 * (plans.ranks != 8).any(dim=2)}
    vars(policy.value_ensemble).update(changes)
    tight = replace(observation, problem=replace(observation.problem, limit=3500.0))
    logged = log_decision(tight, policy)
    assert Explanation(logged).verdict == (
        "At step 0 uniform rank was taken: there is no plan whose loss is surely within 1.00% of rank 8 on all "
        "modules, and that one does not fit the budget."
    )
    roomy = Explanation(log_decision(observation, policy)).verdict
    assert "the plan of candidate 'all-linear' was taken: of the 1 plans" in roomy
