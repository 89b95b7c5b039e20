"""Groups of modules, and the few actions by which a run is steered while it goes.

A group holds the modules of one kind in one third of the depth. At a decision one action is taken: keep all as it is;
halve or double the learning rate; go back to the copy of adapters and optimizer that was kept, at a quarter of the
rate; let a group grow by a rung; or take a rung from it. A group that grows beyond the budget takes rungs from the
modules whose signals are lowest. The first decision begins with the plan of the default policy, and its action changes
that plan.

What is seen of a group are the means of its modules' features, so a policy that reads groups can steer any model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.text import kinds_in_layers
from ..errors import ConfigError, UnknownNameError, shown
from .chooser import PlanChooser
from .observation import MODULE_FEATURES, RUN_FEATURES, Observation, mean_feature
from .policy import Decision, decided_plan, decision_to_keep, is_first
from .rate_control import DOUBLED, HALVED, KEEP, SHORTEST, UNDO
from .settings import DecisionSchedule

THIRDS = ("lower", "middle", "upper")

NOTHING, HALVE, DOUBLE, GO_BACK = range(4)
"""The actions that move no rank, and what each does to the learning rate."""

RATE_CHANGES = {NOTHING: KEEP, HALVE: HALVED, DOUBLE: DOUBLED, GO_BACK: UNDO}
"""The number in `CHANGES` of each action that moves no rank."""

GROUP_FEATURES = (*MODULE_FEATURES, "share")
"""What is seen of a group: means over its modules, and its share of all modules."""

STEERING = DecisionSchedule(
    probe_steps=8,
    probe_batch=2,
    fractions=(0.0, 0.04, 0.08, 0.12, 0.16, 0.21, 0.27, 0.34, 0.42, 0.52, 0.64, 0.78),
)
"""When runs are steered: twelve decisions, denser early."""

WORTH_SIGNALS = ("sensitivity", "snr", "relative_change")
"""Signals whose mean tells which modules give way first."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a model.

    Attributes:
        names: of the groups, such as "v_proj, upper third".
        member: the group of each module, int64 (modules,).
    """

    names: tuple[str, ...]
    member: IntArray


@lru_cache(maxsize=64)
def _groups(names: tuple[str, ...], blocks: tuple[int, ...]) -> Groups:
    _, turn = np.unique(blocks, return_inverse=True)
    thirds = turn * len(THIRDS) // (int(turn.max()) + 1)
    pairs = list(zip(kinds_in_layers(names, blocks), thirds.tolist(), strict=True))
    order = {pair: number for number, pair in enumerate(dict.fromkeys(sorted(pairs, key=lambda pair: pair[1])))}
    labels = tuple(f"{kind}, {THIRDS[third]} third" for kind, third in order)
    return Groups(labels, np.array([order[pair] for pair in pairs], dtype=np.int64))


def groups_of(observation: Observation) -> Groups:
    """The groups of the modules that are observed."""
    return _groups(observation.names, tuple(observation.problem.blocks.tolist()))


@dataclass(frozen=True, eq=False)
class GroupView:
    """What is seen and possible at one decision, group by group.

    Attributes:
        observation: of the modules.
        groups: of the model.
    """

    observation: Observation
    groups: Groups

    @classmethod
    def of(cls, observation: Observation) -> GroupView:
        """The view of an observation."""
        return cls(observation, groups_of(observation))

    @cached_property
    def start(self) -> Decision:
        """What happens where an action moves no rank: the plan of the default policy at first, and no change later."""
        if not is_first(self.observation):
            return decision_to_keep(self.observation)
        return PlanChooser().decide(self.observation)

    @cached_property
    def ranks(self) -> IntArray:
        """The ranks that an action changes, int64 (modules,)."""
        return (
            decided_plan(self.observation.problem, self.start).ranks if is_first(self.observation) else self.start.ranks
        )

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """`GROUP_FEATURES` of each group, (groups, len(GROUP_FEATURES)); ranks are those that an action changes."""
        modules, member = self.observation.modules.astype(np.float64), self.groups.member
        if is_first(self.observation):
            ladder = self.observation.problem.ladder
            modules = modules.copy()
            modules[:, MODULE_FEATURES.index("rank")] = ladder.rung(self.ranks) / ladder.top
            modules[:, MODULE_FEATURES.index("adapted")] = self.ranks > 0
        counts = np.bincount(member, minlength=len(self.groups.names))
        sums = np.zeros((len(counts), modules.shape[1]))
        np.add.at(sums, member, modules)
        return np.column_stack([sums / counts[:, None], counts / len(member)]).astype(np.float32)

    @property
    def run(self) -> NDArray[np.float32]:
        """`RUN_FEATURES`, (len(RUN_FEATURES),)."""
        return self.observation.run

    def run_feature(self, name: str) -> float:
        """One feature of the run; UnknownNameError if there is none of that name."""
        if name not in RUN_FEATURES:
            raise UnknownNameError.of("feature of the run", name, RUN_FEATURES)
        return float(self.run[RUN_FEATURES.index(name)])

    def feature(self, name: str) -> FloatArray:
        """One feature of each group, (groups,)."""
        return self.features[:, GROUP_FEATURES.index(name)].astype(np.float64)

    @cached_property
    def worth(self) -> FloatArray:
        """What signals say of each module, in logs, (modules,)."""
        return mean_feature(self.observation, WORTH_SIGNALS)

    @property
    def actions(self) -> int:
        """How many there are: four, then one for each group that grows, then one for each that shrinks."""
        return len(RATE_CHANGES) + 2 * len(self.groups.names)

    def grow(self, group: int) -> int:
        """The action that lets a group grow."""
        return len(RATE_CHANGES) + group

    def take(self, group: int) -> int:
        """The action that takes a rung from a group."""
        return len(RATE_CHANGES) + len(self.groups.names) + group

    @cached_property
    def allowed(self) -> BoolArray:
        """Which actions change something and fit the budget, bool (actions,); to keep is always allowed."""
        problem, member, ladder = self.observation.problem, self.groups.member, self.observation.problem.ladder
        rungs, found = ladder.rung(self.ranks), np.zeros(self.actions, dtype=np.bool_)
        found[NOTHING] = True
        steps_seen = any(self.run_feature(name) for name in ("steps_loss", "steps_noise", "steps_time"))
        long = 10 ** (self.run_feature("horizon") + 2) > SHORTEST - 0.5  # else windows of a step or two see chance
        found[[HALVE, DOUBLE, GO_BACK]] = steps_seen and long and not is_first(self.observation)
        can_rise, can_fall = (rungs < problem.tops) & ~problem.is_pinned, (rungs > problem.bottoms) & ~problem.is_pinned
        lowest = ladder.array[problem.bottoms]
        for group in range(len(self.groups.names)):
            own = member == group
            if (own & can_rise).any():
                alone = np.where(own, np.maximum(self._moved(own, 1), lowest), lowest)
                found[self.grow(group)] = problem.fits(alone)
            found[self.take(group)] = bool((own & can_fall).any() and self._moved(own, -1).any())
        return found

    def _moved(self, own: BoolArray, by: int) -> IntArray:
        """The ranks with some modules so many rungs higher, within the bounds, int64 (modules,)."""
        problem = self.observation.problem
        rungs = problem.ladder.rung(self.ranks)
        moved = np.clip(rungs + by * own, problem.bottoms, np.maximum(problem.tops, rungs))
        return np.where(own, problem.ladder.array[moved], self.ranks)

    def decision(self, action: int) -> Decision:
        """What an action decides; one that is not allowed keeps all as it is.

        Raises:
            ConfigError: there is no such action.
        """
        if not 0 <= action < self.actions:
            raise ConfigError(f"Actions are from 0 to {self.actions - 1} here; got {shown(action)}.")
        if not self.allowed[action]:
            action = NOTHING
        if action in RATE_CHANGES:
            return replace(self.start, change=RATE_CHANGES[action])
        grows, group = divmod(action - len(RATE_CHANGES), len(self.groups.names))
        own = self.groups.member == group
        ranks = self._moved(own, 1 if grows == 0 else -1)
        scores = self.worth + np.where(own, FIRST_OF_ALL, 0.0) if grows == 0 else self.worth
        return Decision(ranks, scores, exact=True)

    def told(self, action: int) -> str:
        """An action in words."""
        if action in RATE_CHANGES:
            return ("keep", "halve the rate", "double the rate", "go back")[action]
        grows, group = divmod(action - len(RATE_CHANGES), len(self.groups.names))
        return f"{'grow' if grows == 0 else 'take from'} {self.groups.names[group]}"


FIRST_OF_ALL = 20.0
"""What is added to the scores of modules that grow, so that all others give way before them."""


class Actor(Protocol):
    """Chooses one action at a decision."""

    def act(self, view: GroupView) -> int:
        """The number of an allowed action."""


@dataclass(frozen=True)
class Steering:
    """An actor as a policy: it steers ranks and rate at the moments of a schedule.

    Attributes:
        name: in logs and tables.
        actor: chooses the actions.
        schedule: when.
    """

    steers_rate = True
    name: str
    actor: Actor
    schedule: DecisionSchedule = STEERING

    def decide(self, observation: Observation) -> Decision:
        """What the actor's action decides."""
        view = GroupView.of(observation)
        return view.decision(self.actor.act(view))


def best(values: FloatArray, allowed: BoolArray) -> int | None:
    """The index of the largest value among those allowed; None if none is."""
    if not np.any(allowed):
        return None
    return int(np.argmax(np.where(allowed, values, -np.inf)))
