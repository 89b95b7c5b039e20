"""What became of the ranks that a policy wanted: asked, clipped, got, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...allocation.log import DecisionRecord
from ...common.arrays import IntArray
from ...common.units import plural


@dataclass(frozen=True, eq=False)
class Projection:
    """The ranks of one decision on their way to a plan, each int64 (modules,).

    Attributes:
        asked: ranks that the policy wanted.
        clipped: those on the ladder and within the bounds.
        got: ranks of the plan.
        reasons: why clipped ranks are not those asked, by module; "" where they are the same.
    """

    asked: IntArray
    clipped: IntArray
    got: IntArray
    reasons: tuple[str, ...]

    @property
    def lowered(self) -> int:
        """How many modules the budget lowered."""
        return int((self.got < self.clipped).sum())

    @property
    def raised(self) -> int:
        """How many modules got what was left of the budget."""
        return int((self.got > self.clipped).sum())

    def sentences(self) -> list[str]:
        """What changed, in words."""
        if np.array_equal(self.asked, self.got):
            return ["Every module got the rank that the policy asked for."]
        counts = Counter(filter(None, self.reasons))
        found = [f"{plural(count, 'module')} did not get the rank asked for: {why}." for why, count in counts.items()]
        if self.lowered:
            found.append(
                f"{plural(self.lowered, 'module')} had to give way, since the ranks asked for exceed the budget."
            )
        if self.raised:
            found.append(f"What was left of the budget raised {plural(self.raised, 'module')}.")
        return found

    def to_json(self) -> dict[str, Any]:
        """The ranks as JSON values."""
        return {name: getattr(self, name).tolist() for name in ("asked", "clipped", "got")}


def projection_of(logged: DecisionRecord) -> Projection:
    """What became of the ranks wanted at a decision."""
    asked, clipped, got = logged.rank_wanted, logged.rank_clipped, logged.rank_after
    problem = logged.problem
    ladder, (lower, upper) = problem.ladder, problem.bounds()
    rungs = ladder.rung(asked)
    allowed = ladder.array[np.clip(rungs, lower, upper)]
    reasons = np.full(len(asked), "", dtype=object)
    reach = "no module may move further at one decision"
    reasons[rungs > upper] = np.where(upper < problem.tops, reach, "their upper bound is lower")[rungs > upper]
    reasons[rungs < lower] = np.where(lower > problem.bottoms, reach, "their lower bound is higher")[rungs < lower]
    reasons[problem.is_pinned & (allowed != asked)] = "they are pinned"
    reasons[(allowed == clipped) & (ladder.array[rungs] == clipped) & (asked != clipped)] = (
        "the ladder has no such rank, and the next one below counts"
    )
    reasons[clipped != allowed] = "a person changed it in review"
    return Projection(asked, clipped, got, tuple(reasons.tolist()))
