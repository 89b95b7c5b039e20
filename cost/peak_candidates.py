"""Peak candidates: times in a training step at which memory can peak, and the live storages under any plan.

In the forward pass saved tensors only accumulate, so a time is no peak if the other tensors take as much at a later
one. In the backward pass saved tensors only shrink, so earlier times win; or later ones, if adapter gradients outgrow
the saved tensors. This leaves a handful of thousands of operators, or a handful per segment with gradient
checkpointing. On batches of about 16 tokens, other times can be higher by a few per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from .cost import ByteCost, moment_costs
from .recording import NEVER, Recording

UNDERESTIMATE = 1e-4
"""Candidates are dropped while no sampled plan's peak falls by more than this share."""


@dataclass(frozen=True, eq=False)
class PeakCandidate:
    """Storages that can be live at one time of a step; masks are bool (storages,) unless noted.

    Attributes:
        label: display name of the time.
        always: storages live under every plan.
        needed: storages live if one of their modules in a phase of `Recording.needed_in_phases` is adapted, (phases,
            storages); each is in at most one phase.
        saved_in_segment: storages live if one of their modules in `Recording.saved_in_segment` is adapted.
        segment_inputs: inputs of a checkpointed segment, live if any module the segment saves for is adapted.
        copied: storages with a second live copy.
        time: the time; gradients created later are not live yet.
    """

    label: str
    always: BoolArray
    needed: BoolArray
    saved_in_segment: BoolArray
    segment_inputs: BoolArray
    copied: BoolArray
    time: int

    @property
    def reasons(self) -> BoolArray:
        """Masks of the storages live under some plans, in the order of `reasons_to_hold`."""
        return np.vstack([self.needed, self.saved_in_segment, self.segment_inputs])


@dataclass(frozen=True, eq=False)
class PeakStorages:
    """The peak of one plan per storage, without `ModelStates`.

    Attributes:
        label: display name of the time of the peak.
        total: bytes at the peak, with model states and margin.
        candidate: the candidate at the peak; None for the optimizer step, when no recorded storage is live.
        sizes: bytes of each recorded storage, including parameter gradients; 0 if not live, (storages,).
        recording: the recorded step.
    """

    label: str
    total: float
    candidate: PeakCandidate | None
    sizes: FloatArray
    recording: Recording


@dataclass(frozen=True)
class PartOfStep:
    """A part of a step, and its candidates.

    Attributes:
        times: possible times of its candidates; for the recomputation of a segment, the time just before it.
        segment: the running segment, -1 for none.
        second: whether the segment is being recomputed.
        candidates: creates the candidates from the bytes of each storage.
    """

    times: IntArray
    segment: int
    second: bool
    candidates: Callable[[FloatArray], Iterator[PeakCandidate]]


class PeakFinder:
    """Finds the candidates for the peak of a recorded step. Sizes are bytes of each storage at a shape, (storages,)."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        serials = np.arange(len(recording.sizes))
        self._forward = recording.created <= recording.forward_end
        self._needed = self._forward & np.isin(serials, list(recording.needed))
        self._saved_in_segment = np.isin(serials, list(recording.saved_in_segment))
        self._gradient = np.isin(serials, list(recording.gradients))
        self._on_context = np.isin(serials, list(recording.on_context_until))
        self._none = np.zeros(len(serials), dtype=np.bool_)
        self._first_segment = np.full(len(serials), len(serials))  # the first segment with a storage as input
        for index in range(len(recording.segments))[::-1]:
            self._first_segment[list(recording.segments[index].inputs)] = index
        self._is_input = self._first_segment < len(serials)
        self._phase_ends = np.full((len(recording.needed_in_phases), len(serials)), NEVER)
        for serial, phases in recording.needed_later.items():
            self._phase_ends[: len(phases), serial] = [time for time, _ in phases]

    @cached_property
    def parts(self) -> list[PartOfStep]:
        """Parts: the forward pass, the backward pass outside segments and in each, and each recomputation."""
        recording = self._recording
        parts = [PartOfStep(recording.created[self._forward], -1, False, self._in_forward_pass)]
        backward = ~self._forward & ~self._gradient
        for index in sorted(set(recording.segment_index[backward].tolist())):
            own = backward & (recording.segment_index == index)
            candidates = partial(self._in_backward_pass, own, index)
            parts.append(PartOfStep(recording.created[own], index, False, candidates))
        for index, start in enumerate(self._second_starts.tolist()):
            if start >= 0:
                parts.append(PartOfStep(np.array([start]), index, True, partial(self._in_second_run, index)))
        return parts

    def candidates(self, sizes: FloatArray) -> list[PeakCandidate]:
        """Return the candidates of all parts."""
        return [candidate for part in self.parts for candidate in part.candidates(sizes)]

    def bounds(self, base: FloatArray, growing: FloatArray, held: BoolArray, gradients: FloatArray) -> FloatArray:
        """Return an upper bound in bytes for the candidates of each of `parts`, (parts,).

        Args:
            base: bytes of each storage if held, (storages,).
            growing: additional bytes if it is live at all, (storages,).
            held: whether it is held where needed, saved in a running segment, or as such a segment's input, (3,
                storages).
            gradients: bytes as a parameter gradient, 0 for others, (storages,).
        """
        recording, segments, parts = self._recording, self._recording.segments, self.parts
        if any(segment.reentrant for segment in segments):
            return np.full(len(parts), np.inf)
        where_needed, where_saved, as_input = np.where(held, base, 0.0) + growing
        created, freed = recording.created, recording.freed
        # Of its restored tensors, an inactive segment only holds its inputs.
        back_again = self._forward & ~self._needed & (self._saved_in_segment | self._is_input)
        live = self._level(~back_again & ~self._gradient, created, freed, where_needed)
        live += np.cumsum(np.bincount(created, gradients, minlength=len(live)))
        inside, count = self._forward & (recording.segment_index >= 0), len(segments)
        starts, ends, begins = np.full((3, count + 1), NEVER)
        starts[:-1], ends[:-1] = self._second_starts, [segment.end for segment in segments]
        for part in parts[1:]:
            if not part.second:
                begins[part.segment] = part.times.min()
        starts, ends, begins = (times[recording.segment_index] for times in (starts, ends, begins))
        saved, copied = inside & self._saved_in_segment, inside & self._needed & self._on_context
        back = saved & (begins < NEVER) & (freed >= begins)
        returned = live + self._level(back & ~self._needed, begins, freed, where_saved)
        returned += self._level(back & copied, begins, freed, base)
        # Storages also needed outside their segment are in `live`; only a copy is added.
        others = inside & ~(self._needed & held[0] & (freed > starts))
        soon = np.minimum(recording.freed_if_unsaved, ends)
        running = self._level(others, created, soon, base + growing)
        running += self._level(others & saved & (soon < ends), soon + 1, ends, where_saved)
        running += self._level(copied, created, ends, base)
        inputs = np.bincount(self._first_segment[self._is_input], as_input[self._is_input], minlength=count).cumsum()
        found = np.full(len(parts), np.inf)
        for number, part in enumerate(parts[1:], start=1):
            within = live if part.second or part.segment < 0 else returned
            found[number] = within[part.times].max()
            if count:
                found[number] += inputs[part.segment]  # of all segments, where none runs
            if part.second:
                segment = segments[part.segment]
                found[number] += running[segment.start : segment.end + 1].max()
        return found

    def _level(self, among: BoolArray, created: IntArray, freed: IntArray, sizes: FloatArray) -> FloatArray:
        """Return the bytes of storages at each time, given their creation and release times, (times,)."""
        last = int(self._recording.created.max())
        change = np.bincount(created[among], sizes[among], minlength=last + 2)
        change -= np.bincount(np.minimum(freed[among], last) + 1, sizes[among], minlength=last + 2)
        return np.cumsum(change)

    def _in_forward_pass(self, sizes: FloatArray) -> Iterator[PeakCandidate]:
        recording = self._recording
        for time in self._highest(sizes, self._forward, recording.freed_if_unsaved)[::-1]:
            created = self._forward & (recording.created <= time)
            always = created & (recording.freed_if_unsaved >= time)
            rest = created & ~always
            needed = rest & self._needed & (recording.freed >= time)
            inputs = rest & self._is_input & self._on_device(self._begun(time))
            phases, none = self._in_phases(needed, time), self._none
            yield PeakCandidate(self._label("forward", time), always, phases, none, inputs, none, time)

    def _in_backward_pass(self, own: BoolArray, index: int, sizes: FloatArray) -> Iterator[PeakCandidate]:
        recording = self._recording
        soonest = np.minimum(recording.freed, self._phase_ends[0])  # as under the plans that free gradients early
        times: set[int] = set()
        for freed in (recording.freed, soonest):
            times.update(self._highest(sizes, own, freed, latest=False), self._highest(sizes, own, freed))
        for time in sorted(times):
            yield self._during_backward(self._label("backward", time), index, time)

    def _during_backward(self, label: str, index: int, time: int, *, after: bool = False) -> PeakCandidate:
        """Return the candidate while gradients pass a segment (-1: none), during an operator or `after` it."""
        recording = self._recording
        live = (recording.created <= time) & (recording.freed >= time + after) & ~self._gradient
        within = self._forward & (recording.segment_index == index) & (index >= 0)
        saved_in_segment = live & within & self._saved_in_segment
        # Recomputation copies tensors that function contexts still hold from the first run.
        copied = saved_in_segment & self._on_context & self._needed
        held_to_end = self._none
        if index >= 0 and recording.segments[index].reentrant:
            saved_in_segment[list(recording.segments[index].outputs)] = True
            held_to_end = self._incoming_gradients(index)
            live |= held_to_end
        # The layer may save only a cast copy of its input, so the input need not be live at the loss.
        inputs = self._is_input & (self._first_segment <= index if index >= 0 else live | self._yet_to_run(time))
        inputs &= self._on_device(index if index >= 0 else self._begun(recording.forward_end))
        needed = live & (~self._forward | self._needed)
        always = live & self._forward & ~self._needed & ~self._saved_in_segment & ~self._is_input
        phases = self._in_phases(needed & ~held_to_end, time + after)
        phases[0] |= needed & held_to_end
        return PeakCandidate(label, always, phases, saved_in_segment, inputs, copied, time)

    def _in_phases(self, needed: BoolArray, time: int) -> BoolArray:
        """Return these storages by their phase at a time, bool (phases, storages)."""
        numbers = np.arange(len(self._phase_ends))[:, np.newaxis]
        result: BoolArray = needed & ((self._phase_ends < time).sum(axis=0) == numbers)
        return result

    def _begun(self, time: int) -> int:
        """Return the last segment started by a time, -1 for none."""
        return sum(segment.start <= time for segment in self._recording.segments) - 1

    def _on_device(self, index: int) -> BoolArray:
        """Return the storages not offloaded as segment inputs while this segment runs, bool (storages,)."""
        count = self._recording.inputs_on_device
        near: BoolArray = self._first_segment > index - count
        return near if count else ~self._none

    def _yet_to_run(self, time: int) -> BoolArray:
        """Return the inputs of segments not yet recomputed by `time`, bool (storages,)."""
        waits = np.append(self._second_starts >= time, False)
        waiting: BoolArray = waits[np.minimum(self._first_segment, len(waits) - 1)]
        return waiting

    @cached_property
    def _second_starts(self) -> IntArray:
        """Recomputation time of each segment, -1 for none, (segments,)."""
        segments = range(len(self._recording.segments))
        return np.array([self._recording.second_run_start(index) for index in segments], dtype=np.int64)

    def _incoming_gradients(self, index: int) -> BoolArray:
        """Return the initial gradients of a reentrant segment's backward pass, held until it ends."""
        recording = self._recording
        start = int(self._second_starts[index])
        live = (recording.created <= start) & (recording.freed > start)
        return ~self._forward & ~self._gradient & live

    def _in_second_run(self, index: int, sizes: FloatArray) -> Iterator[PeakCandidate]:
        recording, segment = self._recording, self._recording.segments[index]
        saved = self._saved_in_segment & (recording.segment_index == index)
        start = int(self._second_starts[index])
        if not saved.any():
            return
        before = self._during_backward("", index, start, after=True)
        within = self._forward & (recording.segment_index == index)
        last = segment.end if segment.reentrant else int(recording.created[saved].max())
        checkpointed = within & (recording.created <= last)
        for time in self._highest(sizes, checkpointed, np.minimum(recording.freed_if_unsaved, segment.end))[::-1]:
            created = checkpointed & (recording.created <= time)
            always = created & (recording.freed_if_unsaved >= time)
            saved_now = created & ~always & self._saved_in_segment & (recording.freed >= time)
            label, outside = self._label("recomputed", time), before.always & ~within
            copied = created & self._on_context & self._needed
            yield replace(
                before, label=label, always=outside | always, saved_in_segment=saved_now, copied=copied, time=start
            )

    def _highest(self, sizes: FloatArray, among: BoolArray, freed: IntArray, *, latest: bool = True) -> list[int]:
        """Return times at which these storages exceed all later times (all earlier ones if not `latest`)."""
        created = self._recording.created[among]
        if not len(created):
            return []
        end = int(created[-1]) + 1
        change = np.bincount(created, sizes[among], minlength=end + 2)
        change -= np.bincount(np.minimum(freed[among], end) + 1, sizes[among], minlength=end + 2)
        level = np.cumsum(change)
        times = created[np.diff(created, append=-1) != 0][:: -1 if latest else 1]
        levels = level[times]
        before = np.maximum.accumulate(np.concatenate([[-1.0], levels[:-1]]))
        highest: list[int] = times[levels > before].tolist()
        return highest

    def _label(self, phase: str, time: int) -> str:
        recording = self._recording
        index = recording.name_index[np.searchsorted(recording.created, time)]
        return f"{phase}: {recording.names[index] if index >= 0 and recording.names[index] else 'model'}"


def needed_candidates(cost: ByteCost, generator: np.random.Generator) -> list[int]:
    """Return sorted indices of candidates that lower each sampled plan's peak by at most `UNDERESTIMATE`.

    Samples a few fixed plans and 300 random ones: any density, or top layers only, with ranks 1 to 64.
    """
    costs = moment_costs(cost, np.stack([*_sampled(cost, generator)]))
    peaks = costs.max(axis=1)
    kept: list[int] = []
    while True:
        reached = costs[:, kept].max(axis=1) if kept else np.zeros(len(costs))
        lost = (peaks - reached) / peaks
        if lost.max() <= UNDERESTIMATE:
            return sorted(kept)
        kept.append(int(costs[int(lost.argmax())].argmax()))


def keep_candidates(cost: ByteCost, kept: list[int]) -> ByteCost:
    """Restrict the cost to these candidates (indices), and to the groups held by at least one of them."""
    used = cost.group_bytes[kept].any(axis=0)
    return replace(
        cost,
        moments=tuple(cost.moments[index] for index in kept),
        constant=cost.constant[kept],
        per_rank=cost.per_rank[kept],
        group_bytes=cost.group_bytes[kept][:, used],
        needs=cost.needs[used],
    )


def _sampled(cost: ByteCost, generator: np.random.Generator) -> Iterator[IntArray]:
    count = cost.per_rank.shape[1]
    yield np.zeros(count, dtype=np.int64)
    for rank in (1, 8, 64):
        yield np.full(count, rank)
        yield from rank * np.eye(count, dtype=np.int64)[generator.permutation(count)[:100]]
    for _ in range(300):
        ranks = generator.choice([1, 2, 4, 8, 16, 32, 64], size=count)
        if generator.random() < 0.5:
            ranks = np.full(count, generator.choice([1, 4, 8, 16, 64]))
        active = generator.random(count) < generator.choice([0.05, 0.2, 0.5, 0.9, 1.0])
        active[: generator.integers(0, count) if generator.random() < 0.5 else 0] = False
        yield np.where(active, ranks, 0)
