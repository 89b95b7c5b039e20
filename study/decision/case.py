"""A logged decision that can be taken again, with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...agents.learned.policy import LearnedPolicy
from ...allocation.features import MODULE_FEATURES
from ...allocation.log import DecisionRecord
from ...allocation.observation import Observation
from ...allocation.policy import Decision, Policy, decided_plan
from ...allocation.problem import AllocationProblem
from ...common.arrays import FloatArray, IntArray
from ...errors import ConfigError
from ...lora.signals import SIGNALS

SIGNAL_COLUMNS = [MODULE_FEATURES.index(name) for name in SIGNALS]


@dataclass(frozen=True, eq=False)
class Case:
    """A logged decision and a policy that takes it again.

    A policy that draws plans takes its best one here: what is asked is what it prefers.

    Attributes:
        logged: the decision.
        policy: decides.

    Raises:
        ConfigError: no policy decided there.
    """

    logged: DecisionRecord
    policy: Policy

    def __post_init__(self) -> None:
        if self.logged.correction:
            raise ConfigError(
                f"At step {self.logged.step} the guard or a person changed the ranks; no policy decided there."
            )

    @property
    def observation(self) -> Observation:
        """What the policy saw."""
        return self.logged.observation

    def decide(self, observation: Observation) -> IntArray:
        """The ranks to which this observation leads, int64 (modules,)."""
        return self.plan_of(observation.problem, self._best.decide(observation))

    def plan_of(self, problem: AllocationProblem, decision: Decision) -> IntArray:
        """The ranks to which a decision leads, with the modules pinned that were pinned, int64 (modules,)."""
        return decided_plan(replace(problem, pinned=self.logged.problem.pinned), decision).ranks

    @cached_property
    def decision(self) -> Decision:
        """The decision on the observation as it was."""
        return self._best.decide(self.observation)

    @cached_property
    def plan(self) -> IntArray:
        """The ranks to which that leads, int64 (modules,)."""
        return self.plan_of(self.observation.problem, self.decision)

    @cached_property
    def _best(self) -> Policy:
        policy = aimed_as(self.policy, self.logged)
        return replace(policy, temperature=0.0) if isinstance(policy, LearnedPolicy) else policy


def aimed_as(policy: Policy, logged: DecisionRecord) -> Policy:
    """A policy with the goal that the log's had, if it can have it."""
    found, ensemble = logged.deliberation, getattr(policy, "value_ensemble", None)
    if found is None or ensemble is None or ensemble.config.unit != "log loss":
        return policy
    assert isinstance(policy, LearnedPolicy)
    return replace(policy, goal=found.goal)


def with_signals(observation: Observation, shifts: FloatArray) -> Observation:
    """What would have been seen with other signals: each as a log, centred again over the modules.

    Args:
        observation: at a decision.
        shifts: added to the signals, (modules, len(SIGNALS)).
    """
    modules = observation.modules.copy()
    signals = modules[:, SIGNAL_COLUMNS] + shifts
    modules[:, SIGNAL_COLUMNS] = np.clip(signals - signals.mean(axis=0), -3, 3)
    return replace(observation, modules=modules)


def with_most(observation: Observation, module: int, rank: int) -> Observation:
    """The same decision where one module may have this rank at most."""
    problem = observation.problem
    high = (problem.max_ranks if problem.high is None else problem.high).copy()
    high[module] = min(rank, int(high[module]))
    return replace(observation, problem=replace(problem, high=high))


def with_least(observation: Observation, module: int, rank: int) -> Observation:
    """The same decision where one module must have this rank at least."""
    problem = observation.problem
    low = (np.zeros_like(problem.ranks) if problem.low is None else problem.low).copy()
    low[module] = max(rank, int(low[module]))
    return replace(observation, problem=replace(problem, low=low))
