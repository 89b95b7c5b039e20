"""Byte model of a training step: predicts its peak for any plan and batch shape.

`cost/record/calibration.py` records four small steps of the user's model and batch with every module adapted. They show
every tensor a plan could hold, the modules that need it, and its growth with rows, length and rank. The peak of any
plan, and the layers it must checkpoint, follow without running it.

Bytes exclude the loaded, frozen model. They cover adapter weights, gradients, optimizer state, signal buffers, tensors
saved for the backward pass, and short-lived tensors such as logits and gradients of activations.

A checkpointed layer (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) keeps only its inputs and runs
its forward pass twice. The lowest layers hold saved tensors until the end of the backward pass, so recomputing them
lowers memory at every moment. An upper layer's tensors return as soon as it runs again, on top of those of all layers
below. Layers are therefore checkpointed from the lowest up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.errors import UnsupportedError
from .cost import ByteCost, ModuleSet, moment_costs, plan_cost
from .growth import Growth
from .peak_candidates import PeakCandidate, PeakFinder, PeakStorages, keep_candidates, needed_candidates
from .recording import BatchShape, Recording, Segment, adapted_modules

INPUTS_ON_DEVICE = 5
"""Inputs that TRL's offloading keeps on the device at once to overlap copies (`max_fwd_stash_size`)."""

NOISE = 1e-3
"""Tolerance in bytes: well above the rounding error of floating-point sums of products, well below one byte."""

RANK = 2
"""Rank of every module in recorded steps; some operators take shortcuts at rank 1."""

CHECKPOINTING_MARGIN = 0.005, 0.02
"""Shares of the peak added under non-reentrant and reentrant gradient checkpointing: recomputing a segment uses more
memory than predicted (up to 0.4 and 1.8 % on T5).
"""


@dataclass(frozen=True, eq=False)
class ModelStates:
    """State of an adapter and its optimizer between steps, in bytes.

    Attributes:
        weights: bytes of weights per rank of each module, (modules,); gradients take the same.
        optimizer: bytes of optimizer state per rank of each module, (modules,).
        scratch: temporary bytes per rank during the optimizer step, (modules,).
        signals: bytes per rank held by `SignalMeter` for each module, (modules,).
        fixed: rank-independent bytes of an adapted module: gradients and state of biases and magnitudes, (modules,).
        others: bytes of weights and state of everything else that trains, such as a classifier.
        other_gradients: bytes of its gradients, and of temporaries of its optimizer step.
        unranked: bytes of the biases and magnitudes of an adapted module, (modules,).
        other_weights: bytes of the weights of everything else in the model that trains.
        buckets: bytes per rank of further copies of the gradients, for communication with other processes, (modules,).
            Those of biases and magnitudes are in `fixed`, all others in `others`.
    """

    weights: FloatArray
    optimizer: FloatArray
    scratch: FloatArray
    signals: FloatArray
    fixed: FloatArray
    others: float
    other_gradients: float
    unranked: FloatArray
    other_weights: float
    buckets: FloatArray = field(default_factory=lambda: np.zeros(1))

    @property
    def between_steps(self) -> FloatArray:
        """Permanently allocated bytes per rank of each module, (modules,)."""
        held: FloatArray = self.weights + self.optimizer + self.signals + self.buckets
        return held

    def with_buckets(self, copies: float) -> ModelStates:
        """Return the same states with `copies` more copies of all gradients, in communication buckets."""
        return replace(
            self,
            buckets=self.buckets + np.ceil(copies * self.weights),
            fixed=self.fixed + np.ceil(copies * self.unranked),
            others=self.others + float(np.ceil(copies * self.other_weights)),
        )


@dataclass(frozen=True, eq=False)
class MemoryModel:
    """Predicts the peak of a training step for any plan and batch shape; created by `calibrate`.

    Attributes:
        shape: the batch shape passed to `calibrate`.
        accumulates: whether gradients accumulate over several micro-batches.
        states: bytes that adapters and optimizer hold between steps.
        recording: the recorded step.
    """

    shape: BatchShape
    accumulates: bool
    states: ModelStates
    recording: Recording
    _base: FloatArray
    _slope: FloatArray
    _growth: Growth
    _block_bytes: int

    def sizes(self, shape: BatchShape) -> tuple[FloatArray, FloatArray]:
        """Return the bytes of each recorded storage at a batch shape: constant and per rank, both (storages,).

        Raises:
            UnsupportedError: only the shape of calibration is known, because operations depend on the data or the loss
                uses several tiles; or only one length was measured.
        """
        factor = self._growth.factor(shape)
        base = np.round(self._base * factor)
        return np.ceil(base / self._block_bytes) * self._block_bytes, np.round(self._slope * factor)

    def predicts(self, shape: BatchShape) -> bool:
        """Check whether batches of a shape can be predicted; see `sizes`."""
        try:
            self._growth.factor(shape)
        except UnsupportedError:
            return False
        return True

    def standing_for(self, shape: BatchShape) -> MemoryModel:
        """Return the model of a step of one known shape as that of another, which it is then to stand for alone."""
        return replace(self, shape=shape, _growth=Growth.unknown(shape, len(self._base)))

    def cost(self, shape: BatchShape | None = None) -> ByteCost:
        """Return the cost of plans at a batch shape, by default the shape of calibration.

        Raises:
            UnsupportedError: see `sizes`.
        """
        base, slope = self.sizes(shape or self.shape)
        cost = self._full_cost(self._finder.candidates(base + RANK * slope), base, slope)
        return self._with_margin(keep_candidates(cost, needed_candidates(cost, np.random.default_rng(0))))

    def at_peak(self, ranks: IntArray, shape: BatchShape | None = None) -> PeakStorages:
        """Return the bytes of each storage at the peak of a plan, (modules,), by default at the shape of calibration.

        Raises:
            UnsupportedError: see `sizes`.
        """
        base, slope = self.sizes(shape or self.shape)
        _, candidate = self._highest(ranks, shape or self.shape)
        cost = self._full_cost([candidate] if candidate else [], base, slope)
        total = float(moment_costs(self._with_margin(cost), ranks)[0])
        peak = PeakStorages(cost.moments[0], total, candidate, np.zeros(len(base)), self.recording)
        if candidate is None:  # the optimizer step
            return peak
        live, counted = _Needs.of(self._reasons, ranks > 0).at(candidate)
        sizes = counted * (1 + candidate.copied) * base + live * slope * self.recording.rank_of_each(ranks)
        there, _ = self._gradients.at(candidate)
        sizes[there] += self._gradients.sizes(base, slope, ranks)[there]
        return replace(peak, sizes=sizes)

    @cached_property
    def _gradients(self) -> _Gradients:
        return _Gradients(self.recording, stay=self.accumulates)

    @cached_property
    def _finder(self) -> PeakFinder:
        return PeakFinder(self.recording.accumulating() if self.accumulates else self.recording)

    @cached_property
    def _reasons(self) -> _Reasons:
        return _Reasons(self.recording)

    @cached_property
    def _known(self) -> dict[Any, Any]:
        """Cache of earlier results, by their arguments."""
        return {}

    def _full_cost(self, candidates: Sequence[PeakCandidate], base: FloatArray, slope: FloatArray) -> ByteCost:
        """Return the cost of plans at these candidates and the optimizer step (last), without margin."""
        states = self.states
        groups = _Groups(self._reasons, len(states.weights))
        rows = [self._bytes_at(candidate, base, slope, groups) for candidate in candidates]
        optimizer_step = states.between_steps + states.weights + states.scratch
        rows.append((states.others + states.other_gradients, {}, optimizer_step))
        by_group = np.zeros((len(rows), len(groups.modules)))
        for row, (_, grouped, _) in zip(by_group, rows, strict=True):
            row[list(grouped)] = list(grouped.values())
        fixed = np.tile(states.fixed, (len(rows), 1))
        return ByteCost(
            moments=(*(candidate.label for candidate in candidates), "optimizer step"),
            constant=np.array([constant for constant, _, _ in rows]),
            per_rank=np.stack([per_rank for _, _, per_rank in rows]),
            group_bytes=np.concatenate([by_group, fixed], axis=1),
            needs=np.concatenate([groups.needs(), np.eye(len(states.weights), dtype=np.bool_)]),
        )

    def sizes_under(self, ranks: IntArray, shape: BatchShape | None = None) -> FloatArray:
        """Return the bytes of each recorded storage under a plan, wherever it is live, (storages,); see `sizes`.

        A parameter's gradient has the size of its weights, or 0 if the module is not adapted.
        """
        base, slope = self.sizes(shape or self.shape)
        sizes = base + slope * self.recording.rank_of_each(ranks)
        serials, modules = self._gradients.serials, self._gradients.modules
        rank = np.where(modules >= 0, np.asarray(ranks)[modules], 1)
        sizes[serials] = np.where(rank > 0, base[serials] + slope[serials] * rank, 0)
        return sizes

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The checkpointed segments, in forward order."""
        return self.recording.segments

    def with_checkpointed(self, layers: Collection[str]) -> MemoryModel:
        """Return a model of the same step with only these layers checkpointed; see `Recording.with_checkpointed`."""
        if (key := frozenset(layers)) not in self._known:
            self._known[key] = replace(self, recording=self.recording.with_checkpointed(key))
        found: MemoryModel = self._known[key]
        return found

    def offloaded(self) -> MemoryModel:
        """Return a model of the same step with inputs of checkpointed segments offloaded until recomputation."""
        return replace(self, recording=replace(self.recording, inputs_on_device=INPUTS_ON_DEVICE))

    def peak(self, ranks: IntArray, shape: BatchShape | None = None) -> float:
        """Return the peak bytes of one plan; faster than `cost`, which covers many plans but raises the same errors."""
        shape, states = shape or self.shape, self.states
        if (key := (shape, tuple(ranks.tolist()))) not in self._known:
            highest, _ = self._highest(ranks, shape)
            between_steps = states.others + (states.between_steps - states.signals) @ ranks
            predicted = np.ceil((between_steps + highest + states.fixed @ (ranks > 0)) * (1 + self.margin))
            self._known[key] = float(predicted + states.signals @ ranks)
        return float(self._known[key])

    def at_shapes(self, ranks: IntArray, shapes: Sequence[BatchShape]) -> ShapeBytes:
        """Return the peak bytes of a plan, (modules,), as a function of the shape; see `cost` for errors.

        Args:
            ranks: the plan, int64 (modules,).
            shapes: shapes at which to look for candidates of the peak: at least the corners of the range to evaluate.
        """
        states, growth = self.states, self._growth.kinds
        needs, factor = _Needs.of(self._reasons, ranks > 0), self.recording.rank_of_each(ranks)
        gradients = self._gradients.sizes(self._base, self._slope, ranks)
        always = states.other_gradients + float((states.weights + states.scratch) @ ranks)
        amounts: list[FloatArray] = [np.zeros(len(growth[0].row_power))]
        fixed = [always]
        for shape in shapes:
            highest, candidate = self._highest(ranks, shape)
            if candidate is None:
                continue
            live, counted = needs.at(candidate)
            held = self._base * (counted * (1.0 + candidate.copied)) + self._slope * factor * live
            there, _ = self._gradients.at(candidate)
            held[there] += gradients[there]
            amounts.append(np.bincount(growth[1], held, minlength=len(amounts[0])).astype(np.float64))
            found = growth[0].factors(np.array([shape.rows]), np.array([shape.length]))[0] @ amounts[-1]
            fixed.append(max(highest - float(found), 0.0))  # blocks of the allocator
        between = states.others + float((states.between_steps - states.signals) @ ranks + states.fixed @ (ranks > 0))
        signals = float(states.signals @ ranks)
        return ShapeBytes(growth[0], np.array(amounts), np.array(fixed), between, 1 + self.margin, signals)

    def _highest(self, ranks: IntArray, shape: BatchShape) -> tuple[float, PeakCandidate | None]:
        """Return the peak bytes of a plan above those between steps, and its candidate; None is the optimizer step."""
        base, slope = self.sizes(shape)
        states, finder, needs = self.states, self._finder, _Needs.of(self._reasons, ranks > 0)
        growing = slope * self.recording.rank_of_each(ranks)
        highest, found = states.other_gradients + (states.weights + states.scratch) @ ranks, None
        first = len(finder.parts)  # the part of the current peak; the first of equal ones wins
        gradients = self._gradients.sizes(base, slope, ranks)
        added = np.zeros(len(base)) if self.accumulates else gradients
        bounds = finder.bounds(base, growing, (needs.met | ~needs.known)[[0, -2, -1]], added)
        bounds += self.accumulates * gradients.sum()
        for part in np.argsort(-bounds, kind="stable").tolist():
            if bounds[part] < highest:
                break
            for candidate in finder.parts[part].candidates(base + RANK * slope):
                live, counted = needs.at(candidate)
                there = gradients[self._gradients.at(candidate)[0]].sum()
                held = base[counted].sum() + base[counted & candidate.copied].sum() + growing[live].sum() + there
                if held > highest or (held == highest and part < first):
                    highest, found, first = held, candidate, part
        return float(highest), found

    @property
    def margin(self) -> float:
        """Share of the peak, excluding signal buffers, added to predictions to keep them from being too low."""
        segments = self.segments
        return CHECKPOINTING_MARGIN[any(segment.reentrant for segment in segments)] if segments else 0.0

    def _with_margin(self, cost: ByteCost) -> ByteCost:
        """Add the margin to a cost. Signal buffers get none: a plan without them costs the same as plain LoRA."""
        raised, exact = 1 + self.margin, self.states.signals
        return replace(
            cost,
            constant=np.ceil(cost.constant * raised),
            per_rank=np.ceil((cost.per_rank - exact) * raised) + exact,
            group_bytes=np.ceil(cost.group_bytes * raised),
        )

    def saved(self, ranks: IntArray, shape: BatchShape | None = None) -> float:
        """Return the bytes autograd saves for backward outside checkpointed segments; `ranks` has shape (modules,)."""
        return float(self.sizes_under(ranks, shape)[self.recording.saved_under(ranks)].sum())

    def _bytes_at(
        self, candidate: PeakCandidate, base: FloatArray, slope: FloatArray, groups: _Groups
    ) -> tuple[float, dict[int, float], FloatArray]:
        """Return the bytes of one candidate: under every plan, by group, and per rank of each module."""
        recording, states = self.recording, self.states
        live, group = groups.at(candidate)
        of_target = live & (recording.target_index >= 0)
        per_rank = states.between_steps
        per_rank += np.bincount(recording.target_index[of_target], slope[of_target], minlength=len(per_rank))
        always = live & (group < 0)
        copies = 1 + candidate.copied
        constant = float((copies * base)[always].sum() + slope[live & ~of_target].sum()) + states.others
        serials, modules = self._gradients.at(candidate)
        constant += float(base[serials[modules < 0]].sum())
        of_module = modules >= 0
        per_rank += np.bincount(modules[of_module], slope[serials[of_module]], minlength=len(per_rank))
        sums = np.bincount(group[live & ~always], (copies * base)[live & ~always])
        return constant, dict(enumerate(sums.tolist())), per_rank


class _Gradients:
    """The gradients of all parameters.

    Args:
        recording: the recorded step.
        stay: True if all of them live throughout the step.

    Attributes:
        serials: their serial numbers, int64 (gradients,).
        modules: their target modules, -1 for none, int64 (gradients,).
    """

    def __init__(self, recording: Recording, *, stay: bool) -> None:
        pairs = np.array([*recording.gradients.items()], dtype=np.int64).reshape(-1, 2)
        self.serials, self.modules = pairs.T
        self._created, self._stay = recording.created[self.serials], stay

    def at(self, candidate: PeakCandidate) -> tuple[IntArray, IntArray]:
        """Return the serial numbers and target modules of those live at a candidate."""
        live = self._stay | (self._created <= candidate.time)
        return self.serials[live], self.modules[live]

    def sizes(self, base: FloatArray, slope: FloatArray, ranks: IntArray) -> FloatArray:
        """Return their bytes under a plan, 0 for other storages, (storages,); see `MemoryModel.sizes`."""
        sizes, serials, modules = np.zeros(len(base)), self.serials, self.modules
        sizes[serials] = np.where(modules < 0, base[serials], slope[serials] * ranks[modules])
        return sizes


@dataclass(frozen=True, eq=False)
class ShapeBytes:
    """Peak bytes of one plan for many batch shapes at once; created by `MemoryModel.at_shapes`.

    Attributes:
        growth: growth of one storage of each kind.
        amounts: bytes of each kind at each candidate for the peak, at the recorded shape, (candidates, kinds).
        fixed: shape-independent bytes at each candidate, (candidates,).
        between: bytes held between steps, without signal buffers.
        raised: factor that adds the margin to these bytes.
        signals: bytes of signal buffers.
    """

    growth: Growth
    amounts: FloatArray
    fixed: FloatArray
    between: float
    raised: float
    signals: float

    def __call__(self, rows: IntArray, lengths: IntArray) -> FloatArray:
        """Return the bytes at shapes given by their rows and lengths, all (shapes,)."""
        highest = (self.growth.factors(rows, lengths) @ self.amounts.T + self.fixed).max(axis=1)
        found: FloatArray = np.ceil((self.between + highest) * self.raised - NOISE) + self.signals
        return found


@dataclass(frozen=True, eq=False)
class _Needs:
    """Storages held by one plan, for each of several reasons; all masks are bool (reasons, storages).

    Attributes:
        known: whether the modules that need a storage for this reason are known; if not, it always counts.
        met: whether one of them is adapted.
    """

    known: BoolArray
    met: BoolArray

    @classmethod
    def of(cls, reasons: _Reasons, adapted: BoolArray) -> _Needs:
        """Build the needs of a plan; `adapted` is bool (modules,)."""
        chosen = adapted_modules(adapted)
        known, met = np.array([(bool(modules), bool(modules & chosen)) for modules in reasons.sets]).T
        return cls(known[reasons.columns], met[reasons.columns])

    def at(self, candidate: PeakCandidate) -> tuple[BoolArray, BoolArray]:
        """Return masks of the storages live at a candidate under any plan and held under this one; both (storages,)."""
        reasons = candidate.reasons
        live = candidate.always | reasons.any(axis=0)
        held = (reasons & self.met).any(axis=0) | ~(reasons & self.known).any(axis=0)
        return live, candidate.always | (live & held)


def reasons_to_hold(recording: Recording) -> tuple[dict[int, ModuleSet], ...]:
    """Return the modules that hold each storage, by serial number; see `PeakCandidate.reasons`."""
    of_segments = [0] * len(recording.segments)
    for serial, modules in recording.saved_in_segment.items():
        of_segments[recording.segment_index[serial]] |= modules
    inputs = {
        serial: modules
        for segment, modules in zip(recording.segments, of_segments, strict=True)
        for serial in segment.inputs
    }
    return *recording.needed_in_phases, recording.saved_in_segment, inputs


class _Reasons:
    """The modules that hold storages.

    Attributes:
        sets: distinct sets of modules; the first is empty.
        columns: the index of each storage's set for each of `reasons_to_hold`, int64 (reasons, storages).
    """

    def __init__(self, recording: Recording) -> None:
        self.sets: list[ModuleSet] = [0]
        reasons = reasons_to_hold(recording)
        self.columns: IntArray = np.stack([self._column(by_serial, len(recording.sizes)) for by_serial in reasons])

    def _column(self, by_serial: dict[int, ModuleSet], count: int) -> IntArray:
        """Return the index into `_sets` of each storage's module set, (storages,)."""
        column = np.zeros(count, dtype=np.int64)
        indices: dict[ModuleSet, int] = {}
        for serial, modules in by_serial.items():
            if modules not in indices:
                indices[modules] = len(self.sets)
                self.sets.append(modules)
            column[serial] = indices[modules]
        return column


class _Groups:
    """Groups of a recording: storages held once any of the same subset of the `count` modules is adapted."""

    def __init__(self, reasons: _Reasons, count: int) -> None:
        self._count = count
        self._numbers: dict[ModuleSet, int] = {}
        self._sets, self._columns = reasons.sets, reasons.columns

    @property
    def modules(self) -> list[ModuleSet]:
        """The module set of each group."""
        return list(self._numbers)

    def needs(self) -> BoolArray:
        """Return the modules that each make a group live, bool (groups, modules)."""
        rows = [[modules >> m & 1 for m in range(self._count)] for modules in self._numbers]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), self._count)

    def at(self, candidate: PeakCandidate) -> tuple[BoolArray, IntArray]:
        """Return a mask of live storages, and each storage's group, -1 if live under every plan; both (storages,)."""
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
        """Return the group number for the union of these sets (by index), or -1 if it always counts."""
        modules = 0
        for index in indices:
            modules |= self._sets[index]
        if not modules or modules >> self._count & 1:
            return -1
        return self._numbers.setdefault(modules, len(self._numbers))


def fewest_checkpointed(
    memory: MemoryModel, ranks: IntArray, limit: float, shape: BatchShape | None = None
) -> tuple[str, ...]:
    """Return the fewest layers to checkpoint for a plan to fit.

    Args:
        memory: the byte model of a step with every layer checkpointed.
        ranks: the plan, int64 (modules,).
        limit: bytes available to the step.
        shape: shape of the batch; defaults to that of calibration.

    Returns:
        Names of layers, the lowest first, without layers that hold nothing for the backward pass under this plan. If
            the plan does not fit even with all of these, returns all of them, or none if that takes less.
    """
    layers = holding_layers(memory, ranks)

    def peak(count: int) -> float:
        return memory.with_checkpointed(layers[:count]).peak(ranks, shape)

    low, high = 0, len(layers)
    if not layers or (above := peak(low)) <= limit:
        return ()
    if (within := peak(high)) > limit:
        return layers if within < above else ()
    while high - low > 1:  # layers are similar, so peaks fall almost linearly
        part = math.ceil((above - limit) / (above - within) * (high - low))
        count = low + min(max(part, 1), high - low - 1)
        if (found := peak(count)) <= limit:
            high, within = count, found
        else:
            low, above = count, found
    return layers[:high]


def checkpointed_cost(
    memory: MemoryModel,
    reference: IntArray,
    limit: float,
    shape: BatchShape | None = None,
    kept: IntArray | None = None,
    *,
    least: Callable[[ByteCost], float],
    whole: bool = False,
    unpaid: FloatArray | float = 0.0,
) -> ByteCost:
    """Return the cost of plans with optional checkpointing: a budget buys less checkpointing before more rank.

    If the reference and any ranks to keep fit without checkpointing, no layer is checkpointed. Otherwise a plan must
    fit with all layers checkpointed, and may cost as much as the reference without it; else plans
    would spend all checkpointing savings on ranks, and need every layer checkpointed. No layer is checkpointed if that
    saves nothing, as when logits dominate, or if plans only fit without it.

    Args:
        memory: the byte model of a step with every layer checkpointed.
        reference: ranks of the adapter as configured, int64 (modules,).
        limit: bytes available to the step. Costs without checkpointing are scaled to this limit and rounded down, so
            the reference itself stays within it.
        shape: shape of the batch; defaults to that of calibration.
        kept: ranks to keep, int64 (modules,); they replace the reference if they cost more.
        least: returns the bytes of the cheapest possible plan under a cost.
        whole: checkpoint all layers regardless of the limit, unless plain LoRA takes less without.
        unpaid: bytes per rank in the memory model that these plans do not use, (modules,); excluded from the costs.
    """

    def priced(model: MemoryModel) -> ByteCost:
        cost = model.cost(shape)
        return replace(cost, per_rank=cost.per_rank - unpaid)

    none = priced(memory.with_checkpointed(()))
    stay = [reference] + ([] if kept is None else [kept])
    plain, ranks = max(((plan_cost(none, ranks), ranks) for ranks in stay), key=lambda pair: pair[0])
    if whole:
        return every if plan_cost(every := priced(memory), ranks) < plain else none
    if plain <= limit:
        return none
    every = priced(memory)
    if least(none) <= least(every) and (plan_cost(every, ranks) >= plain or least(every) > limit):
        return none
    factor = limit / plain
    groups = [np.pad(every.group_bytes, ((0, 0), (0, len(none.needs))))]
    groups.append(np.pad(np.floor(factor * none.group_bytes), ((0, 0), (len(every.needs), 0))))
    return ByteCost(
        moments=(*every.moments, *(f"{moment}, without checkpointing" for moment in none.moments)),
        constant=np.concatenate([every.constant, np.floor(factor * none.constant)]),
        per_rank=np.concatenate([every.per_rank, np.floor(factor * none.per_rank)]),
        group_bytes=np.concatenate(groups),
        needs=np.concatenate([every.needs, none.needs]),
    )


def holding_layers(memory: MemoryModel, ranks: IntArray) -> tuple[str, ...]:
    """Return the names of layers that hold tensors for backward under a plan, int64 (modules,), lowest first."""
    adapted = adapted_modules(ranks)
    holding = [segment.name for segment in memory.segments if any(m & adapted for m in segment.saved.values())]
    return tuple(dict.fromkeys(holding))
