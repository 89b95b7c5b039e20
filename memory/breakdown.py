"""Where the bytes of a training step go: the peak of one plan, by layer and by kind.

Every byte that `MemoryModel.cost` counts at the peak has one layer and one kind here. The sum over both, and the
margin on top, is the predicted peak.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import nn

from ..common.arrays import FloatArray, IntArray
from ..lora.targets import TargetModule
from .batch_shape import BatchShape
from .live_storages import storages
from .model import MemoryModel
from .peak_candidates import PeakCandidate, PeakStorages

Kind = Literal["saved", "inputs", "again", "moment", "weights", "gradients", "optimizer", "signals", "others"]
"""What bytes are for.

saved: tensors that autograd saved for the backward pass.
inputs: inputs of checkpointed segments, kept to run them again.
again: what a checkpointed segment holds while it runs again.
moment: what lives for a moment: logits, gradients of activations, the optimiser's copies.
weights, gradients, optimizer, signals: of the adapters, as in `ModelStates`.
others: weights, gradients and state of what trains outside the adapters, such as a classifier.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

LOSS = "loss and rest"
"""The row of what runs in no layer: the loss, masks, and what trains outside the adapters."""

_LAYER = re.compile(r"^(.*?\.\d+|\d+)(\.|$)")


@dataclass(frozen=True, eq=False)
class Breakdown:
    """The peak of one plan.

    Attributes:
        moment: the moment of the step at which the peak is.
        layers: rows from the model's input to its output, the loss last: names of layers, and of the modules below,
            beside and above them.
        bytes: of each layer and kind, (layers, len(KINDS)).
        margin: bytes that the prediction is set higher, so that it is not too low.
        layer_of: the row of each target module, (modules,).
    """

    moment: str
    layers: tuple[str, ...]
    bytes: FloatArray
    margin: float
    layer_of: tuple[str, ...]

    @property
    def total(self) -> float:
        """The predicted peak, as `total_cost` has it."""
        return float(self.bytes.sum()) + self.margin

    def of_kind(self, kind: Kind) -> float:
        """Bytes of one kind."""
        return float(self.bytes[:, KINDS.index(kind)].sum())

    def by_layer(self, *kinds: Kind) -> FloatArray:
        """Bytes of some kinds together, (layers,)."""
        result: FloatArray = self.bytes[:, [KINDS.index(kind) for kind in kinds]].sum(axis=1)
        return result


def break_down(
    memory: MemoryModel, targets: Sequence[TargetModule], ranks: IntArray, shape: BatchShape | None = None
) -> Breakdown:
    """Where the bytes are at the peak of a plan.

    Args:
        memory: from `calibrate`.
        targets: the target modules that it was made with.
        ranks: the plan, (modules,).
        shape: of the batch, that of calibration by default.

    Raises:
        UnsupportedError: see `MemoryModel.sizes`.
    """
    peak = memory.at_peak(ranks, shape)
    names = [_inner(name) for name in peak.recording.names]
    stems = {parent for name in names if (found := _LAYER.match(name)) for parent in _parents(found[1])}
    rows = {row: None for name in names if (row := _row(name, stems)) != LOSS}
    layers = (*rows, LOSS)
    index = {row: number for number, row in enumerate(layers)}
    table = np.zeros((len(layers), len(KINDS)))
    places = np.array([index[_row(name, stems)] for name in names])[peak.recording.places]
    owners = np.array([index[_row(target.name, stems)] for target in targets])
    if peak.moment is not None:
        _add_storages(table, peak, peak.moment, ranks, places, owners)
    _add_held(table, memory, peak.moment, ranks, owners)
    filled = np.flatnonzero(table.any(axis=1))
    used = tuple(layers[row] for row in filled)
    margin = peak.total - float(table.sum())
    return Breakdown(peak.label, used, table[filled], margin, tuple(layers[row] for row in owners))


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of the weights and buffers that do not train: what the loaded model takes, shared storages once."""
    tensors = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return sum({storage._cdata: storage.nbytes() for storage in storages(tensors)}.values())


def _inner(name: str) -> str:
    """A module's name inside the base model; empty for what wraps it."""
    return f"{name}.".partition("base_model.model.")[2].rstrip(".")


def _parents(name: str) -> list[str]:
    """All modules around one, the model itself (empty) first."""
    parts = name.split(".")
    return [".".join(parts[:size]) for size in range(len(parts))]


def _row(name: str, stems: set[str]) -> str:
    """The layer of a module, or the largest module around it that has no layer inside."""
    found = _LAYER.match(name)
    if found:
        return found[1]
    outside = [around for around in (*_parents(name), name) if around and around not in stems]
    return outside[0] if outside else LOSS


def _add_storages(
    table: FloatArray, peak: PeakStorages, moment: PeakCandidate, ranks: IntArray, places: IntArray, owners: IntArray
) -> None:
    """Count what the recording holds."""
    there = np.flatnonzero(peak.sizes)
    kinds, rows = _kinds(peak, moment, ranks)[there], places[there].copy()
    for position, serial in enumerate(there.tolist()):
        module = peak.recording.gradients.get(serial, -1)
        if module >= 0:
            rows[position] = owners[module]
    np.add.at(table, (rows, kinds), peak.sizes[there])


def _kinds(peak: PeakStorages, moment: PeakCandidate, ranks: IntArray) -> IntArray:
    """The kind of each storage, if it is there, as an index into `KINDS`, (storages,)."""
    recording = peak.recording
    forward = recording.births <= recording.forward_end
    backward = moment.time > recording.forward_end
    kinds = np.full(len(forward), KINDS.index("moment"))
    kinds[recording.saved_under(ranks)] = KINDS.index("saved")
    kinds[forward & (recording.parts >= 0) & backward] = KINDS.index("again")
    kinds[forward & moment.inputs] = KINDS.index("inputs")
    for serial, module in recording.gradients.items():
        kinds[serial] = KINDS.index("others" if module < 0 else "gradients")
    return kinds


def _add_held(
    table: FloatArray, memory: MemoryModel, moment: PeakCandidate | None, ranks: IntArray, owners: IntArray
) -> None:
    """Count what is held between steps; while the optimiser steps, all gradients and its copies too."""
    held = memory.held
    by_module: dict[Kind, FloatArray] = {
        "weights": held.weights * ranks,
        "optimizer": held.optimizer * ranks + held.fixed * (ranks > 0),
        "signals": held.signals * ranks,
    }
    others = held.others
    if moment is None:
        by_module |= {"gradients": held.weights * ranks, "moment": held.scratch * ranks}
        others += held.other_gradients
    for kind, sizes in by_module.items():
        np.add.at(table[:, KINDS.index(kind)], owners, sizes)
    table[-1, KINDS.index("others")] += others
