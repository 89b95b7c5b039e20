"""Rules on the actions of `decide/groups.py`: starting points and baselines for a trained agent.

| rule | what it does |
|---|---|
| left-alone | the plan of the default policy, with no later changes |
| rate | that plan; doubles or halves the rate, or undoes damage, based on the alignment of steps |
| halving | that plan; moves rungs from groups with lower signals to groups with higher ones, early in the run |
| union | rate if the steps give clear evidence, else halving |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .groups import DOUBLE, GO_BACK, HALVE, NOTHING, Actor, GroupView, Steering
from .observation import RUN_FEATURES, STEPS_PREFIX
from .rate_control import CHANGES, FEATURES, UNDO, AlignmentRule, RateControl

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
