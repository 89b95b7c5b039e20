"""What plans need to know of LoRA, without the model: target modules, the ladder of ranks, and names of scalings.

Nothing here loads torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError

DEFAULT_RANKS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)

REFERENCE_RANK = 8
"""The rank that people use most. Shares of bytes and of time are relative to this rank on every target module."""


@dataclass(frozen=True)
class RankLadder:
    """The allowed ranks in rising order. A rung is the index of a rank.

    Attributes:
        ranks: strictly rising, starting at 0 (the module is not adapted).

    Raises:
        ConfigError: there are fewer than two ranks, or they do not rise strictly from 0.

    Example:
        >>> RankLadder().step(8, +2).item()
        16
    """

    ranks: tuple[int, ...] = DEFAULT_RANKS

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.ranks, self.ranks[1:], strict=False))
        if len(self.ranks) < 2 or self.ranks[0] != 0 or not rising:
            raise ConfigError(f"A rank ladder rises strictly from 0, for example {DEFAULT_RANKS}; got {self.ranks}.")

    @property
    def top(self) -> int:
        """The highest rung, which is also the largest number of rungs between two ranks."""
        return len(self.ranks) - 1

    @cached_property
    def array(self) -> IntArray:
        """The ranks as int64, shape (rungs,); read-only."""
        ranks = np.asarray(self.ranks, dtype=np.int64)
        ranks.flags.writeable = False
        return ranks

    def rung(self, ranks: IntArray | int) -> IntArray:
        """The highest rung whose rank is not above each given rank, int64 of the shape of `ranks`."""
        return np.asarray(np.searchsorted(self.array, ranks, side="right") - 1, dtype=np.int64)

    def rung_above(self, ranks: IntArray) -> IntArray:
        """The lowest rung whose rank is not below each given rank, or the top one, int64 of the shape of `ranks`."""
        return np.asarray(np.minimum(np.searchsorted(self.array, ranks), self.top), dtype=np.int64)

    def step(self, ranks: IntArray | int, deltas: IntArray | int) -> IntArray:
        """The ranks `deltas` rungs above the rungs of `ranks` (below if negative), clipped to the ladder's ends."""
        return np.asarray(self.array[np.clip(self.rung(ranks) + deltas, 0, self.top)])


@dataclass(frozen=True)
class ModuleSpec:
    """A linear layer, token embedding or stack of experts that can have a LoRA pair, delta W = scaling * B A.

    Attributes:
        name: full name inside the base model, as in `LoraConfig.rank_pattern`.
        block: index of the model layer that holds the module, 0 nearest to the input.
        d_in: input width (of an embedding: its vocabulary; of experts: of all together); a rank has so many weights
            in A.
        d_out: output width, likewise; a rank has so many weights in B.
        experts: how many matrices have a pair each, all of one rank.
    """

    name: str
    block: int
    d_in: int
    d_out: int
    experts: int = field(default=1, kw_only=True)

    @property
    def max_rank(self) -> int:
        """The largest rank that can add anything: min(d_in, d_out), of one expert."""
        return min(self.d_in, self.d_out) // self.experts


def is_pattern(target_modules: str) -> bool:
    """Whether target modules are a regular expression: it has what no name of a module has."""
    return re.search(r"[\\*+?|()\[\]^$]", target_modules) is not None


MOST_PATTERN, MOST_REPEATS = 2000, 4
_TOKEN = re.compile(r"\\.|\[\^?\]?[^\]]*\]|[()|]|(?<!\()[*+?][*+?]?|\{\d*,?\d*\}")


def is_slow_pattern(pattern: str) -> bool:
    """Whether a regular expression may match without end: it repeats a group, or has many repeats on one way."""
    repeats, last = 0, ""
    groups = [(0, 0)]  # repeats before each open group, and the most on a way through it so far
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
    """Those of the names in a list of target modules that no path ends in: PEFT passes over them if others match."""
    ends = tuple(f".{path}" for path in paths)
    return [name for name in names if not any(end.endswith(f".{name}") for end in ends)]


Scaling = Literal["alpha", "constant"]
"""What stays when a rank changes: "alpha", or the scaling itself ("constant")."""


def check_scaling(scaling: object) -> None:
    """Raise ConfigError unless this is a `Scaling`."""
    if scaling not in get_args(Scaling):
        raise ConfigError(
            f"scaling is 'alpha' (lora_alpha stays when a rank changes, and PEFT divides it by the rank) or 'constant' "
            f"(lora_alpha / r stays); got {scaling!r}."
        )


def highest_ranks(targets: Sequence[ModuleSpec]) -> IntArray:
    """The highest rank that each module can have, int64 (modules,)."""
    return np.array([target.max_rank for target in targets], dtype=np.int64)


def check_rank(rank: int, targets: Sequence[ModuleSpec]) -> None:
    """Raise ConfigError for a rank that none of the modules can have."""
    widest = max(target.max_rank for target in targets)
    if rank > widest:
        raise ConfigError(f"No module has a rank above {widest}, the smaller width of the widest; got {rank}.")
