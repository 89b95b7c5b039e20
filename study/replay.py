"""Decisions of a log taken again: by the policy that took them, by another one, or with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table

from ..agents.deliberation import plan_distance
from ..agents.learned.policy import LearnedPolicy
from ..agents.log import DecisionLog, DecisionRecord
from ..agents.observation import MODULE_FEATURES, Observation
from ..agents.policy import Decision, Policy, decided_plan, keeps
from ..common.arrays import FloatArray, IntArray
from ..common.text import make_table
from ..errors import ConfigError
from ..lora.signals import SIGNALS
from ..plan.problem import AllocationProblem

SIGNAL_COLUMNS = [MODULE_FEATURES.index(name) for name in SIGNALS]


@dataclass(frozen=True, eq=False)
class Redecision:
    """A logged decision taken again.

    Attributes:
        decision: as it is taken now.
        ranks: of the plan to which it leads, int64 (modules,).
        differences: what differs from the log, in words; empty if all is equal, bit for bit.
    """

    decision: Decision
    ranks: IntArray
    differences: tuple[str, ...]


def redecide(logged: DecisionRecord, policy: Policy) -> Redecision:
    """Take a logged decision again.

    Where the log's policy drew plans at a temperature, this one draws with the same temperature and seed. It has the
    same goal, if its networks tell plans of any cost apart.

    Args:
        logged: the decision, as `DecisionLog.logged` gives it.
        policy: who decides now.

    Raises:
        ConfigError: no policy decided there.
    """
    _check_decided(logged)
    deliberation = logged.deliberation
    if deliberation and deliberation.temperature and isinstance(policy, LearnedPolicy):
        policy = replace(policy, temperature=deliberation.temperature, seed=deliberation.seed)
    decision = _aimed_as(policy, logged).decide(logged.observation)
    ranks = decided_plan(logged.problem, decision).ranks
    return Redecision(decision, ranks, tuple(_differences(logged, decision, ranks)))


def _differences(logged: DecisionRecord, decision: Decision, ranks: IntArray) -> list[str]:
    scalars = ("rank_floor", "depth_bias", "log_prob", "expected", "uncertainty")
    found = [name for name in scalars if getattr(logged.decision, name) != getattr(decision, name)]
    if logged.kept != keeps(logged.observation, decision):
        found.append("kept")
    pairs = {
        "score": (logged.decision.scores, decision.scores),
        "rank_wanted": (logged.rank_wanted, decision.ranks),
        "rank_after": (logged.rank_after, ranks),
    }
    found += [name for name, (old, new) in pairs.items() if not np.array_equal(old, new)]
    then, now = logged.deliberation, decision.deliberation
    if then is not None and now is not None:
        names = [each.name for each in fields(then)]
        found += [name for name in names if not _same(getattr(then, name), getattr(now, name))]
    elif (then is None) != (now is None):
        found.append("deliberation")
    return found


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


@dataclass(frozen=True, eq=False)
class DecidedAgain:
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
        _check_decided(self.logged)

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
        policy = _aimed_as(self.policy, self.logged)
        return replace(policy, temperature=0.0) if isinstance(policy, LearnedPolicy) else policy


def _check_decided(logged: DecisionRecord) -> None:
    if logged.correction:
        raise ConfigError(f"At step {logged.step} the guard or a person changed the ranks; no policy decided there.")


def _aimed_as(policy: Policy, logged: DecisionRecord) -> Policy:
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


@dataclass(frozen=True, eq=False)
class Agreement:
    """One decision of a run beside that of another policy on the same state.

    Attributes:
        decision: its number.
        step: optimiser steps done before it.
        modules: their names.
        ranks: of the run, int64 (modules,).
        other: of the other policy, int64 (modules,).
    """

    decision: int
    step: int
    modules: tuple[str, ...]
    ranks: IntArray
    other: IntArray

    @property
    def same(self) -> int:
        """How many modules have the same rank in both."""
        return int((self.ranks == self.other).sum())

    @property
    def distance(self) -> float:
        """See `plan_distance`."""
        return float(plan_distance(self.other, self.ranks))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        rows = zip(self.modules, self.ranks.tolist(), self.other.tolist(), strict=True)
        return {
            "decision": self.decision,
            "step": self.step,
            "same": self.same,
            "distance": self.distance,
            "modules": [{"module": name, "rank": rank, "other": other} for name, rank, other in rows],
        }


@dataclass(frozen=True, eq=False)
class Replay:
    """A run beside another policy, decision by decision.

    Attributes:
        run: name of the policy that decided in the run.
        policy: name of the other one.
        agreements: of the decisions that could be taken again.
        lacking: why others could not, a line each.
    """

    run: str
    policy: str
    agreements: tuple[Agreement, ...]
    lacking: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        rows = [agreement.to_json() for agreement in self.agreements]
        return {"run": self.run, "policy": self.policy, "decisions": rows, "lacking": list(self.lacking)}

    def table(self) -> Table:
        """One row for each decision, and below them what is lacking."""
        columns = ("decision", "step", "same ranks", "distance in log2", "mean rank", f"of {self.policy}")
        rows = [
            (
                str(row.decision),
                str(row.step),
                f"{row.same} of {len(row.ranks)}",
                f"{row.distance:.2f}",
                f"{row.ranks.mean():.1f}",
                f"{row.other.mean():.1f}",
            )
            for row in self.agreements
        ]
        table = make_table(f"{self.run} beside {self.policy}, in the states of the run", columns, rows)
        table.caption, table.caption_justify = "\n".join(self.lacking) or None, "left"
        return table


def replay(log: DecisionLog, policy: Policy) -> Replay:
    """Let a policy or rule decide in every state of a logged run.

    It decides from the ranks that the run had, so its decisions do not add up to a run of its own.

    Args:
        log: of the run.
        policy: decides.

    Raises:
        RunFolderError: there is no log, or it cannot be read.
    """
    records = log.read()
    changed = [record.number for record in records if record.correction]
    lacking = f"Decision {', '.join(map(str, changed))}: the guard or a person changed the ranks; no policy decided."
    agreements = tuple(_agreement(record, policy) for record in records if not record.correction)
    return Replay(records[0].policy, policy.name, agreements, (lacking,) if changed else ())


def _agreement(logged: DecisionRecord, policy: Policy) -> Agreement:
    return Agreement(logged.number, logged.step, logged.modules, logged.rank_after, redecide(logged, policy).ranks)
