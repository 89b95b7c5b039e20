"""Predicts the bytes at the peak of a training step, for any plan and batch shape.

`memory/calibration.py` records four small steps of the user's model and batch in which every module is adapted. They
show all tensors that any plan could hold, the modules that need each, and how its size grows with rows, length and
rank. The peak of any plan follows without running it.

The bytes are those that training takes beside the loaded, frozen model: adapter weights, gradients, optimiser state,
signal buffers, tensors saved for the backward pass, and short-lived tensors such as logits and activations' gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from .autograd_flow import ModuleSet, adapted_modules
from .batch_shape import BatchShape
from .cost import ByteCost, moment_costs
from .growth import Growth
from .model_states import ModelStates
from .peak_candidates import PeakCandidate, PeakStorages, find_peak_candidates, keep_candidates, needed_candidates
from .recording import Recording, Segment

RANK = 2
"""The rank of every module while steps are recorded; at rank 1 some operators take short cuts."""

CHECKPOINTING_MARGIN = 0.005, 0.02
"""Shares of the peak added under gradient checkpointing, not reentrant and reentrant: the second run of a segment takes
more than predicted (by up to 0.4 and 1.8 % on T5)."""


@dataclass(frozen=True, eq=False)
class MemoryModel:
    """Predicts the peak of a training step for any plan and batch shape; made by `calibrate`.

    Attributes:
        shape: the shape of the batch that was given to `calibrate`.
        accumulates: gradients are kept over several micro-batches.
        states: bytes that adapters and optimiser hold between steps.
    """

    shape: BatchShape
    accumulates: bool
    states: ModelStates
    _recording: Recording
    _base: FloatArray
    _slope: FloatArray
    _growth: Growth
    _block_bytes: int

    def sizes(self, shape: BatchShape) -> tuple[FloatArray, FloatArray]:
        """Bytes of each recorded storage at a batch shape: a constant part and bytes for each rank, both (storages,).

        Raises:
            UnsupportedError: the model's operations depend on its data, or its loss works in several tiles, so only the
                shape of calibration is known; or that shape was too short to tell how sizes grow with length.
        """
        factor = self._growth.factor(shape)
        base = np.round(self._base * factor)
        return np.ceil(base / self._block_bytes) * self._block_bytes, np.round(self._slope * factor)

    def cost(self, shape: BatchShape | None = None) -> ByteCost:
        """The cost of plans at a batch shape, that of calibration by default.

        Raises:
            UnsupportedError: see `sizes`.
        """
        cost, _, _ = self._full_cost(*self.sizes(shape or self.shape))
        return _with_margin(keep_candidates(cost, needed_candidates(cost, np.random.default_rng(0))), self.margin)

    def at_peak(self, ranks: IntArray, shape: BatchShape | None = None) -> PeakStorages:
        """The bytes of each storage at the peak of a plan, (modules,); the shape of calibration is the default.

        Raises:
            UnsupportedError: see `sizes`.
        """
        base, slope = self.sizes(shape or self.shape)
        cost, candidates, groups = self._full_cost(base, slope)
        kept = needed_candidates(cost, np.random.default_rng(0))
        cost = _with_margin(keep_candidates(cost, kept), self.margin)
        totals = moment_costs(cost, ranks)
        highest = int(totals.argmax())
        peak = PeakStorages(cost.moments[highest], float(totals[highest]), None, np.zeros(len(base)), self._recording)
        if kept[highest] == len(candidates):  # the optimiser's step
            return peak
        candidate = candidates[kept[highest]]
        live, group = groups.at(candidate)
        needed = np.append(groups.needs()[:, ranks > 0].any(axis=1), True)[group]
        copies = 1 + candidate.copied
        sizes = np.where(live & needed, copies * base, 0) + np.where(live, slope * self._rank_of_each(ranks), 0)
        serials, modules = self._gradients(candidate)
        sizes[serials] += np.where(modules < 0, base[serials], slope[serials] * ranks[modules])
        return replace(peak, candidate=candidate, sizes=sizes)

    @cached_property
    def _all_gradients(self) -> IntArray:
        """Serial numbers and target modules (-1 for none) of the gradients of all parameters, (2, gradients)."""
        return np.array([*self._recording.gradients.items()], dtype=np.int64).reshape(-1, 2).T

    def _gradients(self, candidate: PeakCandidate) -> tuple[IntArray, IntArray]:
        """Serial numbers and target modules (-1 for none) of the parameters' gradients that are live."""
        serials, modules = self._all_gradients
        live = self.accumulates | (self._recording.created[serials] <= candidate.time)
        return serials[live], modules[live]

    def _candidates(self, base: FloatArray, slope: FloatArray) -> list[PeakCandidate]:
        recording = self._recording.accumulating() if self.accumulates else self._recording
        return find_peak_candidates(recording, base + RANK * slope)

    def _full_cost(self, base: FloatArray, slope: FloatArray) -> tuple[ByteCost, list[PeakCandidate], _Groups]:
        """The cost of plans with every candidate, the optimiser's step last, and without margin."""
        recording, states = self._recording, self.states
        candidates = self._candidates(base, slope)
        groups = _Groups(recording, len(states.weights))
        rows = [self._bytes_at(candidate, base, slope, groups) for candidate in candidates]
        optimizer_step = states.between_steps + states.weights + states.scratch
        rows.append((states.others + states.other_gradients, {}, optimizer_step))
        by_group = np.zeros((len(rows), len(groups.modules)))
        for row, (_, grouped, _) in zip(by_group, rows, strict=True):
            row[list(grouped)] = list(grouped.values())
        fixed = np.tile(states.fixed, (len(rows), 1))
        cost = ByteCost(
            moments=(*(candidate.label for candidate in candidates), "optimizer step"),
            constant=np.array([constant for constant, _, _ in rows]),
            per_rank=np.stack([per_rank for _, _, per_rank in rows]),
            group_bytes=np.concatenate([by_group, fixed], axis=1),
            needs=np.concatenate([groups.needs(), np.eye(len(states.weights), dtype=np.bool_)]),
        )
        return cost, candidates, groups

    @property
    def recording(self) -> Recording:
        """The recorded step."""
        return self._recording

    def sizes_under(self, ranks: IntArray, shape: BatchShape | None = None) -> FloatArray:
        """Bytes of each recorded storage under a plan, if it is live at all, (storages,); see `sizes`.

        Those of a parameter's gradient are its weights', 0 if the module is not adapted.
        """
        base, slope = self.sizes(shape or self.shape)
        sizes = base + slope * self._rank_of_each(ranks)
        serials, modules = self._all_gradients
        rank = np.where(modules >= 0, np.asarray(ranks)[modules], 1)
        sizes[serials] = np.where(rank > 0, base[serials] + slope[serials] * rank, 0)
        return sizes

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The checkpointed segments, in forward order."""
        return self._recording.segments

    def recomputing(self, layers: Collection[str]) -> MemoryModel:
        """The byte model of the same step in which only these layers run again; see `Recording.recomputing`."""
        return replace(self, _recording=self._recording.recomputing(layers))

    def peak(self, ranks: IntArray, shape: BatchShape | None = None) -> float:
        """Bytes at the peak of one plan; quicker than `cost`, which serves for many. See `cost` for its errors."""
        base, slope = self.sizes(shape or self.shape)
        recording, states, adapted = self._recording, self.states, ranks > 0
        needs = _Needs.of(recording, adapted)
        growing = slope * self._rank_of_each(ranks)
        between_steps = states.others + states.between_steps @ ranks
        highest = states.other_gradients + (states.weights + states.scratch) @ ranks  # the optimiser's step
        for candidate in self._candidates(base, slope):
            live, counted = needs.at(candidate)
            serials, modules = self._gradients(candidate)
            gradients = np.where(modules < 0, base[serials], slope[serials] * ranks[modules]).sum()
            held = base[counted].sum() + base[counted & candidate.copied].sum() + growing[live].sum()
            highest = max(highest, held + gradients)
        return float(np.ceil((between_steps + highest + states.fixed @ adapted) * (1 + self.margin)))

    @property
    def margin(self) -> float:
        """The share of the peak by which predictions are raised, so that none is too low."""
        segments = self.segments
        return CHECKPOINTING_MARGIN[any(segment.reentrant for segment in segments)] if segments else 0.0

    def saved(self, ranks: IntArray, shape: BatchShape | None = None) -> float:
        """Bytes that autograd saves for backward outside of checkpointed segments; `ranks` has shape (modules,)."""
        base, slope = self.sizes(shape or self.shape)
        return float((base + slope * self._rank_of_each(ranks))[self._recording.saved_under(ranks)].sum())

    def _rank_of_each(self, ranks: IntArray) -> IntArray:
        """The rank of each storage's target module, 1 if it has none, (storages,)."""
        targets = self._recording.target_index
        return np.where(targets >= 0, np.asarray(ranks)[targets], 1)

    def _bytes_at(
        self, candidate: PeakCandidate, base: FloatArray, slope: FloatArray, groups: _Groups
    ) -> tuple[float, dict[int, float], FloatArray]:
        """Bytes of one candidate: under every plan, by group, and for one rank of each module."""
        recording, states = self._recording, self.states
        live, group = groups.at(candidate)
        of_target = live & (recording.target_index >= 0)
        per_rank = states.between_steps
        per_rank += np.bincount(recording.target_index[of_target], slope[of_target], minlength=len(per_rank))
        always = live & (group < 0)
        copies = 1 + candidate.copied
        constant = float((copies * base)[always].sum() + slope[live & ~of_target].sum()) + states.others
        serials, modules = self._gradients(candidate)
        constant += float(base[serials[modules < 0]].sum())
        of_module = modules >= 0
        per_rank += np.bincount(modules[of_module], slope[serials[of_module]], minlength=len(per_rank))
        sums = np.bincount(group[live & ~always], (copies * base)[live & ~always])
        return constant, dict(enumerate(sums.tolist())), per_rank


def _with_margin(cost: ByteCost, margin: float) -> ByteCost:
    higher = {name: np.ceil(getattr(cost, name) * (1 + margin)) for name in ("constant", "per_rank", "group_bytes")}
    return replace(cost, **higher)


@dataclass(frozen=True, eq=False)
class _Needs:
    """Which storages one plan holds, for each of several reasons; all masks are bool (reasons, storages).

    Attributes:
        known: whether it is known which modules need a storage for this reason; else it counts always.
        met: whether one of them is adapted.
    """

    known: BoolArray
    met: BoolArray

    @classmethod
    def of(cls, recording: Recording, adapted: BoolArray) -> _Needs:
        """The needs of a plan; `adapted` is bool (modules,)."""
        chosen = adapted_modules(adapted)
        reasons = reasons_to_hold(recording)
        known, met = np.zeros((2, len(reasons), len(recording.sizes)), dtype=np.bool_)
        for row, needs in enumerate(reasons):
            for serial, modules in needs.items():
                known[row, serial], met[row, serial] = bool(modules), bool(modules & chosen)
        return cls(known, met)

    def at(self, candidate: PeakCandidate) -> tuple[BoolArray, BoolArray]:
        """Whether each storage can be live at a candidate, and whether the plan holds it; both (storages,)."""
        reasons = candidate.reasons
        live = candidate.always | reasons.any(axis=0)
        held = (reasons & self.met).any(axis=0) | ~(reasons & self.known).any(axis=0)
        return live, candidate.always | (live & held)


def reasons_to_hold(recording: Recording) -> tuple[dict[int, ModuleSet], ...]:
    """By serial number, the modules for which a storage is held; see `PeakCandidate.reasons`."""
    of_segments = [0] * len(recording.segments)
    for serial, modules in recording.saved_in_segment.items():
        of_segments[recording.segment_index[serial]] |= modules
    inputs = {
        serial: modules
        for segment, modules in zip(recording.segments, of_segments, strict=True)
        for serial in segment.inputs
    }
    return *recording.needed_in_phases, recording.saved_in_segment, inputs


class _Groups:
    """The groups of a recording: storages that are live if one of the same set of the `count` modules is adapted."""

    def __init__(self, recording: Recording, count: int) -> None:
        self._count = count
        self._numbers: dict[ModuleSet, int] = {}
        self._sets: list[ModuleSet] = [0]
        reasons = reasons_to_hold(recording)
        self._columns = np.stack([self._column(by_serial, len(recording.sizes)) for by_serial in reasons])

    @property
    def modules(self) -> list[ModuleSet]:
        """The module set of each group."""
        return list(self._numbers)

    def needs(self) -> BoolArray:
        """Whether a group is live as soon as a module is adapted, (groups, modules)."""
        rows = [[modules >> m & 1 for m in range(self._count)] for modules in self._numbers]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), self._count)

    def at(self, candidate: PeakCandidate) -> tuple[BoolArray, IntArray]:
        """Whether each storage can be live, and its group, -1 if it is live under every plan; both (storages,)."""
        reasons = candidate.reasons
        live = candidate.always | reasons.any(axis=0)
        group = np.full(len(live), -1)
        grouped = np.flatnonzero(live & ~candidate.always)
        indices = np.where(reasons, self._columns, 0)[:, grouped]
        base = len(self._sets)
        *needed, saved, inputs = indices  # a storage is in one phase, so three indices are enough
        codes, inverse = np.unique((np.sum(needed, axis=0) * base + saved) * base + inputs, return_inverse=True)
        numbers = [self._number(code // base**2, code // base % base, code % base) for code in codes.tolist()]
        group[grouped] = np.array(numbers, dtype=np.int64)[inverse]
        return live, group

    def _number(self, *indices: int) -> int:
        """The number of the group whose set is the union of these sets (by index), -1 if it counts always."""
        modules = 0
        for index in indices:
            modules |= self._sets[index]
        if not modules or modules >> self._count:
            return -1
        return self._numbers.setdefault(modules, len(self._numbers))

    def _column(self, by_serial: dict[int, ModuleSet], count: int) -> IntArray:
        """The index into `_sets` of each storage's module set, (storages,)."""
        column = np.zeros(count, dtype=np.int64)
        indices: dict[ModuleSet, int] = {}
        for serial, modules in by_serial.items():
            if modules not in indices:
                indices[modules] = len(self._sets)
                self._sets.append(modules)
            column[serial] = indices[modules]
        return column
