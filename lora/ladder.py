"""The ranks that a plan may use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError

DEFAULT_RANKS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class RankLadder:
    """Allowed ranks in rising order; actions move along it in steps.

    Attributes:
        ranks: strictly rising, starting at 0 (no adapter on that module).

    Raises:
        ConfigError: the ranks do not rise from 0.

    Example:
        >>> RankLadder().step(8, +2)
        16
    """

    ranks: tuple[int, ...] = DEFAULT_RANKS

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.ranks, self.ranks[1:], strict=False))
        if len(self.ranks) < 2 or self.ranks[0] != 0 or not rising:
            raise ConfigError(f"A rank ladder rises strictly from 0, for example {DEFAULT_RANKS}; got {self.ranks}.")

    @property
    def top(self) -> int:
        """Index of the highest rung, which is also the largest delta an action can ask for."""
        return len(self.ranks) - 1

    @property
    def array(self) -> IntArray:
        """The ranks as int64, shape (rungs,)."""
        return np.asarray(self.ranks, dtype=np.int64)

    def rung(self, ranks: IntArray | int) -> IntArray:
        """Index of the highest rung that is not above each rank."""
        return np.asarray(np.searchsorted(self.array, ranks, side="right") - 1, dtype=np.int64)

    def step(self, rank: int, delta: int) -> int:
        """The rank `delta` rungs away from `rank`, stopping at either end."""
        return self.ranks[int(np.clip(self.rung(rank) + delta, 0, self.top))]
