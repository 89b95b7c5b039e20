"""Decisions to explain: two short runs of a proxy under an earlier policy, and decisions on random states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rankpilot.agents.learned.networks import Plans, PlanValueConfig, PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.log import DecisionLog, DecisionRecord
from rankpilot.agents.observation import Observation
from rankpilot.agents.policy import Policy, decided_plan
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.env.episode import EpisodeLog
from rankpilot.env.proxy_task import ProxyTask
from rankpilot.env.stacked import StackedEpisodes
from rankpilot.training.compare import run_attempts

Observe, Decide, PolicyOf = Callable[..., Observation], Callable[..., DecisionRecord], Callable[..., LearnedPolicy]
"""What makes a state of a run, a decision on it, and a policy whose networks compute a formula."""

SIZES: dict[str, Any] = {"base": "llama-4x32", "steps": 20, "batch_size": 4, "length": 16, "eval_rows": 16}
TASKS = (
    ProxyTask("planted", 1, corpus="documentation", budget=0.8, **SIZES),
    ProxyTask("shift", 2, budget=0.25, unit="parameters", **SIZES),
)


EARLIER = Path(__file__).parents[2] / "recorded" / "earlier_policy"


class Formula(PlanValueEnsemble):
    """Networks that compute what a test says: a function of `Plans` to (networks, states, plans)."""

    def __init__(self, say: Callable[[Plans], torch.Tensor]) -> None:
        super().__init__(PlanValueConfig(count=1, width=1))
        self.say = say

    def forward(self, plans: Plans) -> torch.Tensor:
        return self.say(plans)


def log_runs(folder: Path, tasks: Sequence[ProxyTask], policy: Policy, schedule: DecisionSchedule) -> list[DecisionLog]:
    """Run tasks of one base and batch shape under a policy, and log every decision; a folder for each run."""
    logs = [DecisionLog(folder / str(number)) for number in range(len(tasks))]
    episodes = StackedEpisodes(tasks[0].base, schedule, len(tasks))
    written = [EpisodeLog(log.append, policy, task.id) for log, task in zip(logs, tasks, strict=True)]
    run_attempts(episodes, [(task, policy) for task in tasks], len(tasks), written)
    return logs


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Decisions are the same bit for bit."""


@pytest.fixture(scope="session")
def policy() -> LearnedPolicy:
    """One that shipped before: it compares plans of one cost, which follow from scores, and decides four times."""
    return load_policy(EARLIER)


@pytest.fixture(scope="session")
def logs(policy: LearnedPolicy, tmp_path_factory: pytest.TempPathFactory) -> list[DecisionLog]:
    """One run in bytes and one in parameters, four decisions each."""
    torch.set_num_threads(1)
    return log_runs(tmp_path_factory.mktemp("runs"), TASKS, policy, DecisionSchedule(probe_steps=4))


@pytest.fixture(scope="session")
def decisions(logs: list[DecisionLog]) -> list[DecisionRecord]:
    """All decisions of both."""
    return [log.logged(number) for log in logs for number in range(len(log))]


@pytest.fixture(scope="session")
def log_decision() -> Callable[..., DecisionRecord]:
    """A policy's decision on an observation, as its log would tell it."""

    def decide(observation: Observation, policy: Policy, **changes: Any) -> DecisionRecord:
        controller: Any = SimpleNamespace(notes={}, seed=0, schedule=DecisionSchedule())
        decision = policy.decide(observation)
        plan = decided_plan(observation.problem, decision)
        return DecisionRecord.of(controller, observation, decision, plan, policy=policy, number=0, step=0, **changes)

    return decide


@pytest.fixture
def policy_of() -> Callable[..., LearnedPolicy]:
    """A policy whose networks compute a formula; its actor gives every module the same score."""

    def make(say: Callable[[Plans], torch.Tensor], **options: Any) -> LearnedPolicy:
        return LearnedPolicy("formula", RankNetwork(NetworkConfig(width=8)).eval(), Formula(say).eval(), **options)

    return make
