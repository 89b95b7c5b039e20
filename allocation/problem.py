"""Which plans are possible at one decision: ranks, bounds, cost and limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, IntArray
from ..errors import ConfigError
from ..lora.ladder import RankLadder
from ..lora.module_spec import ModuleSpec
from ..memory.cost import Cost, plan_cost

HYSTERESIS = 0.2
"""How much cheaper, in log rank, the rungs are that a module has already, at decisions after the first.

Scores carry noise of 0.05 to 0.1 from one interval to the next. Two of them have to differ by more than this before
rank moves from one module to the other.
"""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Everything that decides which plans are possible.

    Attributes:
        ranks: current ranks, int64 (modules,).
        max_ranks: the largest useful rank of each module, int64 (modules,).
        blocks: layer of each module, 0 at the bottom, int64 (modules,).
        cost: what plans cost.
        limit: what a plan may cost, in the unit of `cost`.
        ladder: allowed ranks.
        max_step: how many rungs a module may move at this decision; None for any number.
        pinned: modules that must keep their rank, or be dropped unless `low` keeps them, bool (modules,); None for no
            module.
        low: the least rank that each module must have, int64 (modules,); None for 0. Between two rungs the upper
            one counts, above what a module can have the most that it can. Goes before the budget and `max_step`.
        high: the most that each module may have, int64 (modules,); None for `max_ranks`. A module with `low` equal
            to `high` is pinned. Goes before `max_step`.
        hysteresis: how much cheaper, in log rank, the rungs are that a module has already, at least 0.

    Raises:
        ConfigError: `low` or `high` has another shape, lies below 0 or leaves a module no rung.
    """

    ranks: IntArray
    max_ranks: IntArray
    blocks: IntArray
    cost: Cost
    limit: float
    ladder: RankLadder
    max_step: int | None = None
    pinned: BoolArray | None = None
    low: IntArray | None = None
    high: IntArray | None = None
    hysteresis: float = 0.0

    @classmethod
    def of(
        cls,
        modules: Sequence[ModuleSpec],
        cost: Cost,
        limit: float,
        *,
        ladder: RankLadder | None = None,
        max_step: int | None = None,
        low: IntArray | None = None,
        high: IntArray | None = None,
        hysteresis: float | None = None,
        ranks: IntArray | None = None,
    ) -> AllocationProblem:
        """The plans that are possible for these modules.

        Args:
            modules: the modules that can be adapted; their tensors play no part.
            cost: what plans cost.
            limit: what a plan may cost.
            ladder: allowed ranks; the usual ones by default.
            max_step: rungs that a module may move; None at the first decision, which may use the whole ladder.
            low: least rank of each module, (modules,).
            high: largest rank of each module, (modules,).
            hysteresis: see the class; by default 0 at the first decision and `HYSTERESIS` at later ones.
            ranks: current ranks, int64 (modules,); by default no module is adapted.
        """
        if ranks is None:
            ranks = np.zeros(len(modules), dtype=np.int64)
        if hysteresis is None:
            hysteresis = 0.0 if max_step is None else HYSTERESIS
        return cls(
            ranks=ranks,
            max_ranks=np.array([module.max_rank for module in modules], dtype=np.int64),
            blocks=np.array([module.block for module in modules], dtype=np.int64),
            cost=cost,
            limit=limit,
            ladder=ladder or RankLadder(),
            max_step=max_step,
            low=low,
            high=high,
            hysteresis=hysteresis,
        )

    def __post_init__(self) -> None:
        if not self.hysteresis >= 0:
            raise ConfigError(f"hysteresis is at least 0, got {self.hysteresis}.")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and (np.shape(bound) != np.shape(self.ranks) or np.min(bound, initial=0) < 0):
                raise ConfigError(
                    f"{name} holds one rank of at least 0 for each of the {len(self.ranks)} modules; got "
                    f"{np.size(bound)} from {np.min(bound, initial=0)}."
                )
        if self.low is not None:
            self._check_rungs(self.low)

    def _check_rungs(self, low: IntArray) -> None:
        """Make sure that each module has a rung between its bounds."""
        wrong = np.flatnonzero((low > self._most) | (self.bottoms > self.tops))
        if len(wrong) == 0:
            return
        module, ladder = int(wrong[0]), self.ladder.ranks
        least, most = int(low[module]), int(self._most[module])
        reason = (
            f"low {least} is above high {most}" if least > most else f"no rank of {ladder} is from {least} to {most}"
        )
        raise ConfigError(f"The bounds of module {module} leave it no rank: {reason}.")

    @cached_property
    def _most(self) -> IntArray:
        """`high`, without a bound the top of the ladder or `low`, whichever is more."""
        if self.high is not None:
            return self.high
        return np.maximum(np.int64(self.ladder.ranks[-1]), np.zeros_like(self.ranks) if self.low is None else self.low)

    @cached_property
    def tops(self) -> IntArray:
        """The highest rung that each module may reach, (modules,)."""
        return self.ladder.rung(np.minimum(self.max_ranks, self._most))

    @cached_property
    def bottoms(self) -> IntArray:
        """The lowest rung that each module must keep, (modules,)."""
        if self.low is None:
            return np.zeros_like(self.ranks)
        most = self.ladder.rung(self.max_ranks)
        return np.minimum(np.searchsorted(self.ladder.array, self.low), most)

    @property
    def rungs(self) -> IntArray:
        """The current rung of each module, the one below for a rank between two, (modules,)."""
        return self.ladder.rung(self.ranks)

    @property
    def is_pinned(self) -> BoolArray:
        """Which modules are pinned, bool (modules,)."""
        return np.zeros(len(self.ranks), dtype=np.bool_) if self.pinned is None else self.pinned

    def fits(self, ranks: IntArray) -> bool:
        """Whether a plan keeps to the limit."""
        return plan_cost(self.cost, ranks) <= self.limit

    def uniform(self, rank: int, lowest: int = 0) -> IntArray:
        """One rank, on the ladder or not, on all modules from layer `lowest` up; each within its bounds, (modules,)."""
        low, high = self.ladder.array[self.bottoms], np.minimum(self.max_ranks, self._most)
        return np.clip(np.where(self.blocks >= lowest, rank, 0), low, high)

    def fresh(self) -> AllocationProblem:
        """The same problem at a first decision: from no adapter at all, free to go anywhere within the bounds."""
        return replace(self, ranks=np.zeros_like(self.ranks), max_step=None, pinned=None, hysteresis=0.0)

    def bounds(self) -> tuple[IntArray, IntArray]:
        """The lowest and the highest rung of each module that this decision may choose, (modules,) each."""
        now = self.rungs
        reach = self.ladder.top if self.max_step is None else self.max_step
        upper = np.clip(now + reach, self.bottoms, self.tops)
        lower = np.clip(now - reach, self.bottoms, upper)
        kept = np.where((now > self.tops) & (self.bottoms == 0), 0, now)
        return np.where(self.is_pinned, kept, lower), np.where(self.is_pinned, kept, upper)
