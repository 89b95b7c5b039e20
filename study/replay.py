"""Decisions of a log taken again: by the policy that took them, by another one, or with one thing changed.

A question names what is changed. Its amounts are whole steps of a size of its own, so that what a statement says is
exactly what was tried. A coarse grid of amounts finds one that changes the decision, and bisection the first step at
which it does. The decision is taken again at that amount and at one step less; a statement says no more than these two
gave. Between the amounts of the grid a decision may change and change back, which would not be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import exp
from typing import Any, Literal

import numpy as np
from rich.table import Table

from ..agents.learned.policy import LearnedPolicy
from ..agents.log import DecisionLog, DecisionRecord
from ..agents.observation import MODULE_FEATURES, Observation, with_limit
from ..agents.policy import Decision, Policy, decided_plan, keeps, plan_distance
from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.text import cost_text, make_table, plural, short_names
from ..errors import ConfigError
from ..lora.adapters import SIGNALS
from ..plan.plan import pack, under_limit
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


Kind = Literal["signals", "budget", "recipe budget", "most", "least", "caution"]

SIZES = {"signals": 0.01, "budget": 0.001, "recipe budget": 0.001, "caution": 0.01}
"""How large a step is: in the log of signals, as a share of the budget, of caution. Bounds go rung by rung."""

_OF_BUDGET = (2, 5, 10, 20, 50, 100, 200, 400)
GRID: dict[str, tuple[int, ...]] = {
    "signals": (5, 10, 20, 40, 80, 160),
    "budget": _OF_BUDGET,
    "recipe budget": _OF_BUDGET,
    "caution": tuple(range(10, 310, 10)),
}
"""The amounts that are tried first, in steps. Of bounds every rung is tried."""


PROBE_NOISE = 0.3
"""The noise that signals have: two probes of one task on other batches differ so much (docs/experiments.md)."""

SURE = 0.9
"""A module is sure whose rank stays within a rung in this share of the draws."""


@dataclass(frozen=True)
class Question:
    """What is changed, and what is to change by it.

    Attributes:
        kind: "signals" of modules (all of them by the same amount, in log), "budget", "recipe budget" (the budget,
            while the scores, the rank floor and the depth bias stay), the "most" or the "least" rank of one module, or
            the "caution": how many standard deviations of the votes the lower bound takes off.
        direction: 1 for more, -1 for less; of the bounds "most" goes down and "least" goes up whatever this is.
        modules: numbers of the modules whose signals or bound are changed.
        label: what people call them.
        target: number of the module whose rank is to change; None for that of any module.
    """

    kind: Kind
    direction: int = 1
    modules: tuple[int, ...] = ()
    label: str = ""
    target: int | None = None

    def plan(self, case: DecidedAgain, steps: int) -> IntArray:
        """The ranks after a change by so many steps, int64 (modules,).

        Raises:
            ConfigError: caution in a policy that has no votes, or a recipe where there was none.
        """
        if steps == 0:
            return case.decide(case.observation)
        observation, amount = case.observation, self.amount(case, steps)
        if self.kind == "signals":
            shifts = np.zeros((len(observation.modules), len(SIGNALS)))
            shifts[list(self.modules)] = amount
            return case.decide(with_signals(observation, shifts))
        if self.kind == "budget":
            return case.decide(with_limit(observation, amount))
        if self.kind == "recipe budget":
            return _same_recipe(case, amount)
        if self.kind == "caution":
            return _with_caution(case, amount)
        change = with_most if self.kind == "most" else with_least
        return case.decide(change(observation, self.modules[0], int(amount)))

    def amount(self, case: DecidedAgain, steps: int) -> float:
        """What so many steps are: the shift of the signals, or the budget, bound or caution that they lead to."""
        problem = case.observation.problem
        if self.kind == "most":
            return float(problem.ladder.array[problem.tops[self.modules[0]] - steps])
        if self.kind == "least":
            return float(problem.ladder.array[problem.bottoms[self.modules[0]] + steps])
        change = round(self.direction * steps * SIZES[self.kind], 6)
        if self.kind == "signals":
            return change
        return round(_caution(case) + change, 6) if self.kind == "caution" else problem.limit * (1 + change)

    def amounts(self, case: DecidedAgain) -> Sequence[int]:
        """The amounts that are tried first, in steps, rising."""
        if self.kind in ("most", "least"):
            problem, module = case.observation.problem, self.modules[0]
            return range(1, int(problem.tops[module] - problem.bottoms[module]) + 1)
        grid = GRID[self.kind]
        if self.kind == "caution" and self.direction < 0:
            return [steps for steps in grid if self.amount(case, steps) >= 0]
        return grid

    def answers(self, before: IntArray, after: IntArray) -> bool:
        """Whether the ranks differ where they are to."""
        moved = before != after
        return bool(moved.any() if self.target is None else moved[self.target])


@dataclass(frozen=True, eq=False)
class WhatIf:
    """The smallest change that was found, and what it does.

    Attributes:
        question: what is changed.
        steps: by how many steps; one step less does not do it.
        before: ranks without the change, int64 (modules,).
        after: ranks with it, int64 (modules,).
        text: the answer in words.
    """

    question: Question
    steps: int
    before: IntArray
    after: IntArray
    text: str

    @property
    def side_effects(self) -> int:
        """How many other modules have another rank: not those that were changed, or whose rank was to change."""
        target = self.question.target
        asked = self.question.modules if target is None else (target,)
        moved = self.before != self.after
        moved[list(asked)] = False
        return int(moved.sum())

    def holds(self, case: DecidedAgain) -> bool:
        """Whether deciding again gives just this, at the change and at one step less of it."""
        plans = [self.question.plan(case, steps) for steps in (self.steps, self.steps - 1)]
        same = np.array_equal(plans[0], self.after) and np.array_equal(case.plan, self.before)
        changed, unchanged = (self.question.answers(self.before, plan) for plan in plans)
        return same and changed and not unchanged


def what_if(case: DecidedAgain, question: Question) -> WhatIf | None:
    """The smallest change that answers a question; None if none of the grid does.

    Raises:
        ConfigError: see `Question.plan`.
    """
    before, below = case.plan, 0
    for steps in question.amounts(case):
        after = question.plan(case, steps)
        if question.answers(before, after):
            break
        below = steps
    else:
        return None
    while steps - below > 1:
        middle = (steps + below) // 2
        plan = question.plan(case, middle)
        if question.answers(before, plan):
            steps, after = middle, plan
        else:
            below = middle
    return WhatIf(question, steps, before, after, _text(case, question, steps, before, after))


def _caution(case: DecidedAgain) -> float:
    deliberation = case.decision.deliberation
    if deliberation is None:
        raise ConfigError(f"{case.policy.name} has no value ensemble: there are no votes, and no caution to change.")
    return deliberation.lcb_coefficient


def _with_caution(case: DecidedAgain, caution: float) -> IntArray:
    deliberation = case.decision.deliberation
    assert deliberation is not None
    return np.asarray(deliberation.plans[replace(deliberation, lcb_coefficient=caution).favourite])


def _same_recipe(case: DecidedAgain, limit: float) -> IntArray:
    """The ranks that the same scores, rank floor and depth bias lead to under another limit."""
    decision, problem = case.decision, under_limit(case.observation.problem, limit)
    if not decision.rank_floor:
        raise ConfigError("The decision did not follow from scores and a rank floor: there is no recipe to keep.")
    ranks = pack(problem, decision.scores, decision.rank_floor, decision.depth_bias)
    return case.plan_of(problem, replace(decision, ranks=ranks))


def _text(case: DecidedAgain, question: Question, steps: int, before: IntArray, after: IntArray) -> str:
    moved, target = before != after, question.target
    if target is None:
        effect = f"{plural(int(moved.sum()), 'module')} would have another rank"
    else:
        others = int(moved.sum()) - 1
        name = short_names(case.observation.names)[target]
        effect = f"{name} would have rank {after[target]} instead of {before[target]}"
        effect += f", and {plural(others, 'other module')} another rank" if others else ""
    return f"{_condition(case, question, steps)}, {effect}."


def _condition(case: DecidedAgain, question: Question, steps: int) -> str:
    amount, less = question.amount(case, steps), question.direction * (steps - 1)

    def but(before: str) -> str:
        """What one step less does."""
        if steps == 1:
            return "the smallest step that was tried"
        return f"{before} {'changes nothing' if question.target is None else 'leaves its rank as it is'}"

    if question.kind == "signals":
        detail = f"{amount:+.2f} in log; {but(f'{0.01 * less:+.2f}')}"
        return f"If the signals of {question.label} were {exp(amount):.3g} times as strong ({detail})"
    if question.kind == "caution":
        before = _caution(case)
        detail = but(f"{before + 0.01 * less:.2f}")
        return f"With a caution of {amount:.2f} instead of {before:.2f} standard deviations ({detail})"
    if question.kind in ("budget", "recipe budget"):
        word = "larger" if question.direction > 0 else "smaller"
        detail = f"{cost_text(amount, case.observation.problem.cost.unit)}; {but(f'{0.1 * abs(less):.1f} %')}"
        recipe = "the same recipe and " if question.kind == "recipe budget" else ""
        return f"With {recipe}a budget {0.1 * steps:.1f} % {word} ({detail})"
    words = "might have rank {} at most" if question.kind == "most" else "had to have rank {} at least"
    detail = f" ({but(f'{question.amount(case, steps - 1):.0f}')})" if steps > 1 else ""
    return f"If {question.label} {words.format(f'{amount:.0f}')}{detail}"


# Questions ------------------------------------------------------------------------------------------------------------


def usual_questions(case: DecidedAgain) -> list[Question]:
    """What people ask first: caution, budget, the module of the highest rank, its type, and a bound on it."""
    names = short_names(case.observation.names)
    first = int(np.argmax(case.plan))
    alike = tuple(number for number, name in enumerate(names) if name.kind == names[first].kind)
    kinds: list[Kind] = [*_kinds(case, "caution"), "budget", *_kinds(case, "recipe budget")]
    questions = [Question(kind, direction) for kind in kinds for direction in (-1, 1)]
    questions.append(Question("signals", -1, (first,), str(names[first]), first))
    questions.append(Question("signals", -1, alike, f"all {names[first].kind} modules"))
    questions.append(Question("most", -1, (first,), str(names[first]), first))
    return questions


def _kinds(case: DecidedAgain, kind: Kind) -> list[Kind]:
    """The kind, if the decision has what it asks about."""
    known = case.decision.deliberation is not None if kind == "caution" else case.decision.rank_floor > 0
    return [kind] if known else []


# Noise ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stability:
    """What noise leaves of a decision.

    Attributes:
        noise: standard deviation of what was added to each signal of each module, in log.
        draws: how often.
        same: share of the draws with the same plan.
        near: share of the draws in which a module's rank stays within one rung, float64 (modules,).
    """

    noise: float
    draws: int
    same: float
    near: FloatArray

    @property
    def sure(self) -> BoolArray:
        """The modules whose rank noise does not move, bool (modules,)."""
        return self.near >= SURE

    def sentence(self) -> str:
        """The same in words."""
        return (
            f"Noise of {self.noise:g} in the log of every signal leaves the plan as it is in {self.same:.0%} of "
            f"{self.draws} draws; {int(self.sure.sum())} of {len(self.near)} modules stay within one rung in at least "
            f"{SURE:.0%} of them."
        )

    def to_json(self) -> dict[str, Any]:
        """What pages read, as JSON values."""
        return {"same": self.same, "noise": self.noise, "sure": self.sure.tolist()}


def stability(logged: DecisionRecord, policy: Policy, noise: float = 0.05, draws: int = 50) -> Stability:
    """Take a decision again with normal noise on the signals.

    Args:
        logged: the decision.
        policy: takes it again.
        noise: standard deviation, in log; at least 0.
        draws: how often, at least 1. They are the same each time.

    Raises:
        ConfigError: noise or draws out of range, or no policy decided there.
    """
    if not noise >= 0 or draws < 1:
        raise ConfigError(f"noise is at least 0 and draws are at least 1; got {noise} and {draws}.")
    case, generator = DecidedAgain(logged, policy), np.random.default_rng(0)
    ladder, shape = logged.problem.ladder, (len(case.plan), len(SIGNALS))
    shifts = (generator.normal(0, noise, shape) for _ in range(draws))
    plans = np.stack([case.decide(with_signals(case.observation, shift)) for shift in shifts])
    rungs = np.abs(ladder.rung(plans) - ladder.rung(case.plan))
    return Stability(noise, draws, float((plans == case.plan).all(axis=1).mean()), (rungs <= 1).mean(axis=0))
