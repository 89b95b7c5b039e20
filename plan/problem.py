"""Which plans are possible at one decision: ranks, bounds, cost and limit.

Bounds of the user on the ranks of single modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..cost.cost import Cost, plan_cost
from ..errors import ConfigError, UnknownNameError, shown
from ..lora.spec import DEFAULT_RANKS, ModuleSpec, RankLadder

MOST_RANK = 2**31 - 1
"""The highest rank that a bound may name; the decision log has 32 bits for a rank."""

Bounds = Mapping[str, int | tuple[int, int]]
"""{name of a module or its end, as in `LoraConfig.target_modules`: its rank, or its least and its largest rank}."""


def rank_bounds(modules: Sequence[ModuleSpec], bounds: Bounds) -> tuple[IntArray, IntArray]:
    """The least and the largest rank of each module, int64 (modules,) each.

    Args:
        modules: all target modules.
        bounds: of some of them; of several entries for one module the last counts.

    Raises:
        UnknownNameError: an entry names no module.
        ConfigError: a bound is negative, the least is above the largest, or no rank lies between them.

    Example:
        >>> rank_bounds(modules, {"q_proj": 8, "layers.0.mlp.down_proj": (0, 4)})  # doctest: +SKIP
    """
    low = np.zeros(len(modules), dtype=np.int64)
    useful = np.array([module.max_rank for module in modules], dtype=np.int64)
    high = useful.copy()
    for name, bound in bounds.items():
        chosen = [i for i, module in enumerate(modules) if module.name == name or module.name.endswith(f".{name}")]
        if not chosen:
            raise UnknownNameError.of("target module", name, [module.name for module in modules])
        least, most = _pair(name, bound)
        if not any(least <= rank <= most for rank in DEFAULT_RANKS):
            raise ConfigError(
                f"The bounds of {name!r} leave it no rank: no rank of {DEFAULT_RANKS} is from {least} to {most}."
            )
        low[chosen], high[chosen] = np.minimum(least, useful[chosen]), most
    return low, high


def _pair(name: str, bound: object) -> tuple[int, int]:
    match bound:
        case int(rank) if 0 <= rank <= MOST_RANK:
            return rank, rank
        case (int(least), int(most)) if 0 <= least <= most <= MOST_RANK:
            return least, most
    raise ConfigError(
        f"The bounds of {name!r} are a rank or a pair from low to high, from 0 to {MOST_RANK:,}; got {shown(bound)}."
    )


HYSTERESIS = 0.2
"""The difference of two scores, in log rank, above which rank moves from one module to the other at later decisions.

From one interval to the next, noise changes scores by 0.05 to 0.1.
"""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Everything that decides which plans are possible.

    Attributes:
        ranks: current ranks, int64 (modules,).
        max_ranks: the largest useful rank of each module, int64 (modules,).
        blocks: layer of each module, 0 nearest to the input, int64 (modules,).
        cost: what plans cost.
        limit: the most that a plan may cost, in the unit of `cost`.
        ladder: the allowed ranks.
        max_step: the most rungs that a module may move at this decision; None for any number.
        pinned: modules whose rank must not change, bool (modules,); None for no module. If nothing else fits, those
            without a lower bound are dropped.
        low: the least rank of each module, int64 (modules,); None for 0. Between two rungs the upper one counts; for a
            module that cannot have so much, the most that it can. Lower bounds hold even where they exceed the budget
            or `max_step`.
        high: the largest rank of each module, int64 (modules,); None for `max_ranks`. Upper bounds hold even where they
            exceed `max_step`.
        hysteresis: how much the score of a module must exceed another's, in log rank, before it takes rank from it;
            at least 0.

    Raises:
        ConfigError: `low` or `high` has another shape or holds a negative rank, or leaves a module no rung.
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
        ranks: IntArray | None = None,
    ) -> AllocationProblem:
        """The plans that are possible for these modules; at later decisions with `HYSTERESIS`.

        Args:
            modules: the modules that can be adapted; their tensors play no part.
            cost: what plans cost.
            limit: what a plan may cost.
            ladder: allowed ranks; the usual ones by default.
            max_step: rungs that a module may move; None at the first decision, which may use the whole ladder.
            low: least rank of each module, (modules,).
            high: largest rank of each module, (modules,).
            ranks: current ranks, int64 (modules,); by default no module is adapted.
        """
        if ranks is None:
            ranks = np.zeros(len(modules), dtype=np.int64)
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
            hysteresis=0.0 if max_step is None else HYSTERESIS,
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
        """Check that each module has a rung between its bounds."""
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
        """The upper bound of each module, (modules,); without one the ladder's end, or `low` if that is more."""
        if self.high is not None:
            return self.high
        return np.maximum(np.int64(self.ladder.ranks[-1]), np.zeros_like(self.ranks) if self.low is None else self.low)

    @cached_property
    def tops(self) -> IntArray:
        """The highest rung that the bounds allow each module, (modules,)."""
        return self.ladder.rung(np.minimum(self.max_ranks, self._most))

    @cached_property
    def bottoms(self) -> IntArray:
        """The lowest rung that the bounds allow each module, (modules,)."""
        if self.low is None:
            return np.zeros_like(self.ranks)
        return np.minimum(self.ladder.rung_above(self.low), self.ladder.rung(self.max_ranks))

    @cached_property
    def rungs(self) -> IntArray:
        """The current rung of each module, (modules,); for a rank between two rungs the lower one."""
        return self.ladder.rung(self.ranks)

    @property
    def is_pinned(self) -> BoolArray:
        """Which modules are pinned, bool (modules,)."""
        return np.zeros(len(self.ranks), dtype=np.bool_) if self.pinned is None else self.pinned

    def preference(self, scores: FloatArray) -> FloatArray:
        """The scores, raised by the hysteresis for modules that are adapted at present, (modules,)."""
        return scores + self.hysteresis * (self.rungs > 0)

    def fits(self, ranks: IntArray) -> bool:
        """Whether a plan is within the limit."""
        return plan_cost(self.cost, ranks) <= self.limit

    def uniform(self, rank: int, lowest: int = 0) -> IntArray:
        """Any one rank on all modules from layer `lowest` up, each within its bounds, (modules,)."""
        low, high = self.ladder.array[self.bottoms], np.minimum(self.max_ranks, self._most)
        return np.clip(np.where(self.blocks >= lowest, rank, 0), low, high)

    def fresh(self) -> AllocationProblem:
        """The same problem at a first decision: no module is adapted, and each may have any rank within its bounds."""
        return replace(self, ranks=np.zeros_like(self.ranks), max_step=None, pinned=None, hysteresis=0.0)

    def bounds(self) -> tuple[IntArray, IntArray]:
        """The lowest and the highest rung that this decision allows each module, (modules,) each."""
        now = self.rungs
        reach = self.ladder.top if self.max_step is None else self.max_step
        upper = np.clip(now + reach, self.bottoms, self.tops)
        lower = np.clip(now - reach, self.bottoms, upper)
        kept = np.where((now > self.tops) & (self.bottoms == 0), 0, now)
        return np.where(self.is_pinned, kept, lower), np.where(self.is_pinned, kept, upper)
