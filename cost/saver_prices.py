"""What exact savers bring: names, and the bytes of a step without and with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import IntArray
from ..common.checks import finite
from ..common.text import format_bytes
from ..lora.spec import REFERENCE_RANK, ModuleSpec
from .model import MemoryModel

CACHE, COPIES, TILES = "no cache of keys and values", "shared copies of inputs", "tiled loss"
ROUTED = "routed rows"
ACTIVATIONS = "selective checkpointing"


def free_savers(targets: Sequence[ModuleSpec]) -> tuple[str, ...]:
    """Those that take no time and can help a model that is not here, none of whose caches are filled."""
    return (*([ROUTED] if any(target.experts > 1 for target in targets) else []), COPIES, TILES)


MOST_MORE = 1.01
"""By what factor bytes of a step whose layers are all checkpointed may rise, where a saver lowers those of one in which
none is."""


@dataclass(frozen=True)
class Saved:
    """What a step of plain LoRA, rank 8 on all modules, takes with one exact saver more than the one before.

    Attributes:
        name: of the saver, or of several that were switched on together; "plain LoRA" for the first, which has none.
        step_bytes: at the peak, where no layer is checkpointed.
        again_bytes: the same where all do; None where none can.
    """

    name: str
    step_bytes: float
    again_bytes: float | None = None

    @classmethod
    def of(cls, name: str, memory: MemoryModel, max_ranks: IntArray) -> Saved:
        """What the step of a byte model takes; `max_ranks` are the highest of each module, int64 (modules,)."""
        ranks = np.minimum(REFERENCE_RANK, max_ranks)
        again = memory.peak(ranks) if memory.segments else None
        return cls(name, memory.with_checkpointed(()).peak(ranks), again)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Saved:
        """What `asdict` made a dictionary of; ValueError, LookupError or TypeError if it is another one."""
        name, again = state["name"], state["again_bytes"]
        if not isinstance(name, str):
            raise TypeError(f"the name of a saver is {name!r}")
        return cls(name, finite(state["step_bytes"]), None if again is None else finite(again))

    def is_less(self, other: Saved) -> bool:
        """Whether a step takes less than another one: where no layer is checkpointed, or at least where all are."""
        again, others = self.again_bytes or 0.0, other.again_bytes or 0.0
        if self.step_bytes == other.step_bytes:
            return again < others
        return self.step_bytes < other.step_bytes and again <= MOST_MORE * others


def plain_text(saved: Sequence[Saved]) -> str:
    """What a step of plain LoRA takes, also with all layers checkpointed, and with exact savers, in words."""
    peaks = [
        format_bytes(each.step_bytes)
        + ("" if each.again_bytes is None else f", or {format_bytes(each.again_bytes)} with all layers checkpointed")
        for each in (saved[0], saved[-1])
    ]
    with_savers = f" With exact savers it takes {peaks[1]}, at the same losses." if len(saved) > 1 else ""
    return f"A step of plain LoRA takes {peaks[0]}.{with_savers}"


@dataclass(frozen=True, eq=False)
class Priced:
    """A step with exact savers.

    Attributes:
        memory: its byte model.
        plain: that of the step without them.
        saved: what a step of plain LoRA takes without, and with each more.
        names: of those that it has.
    """

    memory: MemoryModel
    plain: MemoryModel
    saved: tuple[Saved, ...]
    names: tuple[str, ...]


def price_savers(
    measure: Callable[[tuple[str, ...]], MemoryModel], names: Sequence[str], max_ranks: IntArray
) -> Priced:
    """Find out what exact savers bring, one more after the other; those that lower no peak are left out.

    Args:
        measure: finds the byte model of the step with these savers alone.
        names: of those that are wanted.
        max_ranks: the highest rank of each module, int64 (modules,).
    """
    memory = plain = measure(())
    saved, kept = [Saved.of("plain LoRA", plain, max_ranks)], tuple[str, ...]()
    for name in names:
        with_it = measure((*kept, name))
        found = Saved.of(name, with_it, max_ranks)
        if found.is_less(saved[-1]):
            kept, memory = (*kept, name), with_it
            saved.append(found)
    return Priced(memory, plain, tuple(saved), kept)
