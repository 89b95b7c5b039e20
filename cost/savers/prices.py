"""Names of exact savers, and the memory of a step without and with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...common.arrays import IntArray
from ...common.checks import finite
from ...common.text import format_bytes
from ...lora.spec import ModuleSpec
from ..cost import ByteCost
from ..model import MemoryModel
from ..recording import BatchShape

CACHE, COPIES, TILES = "no cache of keys and values", "shared copies of inputs", "tiled loss"
ROUTED = "routed rows"
ACTIVATIONS = "selective checkpointing"


def free_savers(targets: Sequence[ModuleSpec]) -> tuple[str, ...]:
    """Return the savers that cost no time and apply to a model known only by configuration, without a filled cache."""
    return (*([ROUTED] if any(target.experts > 1 for target in targets) else []), COPIES, TILES)


MOST_MORE = 1.01
"""Highest accepted growth factor of a step with all layers checkpointed, if a saver lowers the step without
checkpointing.
"""


@dataclass(frozen=True)
class Saved:
    """Memory of a plain LoRA step (rank 8 on all modules) after adding one exact saver.

    Attributes:
        name: name of the saver, or of several enabled together; "plain LoRA" for the first entry, without savers.
        step_bytes: peak bytes without checkpointing.
        again_bytes: peak bytes with all layers checkpointed; None if that is not supported.
    """

    name: str
    step_bytes: float
    again_bytes: float | None = None

    @classmethod
    def of(cls, name: str, memory: MemoryModel, ranks: IntArray) -> Saved:
        """Price a step with these ranks, int64 (modules,), by its byte model."""
        again = memory.peak(ranks) if memory.segments else None
        return cls(name, memory.with_checkpointed(()).peak(ranks), again)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Saved:
        """Rebuild from the dictionary made by `asdict`; raises ValueError, LookupError or TypeError if malformed."""
        name, again = state["name"], state["again_bytes"]
        if not isinstance(name, str):
            raise TypeError(f"the name of a saver is {name!r}")
        return cls(name, finite(state["step_bytes"]), None if again is None else finite(again))

    def is_less(self, other: Saved) -> bool:
        """True if a step takes less memory without checkpointing or, on a tie, with all layers checkpointed."""
        again, others = self.again_bytes or 0.0, other.again_bytes or 0.0
        if self.step_bytes == other.step_bytes:
            return again < others
        return self.step_bytes < other.step_bytes and again <= MOST_MORE * others


def plain_text(saved: Sequence[Saved]) -> str:
    """Describe the memory of a plain LoRA step, with all layers checkpointed, and with exact savers."""
    peaks = [
        format_bytes(each.step_bytes)
        + ("" if each.again_bytes is None else f", or {format_bytes(each.again_bytes)} with all layers checkpointed")
        for each in (saved[0], saved[-1])
    ]
    with_savers = f" With exact savers it takes {peaks[1]}, with the same losses." if len(saved) > 1 else ""
    return f"A step of this LoRA takes {peaks[0]}.{with_savers}"


@dataclass(frozen=True, eq=False)
class Priced:
    """A step with exact savers.

    Attributes:
        memory: its byte model.
        plain: byte model of the step without savers.
        saved: memory of a plain LoRA step without savers, and after adding each.
        names: names of its savers.
    """

    memory: MemoryModel
    plain: MemoryModel
    saved: tuple[Saved, ...]
    names: tuple[str, ...]


Measure = Callable[[tuple[str, ...]], MemoryModel]
"""Returns the byte model of the step with exactly these savers."""


def price_savers(measure: Measure, names: Sequence[str], reference: IntArray, *, each: bool = True) -> Priced:
    """Price exact savers; those that lower no peak are dropped.

    Args:
        measure: see `Measure`.
        names: names of the requested savers.
        reference: the ranks to price them with, int64 (modules,).
        each: price each saver separately; otherwise all together, in two measurements, if that lowers the peak.
    """
    memory = plain = measure(())
    saved, kept = [Saved.of("plain LoRA", plain, reference)], tuple[str, ...]()
    if not each:
        together = measure(tuple(names))
        found = Saved.of(", ".join(names), together, reference)
        if found.is_less(saved[0]):
            return Priced(together, plain, (saved[0], found), tuple(names))
    for name in names:
        with_it = measure((*kept, name))
        found = Saved.of(name, with_it, reference)
        if found.is_less(saved[-1]):
            kept, memory = (*kept, name), with_it
            saved.append(found)
    return Priced(memory, plain, tuple(saved), kept)


def price_within(
    limit: float,
    priced: Priced,
    measure: Measure,
    reference: IntArray,
    least: Callable[[ByteCost], float],
    shape: BatchShape | None = None,
) -> Priced:
    """Add activation checkpointing if the reference exceeds a limit and gets smaller with it.

    Plans of few modules may get larger, so at least one plan must fit.

    Args:
        limit: bytes available to a step.
        priced: the step with the savers so far.
        measure: see `Measure`.
        reference: see `price_savers`.
        least: returns the bytes of the cheapest possible plan under a cost.
        shape: shape of the batch; by default the measured one.
    """
    if priced.memory.with_checkpointed(()).peak(reference, shape) <= limit:
        return priced
    memory = measure((*priced.names, ACTIVATIONS))
    found = Saved.of(ACTIVATIONS, memory, reference)
    if not found.is_less(priced.saved[-1]):
        return priced
    if min(least(memory.cost()), least(memory.with_checkpointed(()).cost())) > limit:
        return priced
    names = (*priced.names, ACTIVATIONS)
    return replace(priced, memory=memory, saved=(*priced.saved, found), names=names)
