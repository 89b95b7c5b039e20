"""Bounds of the user on the ranks of single modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError, UnknownNameError, shown
from ..lora.ladder import DEFAULT_RANKS
from ..lora.module_spec import ModuleSpec

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
