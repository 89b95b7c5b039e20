"""The moments of a training step at which memory can be highest, and what each holds under any plan.

In the forward pass what is held for backward only grows, so a moment is beaten by any later one at which the tensors
that live by themselves are as large. In the backward pass it only shrinks, and earlier moments beat later ones. That
leaves a handful of the thousands of operators; with gradient checkpointing, a handful for each segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from .cost import ByteCost
from .recording import Recording

UNDERESTIMATE = 1e-4
"""Moments are left out as long as no sampled plan loses more than this share of its peak."""


@dataclass(frozen=True, eq=False)
class PeakCandidate:
    """What is alive at one moment; all masks are bool (storages,).

    Attributes:
        label: for people.
        always: storages that are there under every plan.
        needed: storages that are there for the modules in `Recording.needed`.
        inside: storages that are there for the modules in `Recording.inside`.
        inputs: storages that are there for all modules of a checkpointed segment, whose inputs they are.
        twice: storages of which there is a second copy then.
        time: gradients created later are not there yet.
    """

    label: str
    always: BoolArray
    needed: BoolArray
    inside: BoolArray
    inputs: BoolArray
    twice: BoolArray
    time: int


@dataclass(frozen=True, eq=False)
class PeakStorages:
    """The peak of one plan, storage by storage; what is held between steps (`ModelStates`) comes on top.

    Attributes:
        label: the moment, for people.
        total: bytes of all that the plan holds then, margin included.
        moment: None while the optimiser steps, when no storage of the recording is left.
        sizes: bytes of each recorded storage, 0 if it is not there, gradients of parameters included, (storages,).
        recording: the step.
    """

    label: str
    total: float
    moment: PeakCandidate | None
    sizes: FloatArray
    recording: Recording


def find_moments(recording: Recording, sizes: FloatArray) -> list[PeakCandidate]:
    """The candidates for the peak of a step.

    Args:
        recording: a whole step, with lifetimes.
        sizes: bytes of each storage at the shape that counts, (storages,).
    """
    return [*_Finder(recording, sizes).moments()]


class _Finder:
    def __init__(self, recording: Recording, sizes: FloatArray) -> None:
        self._recording, self._sizes = recording, sizes
        serials = np.arange(len(recording.sizes))
        self._forward = recording.births <= recording.forward_end
        self._needed = self._forward & np.isin(serials, list(recording.needed))
        self._inside = np.isin(serials, list(recording.inside))
        self._gradient = np.isin(serials, list(recording.gradients))
        self._on_context = np.isin(serials, list(recording.on_context))
        self._none = np.zeros(len(serials), dtype=np.bool_)
        self._first_input = np.full(len(serials), len(serials))  # the first segment that each storage is an input of
        for index in range(len(recording.segments))[::-1]:
            self._first_input[list(recording.segments[index].inputs)] = index
        self._is_input = self._first_input < len(serials)

    def moments(self) -> Iterator[PeakCandidate]:
        """All candidates."""
        yield from self._forward_moments()
        yield from self._backward_moments()
        for index in range(len(self._recording.segments)):
            yield from self._recomputed_moments(index)

    def _forward_moments(self) -> Iterator[PeakCandidate]:
        recording = self._recording
        for time in self._highest(self._forward, recording.alone)[::-1]:
            lives = self._forward & (recording.births <= time)
            always = lives & (recording.alone >= time)
            held = lives & ~always
            needed = held & self._needed & (recording.deaths >= time)
            inputs = held & self._is_input
            yield PeakCandidate(self._label("forward", time), always, needed, self._none, inputs, self._none, time)

    def _backward_moments(self) -> Iterator[PeakCandidate]:
        recording = self._recording
        backward = ~self._forward & ~self._gradient
        for part in np.unique(recording.parts[backward]).tolist():
            for time in self._highest(backward & (recording.parts == part), recording.deaths, last=False):
                yield self._in_backward(self._label("backward", time), part, time)

    def _in_backward(self, label: str, part: int, time: int, *, over: bool = False) -> PeakCandidate:
        """While gradients flow through a segment (-1: outside of all), during an operator or, if `over`, after it."""
        recording = self._recording
        alive = (recording.births <= time) & (recording.deaths >= time + over) & ~self._gradient
        within = self._forward & (recording.parts == part) & (part >= 0)
        inside = alive & within & self._inside
        # Of what functions kept on their contexts in the first run, the second run makes a copy.
        twice = inside & self._on_context & self._needed
        if part >= 0 and recording.segments[part].reentrant:
            inside[list(recording.segments[part].outputs)] = True
            alive |= self._incoming(part)
        waiting = self._is_input & (self._first_input <= part if part >= 0 else alive)
        needed = alive & (~self._forward | self._needed)
        always = alive & self._forward & ~self._needed & ~self._inside & ~self._is_input
        return PeakCandidate(label, always, needed, inside, waiting, twice, time)

    def _start(self, part: int) -> int:
        """The time after which a segment runs again, just before gradients flow through it; -1 if none do."""
        recording = self._recording
        flowing = ~self._forward & (recording.parts == part)
        if not recording.segments[part].reentrant:  # by the first operation that had saved something
            flowing &= recording.unpacks
        return int(recording.births[flowing].min()) - 1 if flowing.any() else -1

    def _incoming(self, part: int) -> BoolArray:
        """The gradients that a segment with a graph of its own was given, and holds to its end."""
        start, recording = self._start(part), self._recording
        alive = (recording.births <= start) & (recording.deaths > start)
        return ~self._forward & ~self._gradient & alive

    def _recomputed_moments(self, index: int) -> Iterator[PeakCandidate]:
        """While a segment runs again."""
        recording, segment = self._recording, self._recording.segments[index]
        kept = self._inside & (recording.parts == index)
        start = self._start(index)
        if start < 0 or not kept.any():
            return
        before = self._in_backward("", index, start, over=True)
        within = self._forward & (recording.parts == index)
        last = segment.end if segment.reentrant else int(recording.births[kept].max())
        again = within & (recording.births <= last)
        for time in self._highest(again, np.minimum(recording.alone, segment.end))[::-1]:
            lives = again & (recording.births <= time)
            always = lives & (recording.alone >= time)
            inside = lives & ~always & self._inside & (recording.deaths >= time)
            label, rest = self._label("recomputed", time), before.always & ~within
            twice = lives & self._on_context & self._needed
            yield PeakCandidate(label, rest | always, before.needed, inside, before.inputs, twice, start)

    def _highest(self, among: BoolArray, deaths: IntArray, *, last: bool = True) -> list[int]:
        """The times at which more of these storages is alive than at any later (or, not `last`, earlier) time."""
        births = self._recording.births[among]
        if not len(births):
            return []
        end = int(births.max()) + 1
        change = np.zeros(end + 2)
        np.add.at(change, births, self._sizes[among])
        np.add.at(change, np.minimum(deaths[among], end) + 1, -self._sizes[among])
        level = np.cumsum(change)
        times = np.unique(births)[:: -1 if last else 1]
        levels = level[times]
        before = np.maximum.accumulate(np.concatenate([[-1.0], levels[:-1]]))
        highest: list[int] = times[levels > before].tolist()
        return highest

    def _label(self, phase: str, time: int) -> str:
        recording = self._recording
        place = recording.places[np.searchsorted(recording.births, time)]
        return f"{phase}: {recording.names[place] if place >= 0 and recording.names[place] else 'model'}"


def needed_moments(cost: ByteCost, generator: np.random.Generator, plans: int = 300) -> list[int]:
    """The moments that are the peak of random plans, but for a negligible share of it; indices, rising.

    Args:
        cost: with all candidates.
        generator: draws the plans: any density, top layers only, ranks 1 to 64.
        plans: how many.
    """
    prices = cost.prices(np.stack([*_sampled(cost, generator, plans)]))
    peaks = prices.max(axis=1)
    kept: list[int] = []
    while True:
        reached = prices[:, kept].max(axis=1) if kept else np.zeros(len(prices))
        lost = (peaks - reached) / peaks
        if lost.max() <= UNDERESTIMATE:
            return sorted(kept)
        kept.append(int(prices[int(lost.argmax())].argmax()))


def prune(cost: ByteCost, kept: list[int]) -> ByteCost:
    """Leave out all other moments, and the groups that none of these holds."""
    used = cost.held[kept].any(axis=0)
    return replace(
        cost,
        moments=tuple(cost.moments[index] for index in kept),
        constant=cost.constant[kept],
        per_rank=cost.per_rank[kept],
        held=cost.held[kept][:, used],
        needs=cost.needs[used],
    )


def _sampled(cost: ByteCost, generator: np.random.Generator, plans: int) -> Iterator[IntArray]:
    count = cost.per_rank.shape[1]
    yield np.zeros(count, dtype=np.int64)
    for rank in (1, 8, 64):
        yield np.full(count, rank)
        yield from rank * np.eye(count, dtype=np.int64)[generator.permutation(count)[:100]]
    for _ in range(plans):
        ranks = generator.choice([1, 2, 4, 8, 16, 32, 64], size=count)
        if generator.random() < 0.5:
            ranks = np.full(count, generator.choice([1, 4, 8, 16, 64]))
        active = generator.random(count) < generator.choice([0.05, 0.2, 0.5, 0.9, 1.0])
        active[: generator.integers(0, count) if generator.random() < 0.5 else 0] = False
        yield np.where(active, ranks, 0)
