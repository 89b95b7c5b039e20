"""LoRA definitions for planning without the model: target modules, the ladder of ranks, and names of scalings.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from ..common.arrays import IntArray
from ..common.errors import ConfigError

DEFAULT_RANKS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)

REFERENCE_RANK = 8
"""The most common rank. On every target module it is plain LoRA, to which plans are compared."""


@dataclass(frozen=True)
class RankLadder:
    """The allowed ranks in ascending order. A rung is the index of a rank.

    Attributes:
        ranks: strictly ascending, starting at 0 (the module is not adapted).

    Raises:
        ConfigError: there are fewer than two ranks, or they do not ascend strictly from 0.

    Example:
        >>> RankLadder().step(8, +2).item()
        16
    """

    ranks: tuple[int, ...] = DEFAULT_RANKS

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.ranks, self.ranks[1:], strict=False))
        if len(self.ranks) < 2 or self.ranks[0] != 0 or not rising:
            raise ConfigError(
                f"A rank ladder must ascend strictly from 0, for example {DEFAULT_RANKS}; got {self.ranks}."
            )

    @property
    def top(self) -> int:
        """The highest rung, which is also the largest number of rungs between two ranks."""
        return len(self.ranks) - 1

    def including(self, ranks: IntArray) -> RankLadder:
        """Return a ladder that also has these ranks, int64 (modules,)."""
        return RankLadder(tuple(sorted({*self.ranks, *ranks.tolist()})))

    @cached_property
    def array(self) -> IntArray:
        """The ranks as int64, shape (rungs,); read-only."""
        ranks = np.asarray(self.ranks, dtype=np.int64)
        ranks.flags.writeable = False
        return ranks

    def rung(self, ranks: IntArray | int) -> IntArray:
        """Return the highest rung with a rank not above each given one, int64 in the shape of `ranks`."""
        return np.asarray(np.searchsorted(self.array, ranks, side="right") - 1, dtype=np.int64)

    def rung_above(self, ranks: IntArray) -> IntArray:
        """Return the lowest rung with a rank not below each given one, or the top, int64 in the shape of `ranks`."""
        return np.asarray(np.minimum(np.searchsorted(self.array, ranks), self.top), dtype=np.int64)

    def step(self, ranks: IntArray | int, deltas: IntArray | int) -> IntArray:
        """Return the ranks `deltas` rungs above those of `ranks` (below if negative), clipped to the ladder."""
        return np.asarray(self.array[np.clip(self.rung(ranks) + deltas, 0, self.top)])


@dataclass(frozen=True)
class ModuleSpec:
    """A linear layer, token embedding or stack of experts that can have a LoRA pair, delta W = scaling * B A.

    Attributes:
        name: full name inside the base model, as in `LoraConfig.rank_pattern`.
        block: index of the enclosing model layer, 0 nearest to the input.
        d_in: input width (vocabulary for an embedding; total over experts): weights in A per rank.
        d_out: output width, likewise: weights in B per rank.
        experts: number of matrices with a pair each, all of one rank.
    """

    name: str
    block: int
    d_in: int
    d_out: int
    experts: int = field(default=1, kw_only=True)

    @property
    def max_rank(self) -> int:
        """The largest useful rank: min(d_in, d_out), of one expert."""
        return min(self.d_in, self.d_out) // self.experts


def is_pattern(target_modules: str) -> bool:
    """True if target modules are a regular expression, with characters that module names lack."""
    return re.search(r"[\\*+?|()\[\]^$]", target_modules) is not None


MOST_PATTERN, MOST_REPEATS = 2000, 4
_TOKEN = re.compile(r"\\.|\[\^?\]?[^\]]*\]|[()|]|(?<!\()[*+?][*+?]?|\{\d*,?\d*\}")


def is_slow_pattern(pattern: str) -> bool:
    """True if a regular expression may backtrack excessively: it repeats a group, or has many repeats on one path."""
    repeats, last = 0, ""
    groups = [(0, 0)]  # repeats before each open group, and the most on a path through it so far
    for token in _TOKEN.finditer(pattern):
        kind, before = token[0][0], pattern[token.start() - 1]
        if kind in "*+?{":
            repeats += 1
            if repeats > MOST_REPEATS or (last == before == ")" and kind != "?"):
                return True
        elif kind == "(":
            groups.append((repeats, repeats))
        elif kind == "|":
            groups[-1] = groups[-1][0], max(groups[-1][1], repeats)
            repeats = groups[-1][0]
        elif kind == ")" and len(groups) > 1:
            repeats = max(groups.pop()[1], repeats)
        last = token[0]
    return len(pattern) > MOST_PATTERN


def absent(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the names in a target module list that end no path; PEFT ignores them if others match."""
    ends = tuple(f".{path}" for path in paths)
    return [name for name in names if not any(end.endswith(f".{name}") for end in ends)]


Scaling = Literal["alpha", "constant"]
"""Quantity kept when a rank changes: "alpha", or the scaling itself ("constant")."""


def check_scaling(scaling: object) -> None:
    """Raise ConfigError unless this is a `Scaling`."""
    if scaling not in get_args(Scaling):
        raise ConfigError(
            "scaling must be 'alpha' (lora_alpha stays constant when a rank changes, and PEFT divides it by "
            f"the rank) or 'constant' (lora_alpha / r stays constant); got {scaling!r}."
        )


def highest_ranks(targets: Sequence[ModuleSpec]) -> IntArray:
    """Return the highest possible rank of each module, int64 (modules,)."""
    return np.array([target.max_rank for target in targets], dtype=np.int64)


def plain_ranks(targets: Sequence[ModuleSpec]) -> IntArray:
    """Return the ranks of plain LoRA: `REFERENCE_RANK` on every module that can have it, int64 (modules,)."""
    return np.minimum(REFERENCE_RANK, highest_ranks(targets))


def on_ladder(ranks: IntArray, targets: Sequence[ModuleSpec]) -> IntArray:
    """Return the lowest ranks of the ladder at which no adapter of these ranks must shrink, int64 (modules,)."""
    ladder = RankLadder()
    return np.maximum(ranks, np.minimum(ladder.array[ladder.rung_above(ranks)], highest_ranks(targets)))


def check_rank(rank: int, targets: Sequence[ModuleSpec]) -> None:
    """Raise ConfigError for a rank that exceeds the maximum of every module."""
    widest = max(target.max_rank for target in targets)
    if rank > widest:
        raise ConfigError(f"rank must be at most {widest}, the smaller dimension of the widest module; got {rank}.")
