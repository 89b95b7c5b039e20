"""What a plan costs: bytes at the peak of a training step, predicted for any plan and batch shape.

`memory.calibration` records four small steps on the user's own model and batch: with every module adapted it sees all
tensors that any plan could hold, which modules each is needed for, and how its size grows with rows, length and rank. A
plan's peak follows from that without running it.

Counted is what training takes beside the loaded, frozen model: adapter weights, gradients, optimiser state, signal
buffers, tensors held for the backward pass, and what lives for a moment, such as logits and gradients of activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import UnsupportedError
from .autograd_flow import Modules
from .batch_shape import BatchShape
from .cost import ByteCost
from .model_states import ModelStates
from .peak_candidates import PeakCandidate, PeakStorages, find_moments, needed_moments, prune
from .recording import Recording

RANK = 2
"""Of every adapter while steps are recorded; a tensor with an axis of 1 takes short cuts that others do not."""

SECOND_PASS = 0.005, 0.02
"""Shares of the peak added under gradient checkpointing, not reentrant and reentrant: what the second pass of a segment
holds beyond the model of it (up to 0.4 and 1.8 % on T5)."""


@dataclass(frozen=True, eq=False)
class MemoryModel:
    """Predicts the peak of a training step for any plan and batch shape; made by `calibrate`.

    Attributes:
        shape: the batch that was given to `calibrate`.
        accumulates: gradients are kept over several micro-batches.
        held: what is held between steps.
    """

    shape: BatchShape
    accumulates: bool
    held: ModelStates
    _recording: Recording
    _probed: BatchShape
    _base: FloatArray
    _slope: FloatArray
    _row_power: FloatArray
    _length_power: FloatArray
    _shortened: float
    _granule: int

    def sizes(self, shape: BatchShape) -> tuple[FloatArray, FloatArray]:
        """Bytes of each recorded storage at a batch shape: those that do not depend on rank, and those of one rank.

        Raises:
            UnsupportedError: the model's operations depend on its data, so only the shape of calibration is known, or
                that was too short.
        """
        if self._shortened == 1 and shape.length != self._probed.length:
            raise UnsupportedError(
                f"Batches of {shape} cannot be predicted: the model was measured with batches of {self._probed}, which "
                "are too short to tell how memory grows with length. Calibrate with the longer batch."
            )
        if not np.isfinite(self._row_power).all() and shape != self._probed:
            raise UnsupportedError(
                f"Batches of {shape} cannot be predicted: the operations of this model depend on its data, so only "
                f"the shape that was measured, {self._probed}, is known. Calibrate with the larger batch."
            )
        factor = np.ones(len(self._base))
        if shape != self._probed:
            factor = (shape.rows / self._probed.rows) ** self._row_power
            factor *= _growth(shape.length / self._probed.length, self._length_power, self._shortened)
        base = np.round(self._base * factor)
        return np.ceil(base / self._granule) * self._granule, np.round(self._slope * factor)

    def cost(self, shape: BatchShape | None = None) -> ByteCost:
        """The price of plans at a batch shape, that of calibration by default.

        Raises:
            UnsupportedError: see `sizes`.
        """
        every, _, _ = self._candidates(*self.sizes(shape or self.shape))
        return _with_margin(prune(every, needed_moments(every, np.random.default_rng(0))), self.margin)

    def at_peak(self, ranks: IntArray, shape: BatchShape | None = None) -> PeakStorages:
        """What is there at the peak of a plan.

        Args:
            ranks: the plan, (modules,).
            shape: of the batch, that of calibration by default.

        Raises:
            UnsupportedError: see `sizes`.
        """
        base, slope = self.sizes(shape or self.shape)
        every, moments, groups = self._candidates(base, slope)
        kept = needed_moments(every, np.random.default_rng(0))
        cost = _with_margin(prune(every, kept), self.margin)
        prices = cost.prices(ranks[None])[0]
        highest = int(prices.argmax())
        found = PeakStorages(cost.moments[highest], float(prices[highest]), None, np.zeros(len(base)), self._recording)
        if kept[highest] == len(moments):  # the optimiser steps
            return found
        moment = moments[kept[highest]]
        alive, group = groups.at(moment)
        held = np.append(groups.needs()[:, ranks > 0].any(axis=1), True)[group]
        ranked = slope * self._ranked(ranks)
        copies = 1 + moment.twice
        sizes = np.where(alive & held, copies * base, 0) + np.where(alive, ranked, 0)
        serials, modules = self._gradients(moment)
        sizes[serials] = np.where(modules < 0, base[serials], slope[serials] * ranks[modules])
        return replace(found, moment=moment, sizes=sizes)

    @cached_property
    def _every_gradient(self) -> IntArray:
        """Serial numbers and target modules of the gradients of all parameters, (2, gradients)."""
        return np.array([*self._recording.gradients.items()], dtype=np.int64).reshape(-1, 2).T

    def _gradients(self, moment: PeakCandidate) -> tuple[IntArray, IntArray]:
        """Serial numbers and target modules (-1 for none) of the gradients that are there at a moment."""
        serials, modules = self._every_gradient
        there = self.accumulates | (self._recording.births[serials] <= moment.time)
        return serials[there], modules[there]

    def _candidates(self, base: FloatArray, slope: FloatArray) -> tuple[ByteCost, list[PeakCandidate], _Groups]:
        """The price of plans at every moment, the optimiser's step last, without margin."""
        recording, held = self._recording, self.held
        moments = find_moments(recording, base + RANK * slope)
        groups = _Groups(recording, len(held.weights))
        rows = [self._moment(moment, base, slope, groups) for moment in moments]
        rows.append((held.others + held.other_gradients, {}, self._stepping()))
        by_group = np.zeros((len(rows), len(groups.modules)))
        for row, (_, grouped, _) in zip(by_group, rows, strict=True):
            row[list(grouped)] = list(grouped.values())
        fixed = np.tile(held.fixed, (len(rows), 1))
        cost = ByteCost(
            moments=(*(moment.label for moment in moments), "optimizer step"),
            constant=np.array([constant for constant, _, _ in rows]),
            per_rank=np.stack([per_rank for _, _, per_rank in rows]),
            held=np.concatenate([by_group, fixed], axis=1),
            needs=np.concatenate([groups.needs(), np.eye(len(held.weights), dtype=np.bool_)]),
        )
        return cost, moments, groups

    @property
    def margin(self) -> float:
        """The share of the peak that predictions are set too high, so that none is too low."""
        segments = self._recording.segments
        return SECOND_PASS[any(segment.reentrant for segment in segments)] if segments else 0.0

    def saved(self, ranks: IntArray, shape: BatchShape | None = None) -> float:
        """Bytes that autograd saves for backward under a plan, checkpointed segments apart, (modules,) -> bytes."""
        base, slope = self.sizes(shape or self.shape)
        return float((base + slope * self._ranked(ranks))[self._recording.saved_under(ranks)].sum())

    def _ranked(self, ranks: IntArray) -> IntArray:
        """The rank of the module that each storage belongs to, 1 where it belongs to none, (storages,)."""
        owners = self._recording.owners
        return np.where(owners >= 0, np.asarray(ranks)[owners], 1)

    def _moment(
        self, moment: PeakCandidate, base: FloatArray, slope: FloatArray, groups: _Groups
    ) -> tuple[float, dict[int, float], FloatArray]:
        """Constant, bytes by group and bytes of each module's rank at one moment."""
        recording, held = self._recording, self.held
        alive, group = groups.at(moment)
        owned = alive & (recording.owners >= 0)
        per_rank = held.weights + held.optimizer + held.signals
        per_rank += np.bincount(recording.owners[owned], slope[owned], minlength=len(held.weights))
        lone = alive & (group < 0)
        copies = 1 + moment.twice
        constant = float((copies * base)[lone].sum() + slope[alive & ~owned].sum()) + held.others
        serials, modules = self._gradients(moment)
        constant += float(base[serials[modules < 0]].sum())
        own = modules >= 0
        per_rank += np.bincount(modules[own], slope[serials[own]], minlength=len(held.weights))
        sums = np.bincount(group[alive & ~lone], (copies * base)[alive & ~lone])
        return constant, dict(enumerate(sums.tolist())), per_rank

    def _stepping(self) -> FloatArray:
        held = self.held
        result: FloatArray = 2 * held.weights + held.optimizer + held.scratch + held.signals
        return result


def _growth(ratio: float, power: FloatArray, measured: float) -> FloatArray:
    """How much larger storages are at another length.

    Between two whole powers it is a sum of both, as for labels that were padded by one token.

    Args:
        ratio: the length over that of the recording.
        power: with which each storage grew.
        measured: the ratio at which that was measured, below 1; 1 if it was not.
    """
    if measured == 1:
        return np.ones(len(power))
    whole = np.floor(power + 1e-9)
    share = (measured ** (power - whole) - measured) / (1 - measured)
    growth: FloatArray = ratio**whole * (share + (1 - share) * ratio)
    return growth


def _with_margin(cost: ByteCost, margin: float) -> ByteCost:
    higher = {name: np.ceil(getattr(cost, name) * (1 + margin)) for name in ("constant", "per_rank", "held")}
    return replace(cost, **higher)


class _Groups:
    """Numbers the sets of modules for which storages are there."""

    def __init__(self, recording: Recording, count: int) -> None:
        self._count = count
        self._numbers: dict[Modules, int] = {}
        self._masks: list[Modules] = [0]
        segments = [0] * len(recording.segments)
        for serial, modules in recording.inside.items():
            segments[recording.parts[serial]] |= modules
        inputs = {
            serial: mask
            for segment, mask in zip(recording.segments, segments, strict=True)
            for serial in segment.inputs
        }
        self._columns = np.stack(
            [self._column(masks, len(recording.sizes)) for masks in (recording.needed, recording.inside, inputs)]
        )

    @property
    def modules(self) -> list[Modules]:
        """The set of each group."""
        return list(self._numbers)

    def needs(self) -> BoolArray:
        """Whether a group is there as soon as a module is adapted, (groups, modules)."""
        rows = [[modules >> m & 1 for m in range(self._count)] for modules in self._numbers]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), self._count)

    def at(self, moment: PeakCandidate) -> tuple[BoolArray, IntArray]:
        """Which storages can be there at a moment, and the group of each: -1 under every plan, (storages,)."""
        kinds = np.stack([moment.needed, moment.inside, moment.inputs])
        alive = moment.always | kinds.any(axis=0)
        group = np.full(len(alive), -1)
        chosen = np.flatnonzero(alive & ~moment.always)
        indices = np.where(kinds, self._columns, 0)[:, chosen]
        base = len(self._masks)
        codes, inverse = np.unique((indices[0] * base + indices[1]) * base + indices[2], return_inverse=True)
        numbers = [self._number(code // base**2, code // base % base, code % base) for code in codes.tolist()]
        group[chosen] = np.array(numbers, dtype=np.int64)[inverse]
        return alive, group

    def _number(self, *indices: int) -> int:
        mask = 0
        for index in indices:
            mask |= self._masks[index]
        if not mask or mask >> self._count:
            return -1
        return self._numbers.setdefault(mask, len(self._numbers))

    def _column(self, masks: dict[int, Modules], count: int) -> IntArray:
        """For each storage, where its set stands in `_masks`."""
        column = np.zeros(count, dtype=np.int64)
        known: dict[Modules, int] = {}
        for serial, mask in masks.items():
            if mask not in known:
                known[mask] = len(self._masks)
                self._masks.append(mask)
            column[serial] = known[mask]
        return column
