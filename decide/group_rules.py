"""Rules on the actions of `decide/groups.py`: starting points and baselines for a trained agent.

| rule | what it does |
|---|---|
| left-alone | the plan of the default policy, with no later changes |
| rate | that plan; doubles or halves the rate, or undoes damage, based on the alignment of steps |
| halving | that plan; moves rungs from groups with lower signals to groups with higher ones, early in the run |
| union | rate if the steps give clear evidence, else halving |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .groups import Actor, GroupView, Steering
from .observation import RUN_FEATURES, STEPS_PREFIX
from .rate_control import DOUBLED, FEATURES, KEEP, AlignmentRule, RateControl

_FIRST_STEPS = RUN_FEATURES.index(f"{STEPS_PREFIX}{FEATURES[0].replace(' ', '_')}")


@dataclass(frozen=True)
class LeaveAlone:
    """Never changes anything."""

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return KEEP


@dataclass(frozen=True)
class SteerRate:
    """Applies a rate control.

    Attributes:
        control: reads the steps.
    """

    control: RateControl = AlignmentRule()  # noqa: RUF009  (it is frozen)

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        if not view.allowed[DOUBLED]:
            return KEEP
        seen = view.run[_FIRST_STEPS : _FIRST_STEPS + len(FEATURES)].astype(np.float64)
        return int(self.control.act(seen[None])[0])


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
            return KEEP
        member, counts = view.groups.member, np.bincount(view.groups.member)
        ranks = np.bincount(member, weights=view.ranks) / counts
        score = self.gain * np.bincount(member, weights=view.worth) / counts
        grows = view.allowed[view.grow(0) : view.take(0)]
        lead = np.where(grows, score - np.log(ranks + 1.0), -np.inf)
        giving = np.where(ranks > 0, score - np.log(np.maximum(ranks, 0.5)), np.inf)
        if not grows.any() or lead.max() - giving.min() < self.margin:
            return KEEP
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
