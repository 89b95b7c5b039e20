"""Groups of modules, and the small action set for steering a run during training.

A group holds the modules of one kind in one third of the depth. Modules outside the repeated layers, such as a pooler,
form groups of their own, which no action grows. Each decision takes one action: keep everything; halve or double the
learning rate; restore the saved copy of adapters and optimizer, at a quarter of the rate; or grow a group by a rung. If
growth exceeds the budget, the modules with the lowest signals lose rungs. The first decision starts from the plan of
the default policy, modified by the action.

Group features are the means of the features of the group's modules, so a policy on groups can steer any model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.errors import ConfigError, UnknownNameError, shown
from ..common.text import kinds_in_layers
from ..cost.cost import plan_cost
from .chooser import PlanChooser
from .observation import (
    MODULE_FEATURES,
    MOST_FEATURE,
    RUN_FEATURES,
    STEPS_PREFIX,
    Observation,
    learns_labels,
    mean_feature,
)
from .policy import Decision, decided_plan, decision_to_keep, is_first
from .rate_control import CHANGES, DOUBLED, FEATURES, HALVED, KEEP, SHORTEST, UNDO, AlignmentRule, RateControl
from .settings import DecisionSchedule

THIRDS = ("lower", "middle", "upper")

NOTHING, HALVE, DOUBLE, GO_BACK = range(4)
"""The actions without rank changes, named after their effect on the learning rate."""

RATE_CHANGES = {NOTHING: KEEP, HALVE: HALVED, DOUBLE: DOUBLED, GO_BACK: UNDO}
"""Index in `CHANGES` of each action without rank changes."""

GROUP_FEATURES = (*MODULE_FEATURES, "share", "overflow")
"""Features of a group: means over its modules, its share of all modules, and what growing it takes from the others."""

STEERING = DecisionSchedule(
    probe_steps=8,
    probe_batch=2,
    fractions=(0.0, 0.04, 0.08, 0.12, 0.16, 0.21, 0.27, 0.34, 0.42, 0.52, 0.64, 0.78),
)
"""Schedule for steering: twelve decisions, denser early on."""

_IN_LAYER = re.compile(r"(^|\.)\d+\.")
"""Matches the names of modules in a numbered layer."""

ROOMY = 1.0
"""Budget, over that of rank 8 on all modules, from which no group grows: no task has more, and ranks matter little."""

WORTH_SIGNALS = ("sensitivity", "snr", "relative_change")
"""Signals averaged to rank modules for giving up rungs."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of a model.

    Attributes:
        names: names of the groups, such as "v_proj, upper third".
        member: group index of each module, int64 (modules,).
        repeated: whether a group is inside the repeated layers, bool (groups,).
    """

    names: tuple[str, ...]
    member: IntArray
    repeated: BoolArray


@lru_cache(maxsize=64)
def _groups(names: tuple[str, ...], blocks: tuple[int, ...]) -> Groups:
    inside = np.array([bool(_IN_LAYER.search(name)) for name in names])
    inside |= not inside.any()  # no layer has a number
    _, turn = np.unique(np.array(blocks)[inside], return_inverse=True)
    thirds = np.full(len(names), len(THIRDS))
    thirds[inside] = turn * len(THIRDS) // (int(turn.max()) + 1)
    pairs = list(zip(kinds_in_layers(names, blocks), thirds.tolist(), strict=True))
    order = {pair: number for number, pair in enumerate(dict.fromkeys(sorted(pairs, key=lambda pair: pair[1])))}
    repeated = np.array([third < len(THIRDS) for _, third in order])
    labels = tuple(f"{kind}, {THIRDS[third]} third" if third < len(THIRDS) else kind for kind, third in order)
    return Groups(labels, np.array([order[pair] for pair in pairs], dtype=np.int64), repeated)


def groups_of(observation: Observation) -> Groups:
    """Groups of the observed modules."""
    return _groups(observation.names, tuple(observation.problem.blocks.tolist()))


@dataclass(frozen=True, eq=False)
class GroupView:
    """Observation and allowed actions at one decision, by group.

    Attributes:
        observation: observation of the modules.
        groups: groups of the model.
    """

    observation: Observation
    groups: Groups

    @classmethod
    def of(cls, observation: Observation) -> GroupView:
        """Build the view of an observation."""
        return cls(observation, groups_of(observation))

    @cached_property
    def start(self) -> Decision:
        """Decision of an action without rank changes: first the plan of the default policy, later no change."""
        if not is_first(self.observation):
            return decision_to_keep(self.observation)
        return PlanChooser().decide(self.observation)

    @cached_property
    def ranks(self) -> IntArray:
        """Ranks an action starts from, int64 (modules,)."""
        first = is_first(self.observation)
        return decided_plan(self.observation.problem, self.start).ranks if first else self.start.ranks

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """`GROUP_FEATURES` of each group, (groups, len(GROUP_FEATURES)), at the ranks an action starts from."""
        modules, member = self.observation.modules.astype(np.float64), self.groups.member
        if is_first(self.observation):
            ladder = self.observation.problem.ladder
            modules[:, MODULE_FEATURES.index("rank")] = ladder.rung(self.ranks) / ladder.top
            modules[:, MODULE_FEATURES.index("adapted")] = self.ranks > 0
        counts = np.bincount(member, minlength=len(self.groups.names))
        sums = np.zeros((len(counts), modules.shape[1]))
        np.add.at(sums, member, modules)
        return np.column_stack([sums / counts[:, None], counts / len(member), self._overflows]).astype(np.float32)

    @property
    def _overflows(self) -> FloatArray:
        """Share of the limit by which growth of each group exceeds it, which other modules give up, (groups,)."""
        problem, groups = self.observation.problem, range(len(self.groups.names))
        costs = [plan_cost(problem.cost, self._grown(self.groups.member == group)) for group in groups]
        return np.clip(np.array(costs) / problem.limit - 1, 0.0, MOST_FEATURE)

    @property
    def run(self) -> NDArray[np.float32]:
        """`RUN_FEATURES`, (len(RUN_FEATURES),)."""
        return self.observation.run

    def run_feature(self, name: str) -> float:
        """Return one feature of the run; UnknownNameError for an unknown name."""
        if name not in RUN_FEATURES:
            raise UnknownNameError.of("feature of the run", name, RUN_FEATURES)
        return float(self.run[RUN_FEATURES.index(name)])

    @cached_property
    def worth(self) -> FloatArray:
        """Log-scale score of each module from its signals, (modules,)."""
        return mean_feature(self.observation, WORTH_SIGNALS)

    @property
    def actions(self) -> int:
        """Number of actions: four, then one per group to grow it."""
        return len(RATE_CHANGES) + len(self.groups.names)

    def grow(self, group: int) -> int:
        """Action to grow a group by a rung."""
        return len(RATE_CHANGES) + group

    @cached_property
    def allowed(self) -> BoolArray:
        """Action mask: actions with an effect and within the budget, bool (actions,); keeping is always allowed.

        On labels the rate stays: alignments of their steps are noise (docs/learning-rate.md). A run goes back once at
        most. Groups grow only under a budget below `ROOMY`.
        """
        problem, member, ladder = self.observation.problem, self.groups.member, self.observation.problem.ladder
        rungs, found = ladder.rung(self.ranks), np.zeros(self.actions, dtype=np.bool_)
        found[NOTHING] = True
        steps_seen = any(self.run_feature(name) for name in ("steps_loss", "steps_noise", "steps_time"))
        long = 10 ** (self.run_feature("horizon") + 2) > SHORTEST - 0.5  # else windows of a step or two show only noise
        shows = steps_seen and long and not learns_labels(self.run.tolist())
        found[[HALVE, DOUBLE, GO_BACK]] = shows and not is_first(self.observation)
        found[GO_BACK] &= not self.run_feature("steps_undone")
        can_rise = (rungs < problem.tops) & ~problem.is_pinned
        lowest = ladder.array[problem.bottoms]
        for group in range(len(self.groups.names)) if self.run_feature("budget") < ROOMY else ():
            own = member == group
            if self.groups.repeated[group] and (own & can_rise).any():
                alone = np.where(own, np.maximum(self._grown(own), lowest), lowest)
                found[self.grow(group)] = problem.fits(alone)
        return found

    def _grown(self, own: BoolArray) -> IntArray:
        """Ranks with some modules raised by a rung, within the bounds, int64 (modules,)."""
        problem = self.observation.problem
        rungs = problem.ladder.rung(self.ranks)
        moved = np.clip(rungs + own, problem.bottoms, np.maximum(problem.tops, rungs))
        return np.where(own, problem.ladder.array[moved], self.ranks)

    def decision(self, action: int) -> Decision:
        """Convert an action to a decision; a masked action keeps everything.

        Raises:
            ConfigError: there is no such action.
        """
        if not 0 <= action < self.actions:
            raise ConfigError(f"Actions must be from 0 to {self.actions - 1} here; got {shown(action)}.")
        if not self.allowed[action]:
            action = NOTHING
        if action in RATE_CHANGES:
            return replace(self.start, change=RATE_CHANGES[action])
        own = self.groups.member == action - len(RATE_CHANGES)
        return Decision(self._grown(own), self.worth + np.where(own, FIRST_OF_ALL, 0.0), exact=True)


def what_stays(observation: Observation) -> str:
    """Return what no action changes in a run, in a sentence each; empty if ranks and rate may both move."""
    labels, roomy = learns_labels(observation.run.tolist()), GroupView.of(observation).run_feature("budget") >= ROOMY
    rate = "On labels the learning rate stays; a trained agent leaves ranks alone, too. " if labels else ""
    return rate + ("The budget holds rank 8 on all modules, so ranks stay after the first plan." if roomy else "")


FIRST_OF_ALL = 20.0
"""Score bonus of growing modules, so that all others give way first."""


class Actor(Protocol):
    """Protocol for choosing one action per decision."""

    def act(self, view: GroupView) -> int:
        """Return an allowed action."""


@dataclass(frozen=True)
class Steering:
    """Wrap an actor as a policy: it steers ranks and rate at the times of a schedule.

    Attributes:
        name: the name in logs and tables.
        actor: chooses the actions.
        schedule: times of the decisions.
    """

    steers_rate = True
    name: str
    actor: Actor
    schedule: DecisionSchedule = STEERING

    def decide(self, observation: Observation) -> Decision:
        """Decide by the actor's action."""
        view = GroupView.of(observation)
        return view.decision(self.actor.act(view))


_FIRST_STEPS = RUN_FEATURES.index(f"{STEPS_PREFIX}{FEATURES[0].replace(' ', '_')}")


@dataclass(frozen=True)
class LeaveAlone:
    """Never changes anything."""

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return NOTHING


@dataclass(frozen=True)
class SteerRate:
    """Applies a rate control in factors of 2.

    Attributes:
        control: reads the steps. A raise is twofold here, too much for a small but certain correction.
    """

    control: RateControl = AlignmentRule(surely_above=math.inf)  # noqa: RUF009  (it is frozen)

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        if not view.allowed[DOUBLE]:
            return NOTHING
        seen = view.run[_FIRST_STEPS : _FIRST_STEPS + len(FEATURES)].astype(np.float64)
        chosen = int(self.control.act(seen[None])[0])
        if chosen == UNDO:
            return GO_BACK if view.allowed[GO_BACK] else HALVE
        return DOUBLE if CHANGES[chosen] > 0 else HALVE if CHANGES[chosen] < 0 else NOTHING


@dataclass(frozen=True)
class Halving:
    """Moves rungs to groups with larger signals, early in the run.

    Attributes:
        gain: factor on the signals, in log rank.
        margin: minimum lead over the giving group, in log rank.
        until: share of the run after which nothing moves.
    """

    gain: float = 0.5
    margin: float = 0.7
    until: float = 0.4

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        if view.run_feature("progress") > self.until:
            return NOTHING
        member, counts = view.groups.member, np.bincount(view.groups.member)
        ranks = np.bincount(member, weights=view.ranks) / counts
        score = self.gain * np.bincount(member, weights=view.worth) / counts
        grows = view.allowed[view.grow(0) :]
        lead = np.where(grows, score - np.log(ranks + 1.0), -np.inf)
        giving = np.where(ranks > 0, score - np.log(np.maximum(ranks, 0.5)), np.inf)
        if not grows.any() or lead.max() - giving.min() < self.margin:
            return NOTHING
        return view.grow(int(lead.argmax()))


@dataclass(frozen=True)
class Union:
    """Steers the rate if the steps give clear evidence, and moves rungs otherwise."""

    rate: SteerRate = SteerRate()
    ranks: Halving = Halving()

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return self.rate.act(view) or self.ranks.act(view)


_ACTORS: dict[str, Actor] = {"left-alone": LeaveAlone(), "rate": SteerRate(), "halving": Halving(), "union": Union()}

GROUP_RULES = {name: Steering(name, actor) for name, actor in _ACTORS.items()}
"""Rules by name."""
