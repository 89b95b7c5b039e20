"""Break the peak of one plan down by layer and by kind of bytes.

Every byte in `MemoryModel.peak` has one layer and one kind. Their sum plus the margin is the predicted peak.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.text import branches_to
from ..lora.spec import ModuleSpec
from .model import MemoryModel
from .peak_candidates import PeakCandidate, PeakStorages
from .recording import BatchShape

Kind = Literal["saved", "inputs", "recomputed", "transient", "weights", "gradients", "optimizer", "signals", "others"]
"""Purpose of bytes.

saved: tensors saved by autograd for the backward pass.
inputs: inputs of checkpointed segments, kept for recomputation.
recomputed: tensors of a checkpointed segment during recomputation.
transient: short-lived tensors: logits, gradients of activations, the optimizer's copies.
weights, gradients, optimizer, signals: those of the adapters, as in `ModelStates`; gradients include their bucket
copies.
others: weights, gradients and state of everything trained outside the adapters, such as a classifier.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

LOSS = "loss and rest"
"""Row of bytes outside all layers: the loss, masks, and everything trained outside the adapters."""

_LAYER = re.compile(r"^(.*?\.\d+|\d+)(\.|$)")


@dataclass(frozen=True, eq=False)
class Breakdown:
    """The peak of one plan.

    Attributes:
        label: display name of the time of the peak.
        layers: names of the rows, from the model's input to its output, the loss last: layers, and modules outside all
            layers.
        bytes: bytes of each layer and kind, (layers, len(KINDS)).
        margin: bytes added to keep the prediction from being too low.
        layer_of: name of each target module's row, (modules,).
    """

    label: str
    layers: tuple[str, ...]
    bytes: FloatArray
    margin: float
    layer_of: tuple[str, ...]

    @property
    def total(self) -> float:
        """The predicted peak in bytes: `MemoryModel.peak`, with each part of the margin rounded up."""
        return float(self.bytes.sum()) + self.margin

    def of_kind(self, kind: Kind) -> float:
        """Return the bytes of one kind."""
        return float(self.bytes[:, KINDS.index(kind)].sum())

    def by_layer(self, *kinds: Kind) -> FloatArray:
        """Sum the bytes of the given kinds, (layers,)."""
        result: FloatArray = self.bytes[:, [KINDS.index(kind) for kind in kinds]].sum(axis=1)
        return result


def break_down(
    memory: MemoryModel, targets: Sequence[ModuleSpec], ranks: IntArray, shape: BatchShape | None = None
) -> Breakdown:
    """Break down a plan's peak; see `MemoryModel.at_peak`. `targets` are those passed to `calibrate`."""
    peak = memory.at_peak(ranks, shape)
    # Names inside the base model; empty for modules around it.
    names = [f"{name}.".partition("base_model.model.")[2].rstrip(".") for name in peak.recording.names]
    containers = {parent for name in names if (match := _LAYER.match(name)) for parent in branches_to(match[1])[:-1]}
    rows = {row: None for name in names if (row := _row(name, containers)) != LOSS}
    layers = (*rows, LOSS)
    index = {row: number for number, row in enumerate(layers)}
    table = np.zeros((len(layers), len(KINDS)))
    storage_rows = np.array([index[_row(name, containers)] for name in names])[peak.recording.name_index]
    target_rows = np.array([index[_row(target.name, containers)] for target in targets])
    if peak.candidate is not None:
        _add_storages(table, peak, peak.candidate, ranks, storage_rows, target_rows)
    _add_states(table, memory, peak.candidate is None, ranks, target_rows)
    filled = np.flatnonzero(table.any(axis=1))
    filled_layers = tuple(layers[row] for row in filled)
    margin = peak.total - float(table.sum())
    return Breakdown(peak.label, filled_layers, table[filled], margin, tuple(layers[row] for row in target_rows))


def _row(name: str, containers: set[str]) -> str:
    """Return a module's layer, or the largest enclosing module without layers."""
    match = _LAYER.match(name)
    if match:
        return match[1]
    outside = [module for module in branches_to(name) if module and module not in containers]
    return outside[0] if outside else LOSS


def _add_storages(
    table: FloatArray,
    peak: PeakStorages,
    candidate: PeakCandidate,
    ranks: IntArray,
    storage_rows: IntArray,
    target_rows: IntArray,
) -> None:
    live = np.flatnonzero(peak.sizes)
    kinds, rows = _kinds(peak, candidate, ranks)[live], storage_rows[live].copy()
    for position, serial in enumerate(live.tolist()):
        module = peak.recording.gradients.get(serial, -1)
        if module >= 0:
            rows[position] = target_rows[module]
    np.add.at(table, (rows, kinds), peak.sizes[live])


def _kinds(peak: PeakStorages, candidate: PeakCandidate, ranks: IntArray) -> IntArray:
    """Return the kind of each live storage, as an index into `KINDS`, (storages,)."""
    recording = peak.recording
    forward = recording.created <= recording.forward_end
    backward = candidate.time > recording.forward_end
    kinds = np.full(len(forward), KINDS.index("transient"))
    kinds[recording.saved_under(ranks)] = KINDS.index("saved")
    kinds[forward & (recording.segment_index >= 0) & backward] = KINDS.index("recomputed")
    kinds[forward & candidate.segment_inputs] = KINDS.index("inputs")
    for serial, module in recording.gradients.items():
        kinds[serial] = KINDS.index("others" if module < 0 else "gradients")
    return kinds


def _add_states(
    table: FloatArray, memory: MemoryModel, at_optimizer_step: bool, ranks: IntArray, target_rows: IntArray
) -> None:
    """Add model states to the table; at the optimizer step, also all gradients and the optimizer's copies."""
    states = memory.states
    by_module: dict[Kind, FloatArray] = {
        "weights": states.weights * ranks,
        "optimizer": states.optimizer * ranks + states.fixed * (ranks > 0),
        "signals": states.signals * ranks,
        "gradients": states.buckets * ranks,
    }
    others = states.others
    if at_optimizer_step:
        by_module |= {"gradients": (states.weights + states.buckets) * ranks, "transient": states.scratch * ranks}
        others += states.other_gradients
    for kind, sizes in by_module.items():
        np.add.at(table[:, KINDS.index(kind)], target_rows, sizes)
    table[-1, KINDS.index("others")] += others
