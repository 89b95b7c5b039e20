"""Repeat logged decisions with the original policy, another one, or a single change.

A question names the change. Its amounts are whole steps of a fixed size, so answers state exactly what was tried. A
coarse grid of amounts finds one that changes the decision, and bisection the first such step. The decision is repeated
at that amount and at one step less; an answer claims no more than these two show. A decision that changes and changes
back between grid amounts goes unnoticed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import exp
from typing import Any, Literal

import numpy as np
from rich.table import Table

from ..common.arrays import FloatArray, IntArray
from ..common.errors import ConfigError
from ..common.text import cost_text, make_table, plural, short_names
from ..decide.chooser import PlanChooser
from ..decide.log import DecisionLog, DecisionRecord
from ..decide.observation import MODULE_FEATURES, Observation, with_limit
from ..decide.policy import Decision, Policy, decided_plan, keeps, plan_distance
from ..lora.adapters import SIGNALS

SIGNAL_COLUMNS = [MODULE_FEATURES.index(name) for name in SIGNALS]


@dataclass(frozen=True, eq=False)
class DecidedAgain:
    """A logged decision and a policy to repeat it; see `redecide`.

    Attributes:
        logged: the decision.
        policy: the deciding policy.
    """

    logged: DecisionRecord
    policy: Policy

    @property
    def observation(self) -> Observation:
        """The policy's input."""
        return self.logged.observation

    @cached_property
    def decision(self) -> Decision:
        """The repeated decision."""
        return self.policy.decide(self.observation)

    @cached_property
    def ranks(self) -> IntArray:
        """Ranks of the resulting plan, int64 (modules,)."""
        return decided_plan(self.logged.problem, self.decision).ranks

    @cached_property
    def differences(self) -> tuple[str, ...]:
        """Differences from the log, in words; empty if all is bitwise equal."""
        then, now = self.logged, self.decision
        settings = ("rank_floor", "depth_bias", "change")
        found = [name for name in settings if getattr(then.decision, name) != getattr(now, name)]
        if then.kept != keeps(self.observation, now):
            found.append("kept")
        pairs: dict[str, tuple[Any, Any]] = {"score": (then.decision.scores, now.scores)}
        pairs |= {"rank_wanted": (then.rank_wanted, now.ranks), "rank_after": (then.rank_after, self.ranks)}
        if then.choice is not None and now.choice is not None:
            names = [each.name for each in fields(then.choice)]
            pairs |= {name: (getattr(then.choice, name), getattr(now.choice, name)) for name in names}
        elif then.choice is not now.choice:
            pairs["choice"] = (then.choice, now.choice)
        return (*found, *(name for name, (old, new) in pairs.items() if not np.array_equal(old, new)))


def redecide(logged: DecisionRecord, policy: Policy) -> DecidedAgain:
    """Repeat a logged decision with the logged goal.

    Args:
        logged: the decision, from `DecisionLog.logged`.
        policy: the deciding policy.

    Raises:
        ConfigError: the decision was not made by a policy.
    """
    if logged.correction:
        raise ConfigError(f"At step {logged.step} the guard or a user changed the ranks; no policy decided.")
    if logged.choice and isinstance(policy, PlanChooser):
        policy = replace(policy, goal=logged.choice.goal)
    return DecidedAgain(logged, policy)


def with_signals(observation: Observation, shifts: FloatArray) -> Observation:
    """Return the observation with shifted signals, each as a log and centred again over the modules.

    Args:
        observation: the observation at a decision.
        shifts: added to the signals, (modules, len(SIGNALS)).
    """
    modules = observation.modules.copy()
    signals = modules[:, SIGNAL_COLUMNS] + shifts
    modules[:, SIGNAL_COLUMNS] = np.clip(signals - signals.mean(axis=0), -3, 3)
    return replace(observation, modules=modules)


def with_bounds(observation: Observation, module: int, least: int = 0, most: int = sys.maxsize) -> Observation:
    """Return the same decision with a least and a most rank for one module."""
    problem = observation.problem
    low = (np.zeros_like(problem.ranks) if problem.low is None else problem.low).copy()
    high = (problem.max_ranks if problem.high is None else problem.high).copy()
    low[module], high[module] = max(least, int(low[module])), min(most, int(high[module]))
    return replace(observation, problem=replace(problem, low=low, high=high))


@dataclass(frozen=True, eq=False)
class Agreement:
    """A logged decision compared with another policy's in the same state.

    Attributes:
        logged: the decision.
        other: ranks of the other policy, int64 (modules,).
    """

    logged: DecisionRecord
    other: IntArray

    @property
    def same(self) -> int:
        """Number of modules with the same rank in both."""
        return int((self.logged.rank_after == self.other).sum())

    @property
    def distance(self) -> float:
        """See `plan_distance`."""
        return float(plan_distance(self.other, self.logged.rank_after))

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        logged = self.logged
        rows = zip(logged.modules, logged.rank_after.tolist(), self.other.tolist(), strict=True)
        modules = [{"module": name, "rank": rank, "other": other} for name, rank, other in rows]
        facts = {"decision": logged.number, "step": logged.step, "same": self.same, "distance": self.distance}
        return {**facts, "modules": modules}


@dataclass(frozen=True, eq=False)
class Replay:
    """A run compared with another policy, decision by decision.

    Attributes:
        run: name of the run's policy.
        policy: name of the other policy.
        agreements: results for the repeatable decisions.
        lacking: reasons for missing ones, a line each.
    """

    run: str
    policy: str
    agreements: tuple[Agreement, ...]
    lacking: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        rows = [agreement.to_json() for agreement in self.agreements]
        return {"run": self.run, "policy": self.policy, "decisions": rows, "lacking": list(self.lacking)}

    def table(self) -> Table:
        """Return a table with one row per decision, and the missing ones below."""
        columns = ("decision", "step", "same ranks", "distance in log2", "mean rank", f"from {self.policy}")
        rows = []
        for row in self.agreements:
            same, distance = f"{row.same} of {len(row.other)}", f"{row.distance:.2f}"
            mean, other = (f"{ranks.mean():.1f}" for ranks in (row.logged.rank_after, row.other))
            rows.append((str(row.logged.number), str(row.logged.step), same, distance, mean, other))
        table = make_table(f"{self.run} versus {self.policy}, replayed on the states of the run", columns, rows)
        table.caption, table.caption_justify = "\n".join(self.lacking) or None, "left"
        return table


def replay(log: DecisionLog, policy: Policy) -> Replay:
    """Let a policy or rule decide in every state of a logged run.

    Each decision starts from the run's own ranks, so they do not form a run of their own.

    Args:
        log: log of the run.
        policy: the deciding policy.

    Raises:
        RunFolderError: there is no log, or it cannot be read.
    """
    records = log.read()
    changed = [record.number for record in records if record.correction]
    lacking = f"Decision {', '.join(map(str, changed))}: the guard or a user changed the ranks; no policy decided."
    agreements = tuple(Agreement(each, redecide(each, policy).ranks) for each in records if not each.correction)
    return Replay(records[0].policy, policy.name, agreements, (lacking,) if changed else ())


Kind = Literal["signals", "budget", "most", "least", "tolerance"]

SIZES = {"signals": 0.01, "budget": 0.001, "tolerance": 0.001}
"""Step sizes: in the log of signals, as a share of the budget, in log loss. Bounds move rung by rung."""

GRID = (2, 5, 10, 20, 50, 100, 200, 400)
"""Amounts to try first, in steps. Bounds try every rung."""


@dataclass(frozen=True)
class Question:
    """A change, and its intended effect.

    Attributes:
        kind: "signals" of modules (all by the same amount, in log), "budget", the "most" or the "least" rank of one
            module, or the "tolerance" of a goal of cost.
        direction: 1 for more, -1 for less; ignored for bounds: "most" decreases and "least" increases.
        modules: indices of the modules with changed signals or bound.
        label: their display name.
        target: index of the module whose rank should change; None for any module.
    """

    kind: Kind
    direction: int = 1
    modules: tuple[int, ...] = ()
    label: str = ""
    target: int | None = None

    def again(self, case: DecidedAgain, steps: int) -> DecidedAgain:
        """Repeat the decision after a change by this many steps.

        Raises:
            ConfigError: a tolerance was asked about, but the decision has no goal of cost.
        """
        if steps == 0:
            return case
        observation, amount = case.observation, self.amount(case, steps)
        if self.kind == "tolerance":
            chooser = _thrifty(case)
            return replace(case, policy=replace(chooser, goal=replace(chooser.goal, tolerance=amount)))
        if self.kind == "signals":
            shifts = np.zeros((len(observation.modules), len(SIGNALS)))
            shifts[list(self.modules)] = amount
            changed = with_signals(observation, shifts)
        elif self.kind == "budget":
            changed = with_limit(observation, amount)
        else:
            changed = with_bounds(observation, self.modules[0], **{self.kind: int(amount)})
        return replace(case, logged=replace(case.logged, observation=changed))

    def amount(self, case: DecidedAgain, steps: int) -> float:
        """Return the size of a number of steps: the signals' shift, or the resulting budget, bound or tolerance."""
        problem = case.observation.problem
        if self.kind == "most":
            return float(problem.ladder.array[problem.tops[self.modules[0]] - steps])
        if self.kind == "least":
            return float(problem.ladder.array[problem.bottoms[self.modules[0]] + steps])
        change = round(self.direction * steps * SIZES[self.kind], 6)
        if self.kind == "signals":
            return change
        if self.kind == "tolerance":
            return round(_thrifty(case).goal.tolerance + change, 6)
        return problem.limit * (1 + change)

    def amounts(self, case: DecidedAgain) -> Sequence[int]:
        """Return the amounts to try first, in ascending steps."""
        if self.kind in ("most", "least"):
            problem, module = case.observation.problem, self.modules[0]
            return range(1, int(problem.tops[module] - problem.bottoms[module]) + 1)
        return [steps for steps in GRID if self.kind != "tolerance" or 0 <= self.amount(case, steps) <= 1]

    def answers(self, before: IntArray, after: IntArray) -> bool:
        """True if the intended ranks differ."""
        moved = before != after
        return bool(moved.any() if self.target is None else moved[self.target])


@dataclass(frozen=True, eq=False)
class WhatIf:
    """The smallest change found, and its effect.

    Attributes:
        question: the change.
        steps: number of steps; one step less has no effect.
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
        """Number of other modules with changed ranks, excluding the changed modules and the target."""
        target = self.question.target
        asked = self.question.modules if target is None else (target,)
        moved = self.before != self.after
        moved[list(asked)] = False
        return int(moved.sum())

    def holds(self, case: DecidedAgain) -> bool:
        """True if repeated decisions reproduce this, at the change and at one step less."""
        plans = [self.question.again(case, steps).ranks for steps in (self.steps, self.steps - 1)]
        same = np.array_equal(plans[0], self.after) and np.array_equal(case.ranks, self.before)
        changed, unchanged = (self.question.answers(self.before, plan) for plan in plans)
        return same and changed and not unchanged


def what_if(case: DecidedAgain, question: Question) -> WhatIf | None:
    """Return the smallest change that answers a question; None if no grid amount does.

    Raises:
        ConfigError: see `Question.again`.
    """
    below = 0
    for steps in question.amounts(case):
        again = question.again(case, steps)
        if question.answers(case.ranks, again.ranks):
            break
        below = steps
    else:
        return None
    while steps - below > 1:
        middle = (steps + below) // 2
        found = question.again(case, middle)
        if question.answers(case.ranks, found.ranks):
            steps, again = middle, found
        else:
            below = middle
    return WhatIf(question, steps, case.ranks, again.ranks, _text(case, question, steps, again))


def _thrifty(case: DecidedAgain) -> PlanChooser:
    if not isinstance(case.policy, PlanChooser) or not case.policy.goal.saves:
        raise ConfigError(f"{case.policy.name} has no cost goal here, so there is no tolerance to change.")
    return case.policy


def _text(case: DecidedAgain, question: Question, steps: int, again: DecidedAgain) -> str:
    before, after = case.ranks, again.ranks
    moved, target = before != after, question.target
    if target is None:
        effect = f"{plural(int(moved.sum()), 'module')} would have another rank"
        then, now = (each and each.names[each.taken] for each in (case.decision.choice, again.decision.choice))
        effect = f"the plan would be {now}" if now and now != then else effect
    else:
        others = int(moved.sum()) - 1
        effect = f"{short_names(case.observation.names)[target]} would have rank {after[target]} instead of "
        effect += f"{before[target]}" + (f", and {plural(others, 'other module')} another rank" if others else "")
    return f"{_condition(case, question, steps)}, {effect}."


def _condition(case: DecidedAgain, question: Question, steps: int) -> str:
    amount, less = question.amount(case, steps), question.direction * (steps - 1)

    def but(before: str) -> str:
        """Describe the effect of one step less."""
        unchanged = "changes nothing" if question.target is None else "does not change its rank"
        return f"{before} {unchanged}" if steps > 1 else "the smallest step tried"

    if question.kind == "signals":
        detail = f"{amount:+.2f} in log; {but(f'{0.01 * less:+.2f}')}"
        return f"If the signals of {question.label} were {exp(amount):.3g} times as strong ({detail})"
    if question.kind == "tolerance":
        before = _thrifty(case).goal.tolerance
        detail = but(f"{question.amount(case, steps - 1):.4g}")
        return f"With a tolerance of {amount:.4g} instead of {before:.4g} ({detail})"
    if question.kind == "budget":
        word = "larger" if question.direction > 0 else "smaller"
        detail = f"{cost_text(amount, case.observation.problem.cost.unit)}; {but(f'{0.1 * abs(less):.1f} %')}"
        return f"With a budget {0.1 * steps:.1f} % {word} ({detail})"
    words = "could have rank {} at most" if question.kind == "most" else "had to have rank {} at least"
    detail = f" ({but(f'{question.amount(case, steps - 1):.0f}')})" if steps > 1 else ""
    return f"If {question.label} {words.format(f'{amount:.0f}')}{detail}"


def usual_questions(case: DecidedAgain) -> list[Question]:
    """Return common questions: budget and tolerance, or signals and a bound of the highest-rank module."""
    found = case.decision.choice
    kinds: list[Kind] = ["budget", "tolerance"] if found and found.goal.saves else ["budget"]
    questions = [Question(kind, direction) for kind in kinds for direction in (-1, 1)]
    if found:
        return questions
    names, first = short_names(case.observation.names), int(np.argmax(case.ranks))
    alike = tuple(number for number, name in enumerate(names) if name.kind == names[first].kind)
    weaker = Question("signals", -1, (first,), str(names[first]), first)
    all_weaker = Question("signals", -1, alike, f"all {names[first].kind} modules")
    return [*questions, weaker, all_weaker, replace(weaker, kind="most")]
