"""Rules in the actions of `decide/groups.py`: what a trained agent starts from, and has to beat.

| rule | what it does |
|---|---|
| left-alone | the plan of the default policy, and nothing after it |
| rate | that plan; the rate is doubled, halved, or damage undone as the alignment of steps says |
| halving | that plan; groups whose signals say more take rungs from those that say less, early in the run |
| union | rate where the steps are sure, else halving |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .groups import DOUBLE, GO_BACK, HALVE, NOTHING, GroupView, Steering, best
from .observation import RUN_FEATURES, STEPS_PREFIX
from .rate_control import CHANGES, FEATURES, UNDO, AlignmentRule, RateControl

_FIRST_STEPS = RUN_FEATURES.index(f"{STEPS_PREFIX}{next(iter(FEATURES)).replace(' ', '_')}")


@dataclass(frozen=True)
class LeaveAlone:
    """Keeps all as it is."""

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return NOTHING


@dataclass(frozen=True)
class SteerRate:
    """Does to the rate what a rate control says, in factors of 2.

    Attributes:
        control: reads the steps. A rise is twofold here, too much where steps are sure of a little.
    """

    control: RateControl = AlignmentRule(surely_above=math.inf)  # noqa: RUF009  (it is frozen)

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        if not view.allowed[DOUBLE]:
            return NOTHING
        seen = view.run[_FIRST_STEPS : _FIRST_STEPS + len(FEATURES)].astype(np.float64)
        chosen = int(self.control.act(seen[None])[0])
        if chosen == UNDO:
            return GO_BACK
        return DOUBLE if CHANGES[chosen] > 0 else HALVE if CHANGES[chosen] < 0 else NOTHING


@dataclass(frozen=True)
class Halving:
    """Moves rungs to groups whose signals say more, while it is early.

    Attributes:
        gain: of the signals, in log rank.
        margin: by how much, in log rank, a group must be ahead of the one that gives.
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
        size = len(view.groups.names)
        grows = view.allowed[view.grow(0) : view.grow(0) + size]
        group = best(score - np.log(ranks + 1.0), grows)
        giving = np.where(ranks > 0, score - np.log(np.maximum(ranks, 0.5)), np.inf)
        if group is None or score[group] - np.log(ranks[group] + 1.0) - giving.min() < self.margin:
            return NOTHING
        return view.grow(group)


@dataclass(frozen=True)
class Union:
    """Steers the rate where the steps are sure, and moves rungs where they are not."""

    rate: SteerRate = SteerRate()
    ranks: Halving = Halving()

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return self.rate.act(view) or self.ranks.act(view)


GROUP_RULES: dict[str, Steering] = {
    name: Steering(name, actor)
    for name, actor in (("left-alone", LeaveAlone()), ("rate", SteerRate()), ("halving", Halving()), ("union", Union()))
}
"""Rules by name."""
