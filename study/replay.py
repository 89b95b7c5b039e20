"""Decisions of a log taken again: by the policy that took them, by another one, or with one thing changed.

A question names what is changed. Its amounts are whole steps of a size of its own, so that what a statement says is
exactly what was tried. A coarse grid of amounts finds one that changes the decision, and bisection the first step at
which it does. The decision is taken again at that amount and at one step less; a statement says no more than these two
gave. Between the amounts of the grid a decision may change and change back, which would not be seen.
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
from ..common.text import cost_text, make_table, plural, short_names
from ..decide.chooser import PlanChooser
from ..decide.log import DecisionLog, DecisionRecord
from ..decide.observation import MODULE_FEATURES, Observation, with_limit
from ..decide.policy import Decision, Policy, decided_plan, keeps, plan_distance
from ..errors import ConfigError
from ..lora.adapters import SIGNALS

SIGNAL_COLUMNS = [MODULE_FEATURES.index(name) for name in SIGNALS]


@dataclass(frozen=True, eq=False)
class DecidedAgain:
    """A logged decision and a policy that takes it again; see `redecide`.

    Attributes:
        logged: the decision.
        policy: decides.
    """

    logged: DecisionRecord
    policy: Policy

    @property
    def observation(self) -> Observation:
        """What the policy sees."""
        return self.logged.observation

    @cached_property
    def decision(self) -> Decision:
        """The decision as it is taken now."""
        return self.policy.decide(self.observation)

    @cached_property
    def ranks(self) -> IntArray:
        """Those of the plan to which it leads, int64 (modules,)."""
        return decided_plan(self.logged.problem, self.decision).ranks

    @cached_property
    def differences(self) -> tuple[str, ...]:
        """What differs from the log, in words; empty if all is equal, bit for bit."""
        then, now = self.logged, self.decision
        found = [
            name
            for name in ("rank_floor", "depth_bias", "change")
            if getattr(then.decision, name) != getattr(now, name)
        ]
        if then.kept != keeps(self.observation, now):
            found.append("kept")
        pairs = {
            "score": (then.decision.scores, now.scores),
            "rank_wanted": (then.rank_wanted, now.ranks),
            "rank_after": (then.rank_after, self.ranks),
        }
        found += [name for name, (old, new) in pairs.items() if not np.array_equal(old, new)]
        if then.choice is not None and now.choice is not None:
            names = [each.name for each in fields(then.choice)]
            found += [name for name in names if not _same(getattr(then.choice, name), getattr(now.choice, name))]
        elif then.choice is not now.choice:
            found.append("choice")
        return tuple(found)


def redecide(logged: DecisionRecord, policy: Policy) -> DecidedAgain:
    """Take a logged decision again, with the goal of the log.

    Args:
        logged: the decision, as `DecisionLog.logged` gives it.
        policy: who decides now.

    Raises:
        ConfigError: no policy decided there.
    """
    if logged.correction:
        raise ConfigError(f"At step {logged.step} the guard or a person changed the ranks; no policy decided there.")
    if logged.choice and isinstance(policy, PlanChooser):
        policy = replace(policy, goal=logged.choice.goal)
    return DecidedAgain(logged, policy)


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


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


def with_bounds(observation: Observation, module: int, least: int = 0, most: int = sys.maxsize) -> Observation:
    """The same decision where one module must have this rank at least, and may have that one at most."""
    problem = observation.problem
    low = (np.zeros_like(problem.ranks) if problem.low is None else problem.low).copy()
    high = (problem.max_ranks if problem.high is None else problem.high).copy()
    low[module], high[module] = max(least, int(low[module])), min(most, int(high[module]))
    return replace(observation, problem=replace(problem, low=low, high=high))


@dataclass(frozen=True, eq=False)
class Agreement:
    """One decision of a run beside that of another policy on the same state.

    Attributes:
        logged: the decision.
        other: ranks of the other policy, int64 (modules,).
    """

    logged: DecisionRecord
    other: IntArray

    @property
    def same(self) -> int:
        """How many modules have the same rank in both."""
        return int((self.logged.rank_after == self.other).sum())

    @property
    def distance(self) -> float:
        """See `plan_distance`."""
        return float(plan_distance(self.other, self.logged.rank_after))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        logged = self.logged
        rows = zip(logged.modules, logged.rank_after.tolist(), self.other.tolist(), strict=True)
        return {
            "decision": logged.number,
            "step": logged.step,
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
                str(row.logged.number),
                str(row.logged.step),
                f"{row.same} of {len(row.other)}",
                f"{row.distance:.2f}",
                f"{row.logged.rank_after.mean():.1f}",
                f"{row.other.mean():.1f}",
            )
            for row in self.agreements
        ]
        table = make_table(f"{self.run} versus {self.policy}, in the states of the run", columns, rows)
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
    agreements = tuple(Agreement(each, redecide(each, policy).ranks) for each in records if not each.correction)
    return Replay(records[0].policy, policy.name, agreements, (lacking,) if changed else ())


Kind = Literal["signals", "budget", "most", "least", "tolerance"]

SIZES = {"signals": 0.01, "budget": 0.001, "tolerance": 0.001}
"""How large a step is: in the log of signals, as a share of the budget, in log loss. Bounds go rung by rung."""

GRID = (2, 5, 10, 20, 50, 100, 200, 400)
"""The amounts that are tried first, in steps. Of bounds every rung is tried."""


@dataclass(frozen=True)
class Question:
    """What is changed, and what is to change by it.

    Attributes:
        kind: "signals" of modules (all of them by the same amount, in log), "budget", the "most" or the "least" rank of
            one module, or the "tolerance" of a goal of cost.
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

    def again(self, case: DecidedAgain, steps: int) -> DecidedAgain:
        """The decision after a change by so many steps.

        Raises:
            ConfigError: the tolerance of a decision that follows no goal of cost.
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
        """What so many steps are: the shift of the signals, or the budget, bound or tolerance that they lead to."""
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
        """The amounts that are tried first, in steps, rising."""
        if self.kind in ("most", "least"):
            problem, module = case.observation.problem, self.modules[0]
            return range(1, int(problem.tops[module] - problem.bottoms[module]) + 1)
        return [steps for steps in GRID if self.kind != "tolerance" or 0 <= self.amount(case, steps) <= 1]

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
        plans = [self.question.again(case, steps).ranks for steps in (self.steps, self.steps - 1)]
        same = np.array_equal(plans[0], self.after) and np.array_equal(case.ranks, self.before)
        changed, unchanged = (self.question.answers(self.before, plan) for plan in plans)
        return same and changed and not unchanged


def what_if(case: DecidedAgain, question: Question) -> WhatIf | None:
    """The smallest change that answers a question; None if none of the grid does.

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
        raise ConfigError(f"{case.policy.name} follows no goal of cost here: there is no tolerance to change.")
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
        """What one step less does."""
        if steps == 1:
            return "the smallest step that was tried"
        return f"{before} {'changes nothing' if question.target is None else 'leaves its rank as it is'}"

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
    words = "might have rank {} at most" if question.kind == "most" else "had to have rank {} at least"
    detail = f" ({but(f'{question.amount(case, steps - 1):.0f}')})" if steps > 1 else ""
    return f"If {question.label} {words.format(f'{amount:.0f}')}{detail}"


def usual_questions(case: DecidedAgain) -> list[Question]:
    """What people ask first: the budget and the tolerance, or signals and a bound of the module of the highest rank."""
    found = case.decision.choice
    kinds: list[Kind] = ["budget", "tolerance"] if found and found.goal.saves else ["budget"]
    questions = [Question(kind, direction) for kind in kinds for direction in (-1, 1)]
    if found:
        return questions
    names, first = short_names(case.observation.names), int(np.argmax(case.ranks))
    alike = tuple(number for number, name in enumerate(names) if name.kind == names[first].kind)
    return [
        *questions,
        Question("signals", -1, (first,), str(names[first]), first),
        Question("signals", -1, alike, f"all {names[first].kind} modules"),
        Question("most", -1, (first,), str(names[first]), first),
    ]
