"""Peaks of a run beside those of its steps: its first step, evaluation, checkpoints, resuming and merging.

Between steps a device holds the frozen model, the adapters and the optimizer's state. An evaluation adds a forward pass
that saves nothing, and the outputs that a metric asks for: the Trainer keeps those of all batches so far on the device,
until `eval_accumulation_steps` batches are full, and joins each batch to them in a new tensor. Merging adds two
products of the factors of one module (`peft`'s `get_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..lora.spec import ModuleSpec
from .model import MemoryModel
from .recording import NEVER, BatchShape, Recording

MomentName = Literal["load", "first step", "step", "evaluation", "generation", "checkpoint", "resume", "merge"]

DELTA_BYTES, QUANTISED_DELTA_BYTES = 8, 14
"""Bytes per weight of a module during its merging into frozen weights, plain and quantised ones: two fp32 products, or
one beside the dequantised weights in 16 and in 32 bits and their sum.
"""

LOSS_BYTES = 8
"""Bytes per logit of a loss on all logits beside the logits themselves: a copy in fp32 and its log-softmax."""


@dataclass(frozen=True)
class Evaluation:
    """The batches of an evaluation.

    Attributes:
        shape: shape of a batch.
        kept: batches whose logits are on the device at once, for a metric; 0 if only the loss is needed.
        logit_bytes: bytes of the logits of a token.
        every_logit: bytes of a token's logits and their loss, if the recorded step computes fewer of them at once than
            an evaluation does; else 0.
    """

    shape: BatchShape
    kept: int = 0
    logit_bytes: float = 0.0
    every_logit: float = 0.0

    @property
    def output_bytes(self) -> float:
        """Bytes of the logits of a batch that are kept for a metric."""
        return bool(self.kept) * self.logit_bytes * self.shape.rows * self.shape.length

    @property
    def loss_bytes(self) -> float:
        """Bytes of all logits of a batch and their loss, if these are not in the recording; else 0."""
        return self.every_logit * self.shape.rows * self.shape.length

    def bytes(self, memory: MemoryModel, ranks: IntArray) -> float:
        """Return the peak of an evaluation without the frozen model, under a plan, int64 (modules,).

        Raises:
            UnsupportedError: see `MemoryModel.sizes`.
        """
        held, one = between_steps(memory, ranks), self.output_bytes
        passes = max(forward_bytes(memory, ranks, self.shape), self.loss_bytes) + max(self.kept - 1, 0) * one
        return float(held + max(passes, 2 * self.kept * one))


@dataclass(frozen=True)
class Moment:
    """One moment of a run.

    Attributes:
        name: its name.
        device_bytes: peak bytes of tensors on the device, including the frozen model.
        main_bytes: bytes of main memory that it needs meanwhile, if they are known; 0 for little.
    """

    name: MomentName
    device_bytes: float
    main_bytes: float = 0.0


def between_steps(memory: MemoryModel, ranks: IntArray) -> float:
    """Return the bytes of adapters and optimizer between steps, without signals; `ranks` has shape (modules,)."""
    states = memory.states
    return float(states.others + (states.between_steps - states.signals) @ ranks + states.fixed @ (ranks > 0))


def forward_span(recording: Recording) -> tuple[IntArray, IntArray, IntArray]:
    """Return the serial numbers, births and deaths of storages in a forward pass that saves nothing, (storages,)."""
    serials = np.flatnonzero(recording.created <= recording.forward_end)
    ended = np.where(recording.freed_if_unsaved > recording.forward_end, NEVER, recording.freed_if_unsaved)
    return serials, recording.created[serials], ended[serials]


def forward_bytes(memory: MemoryModel, ranks: IntArray, shape: BatchShape) -> float:
    """Return the peak bytes of a forward pass that saves nothing, under a plan, int64 (modules,).

    Layers that drop out at random are counted as in training: in evaluation they take less.

    Raises:
        UnsupportedError: see `MemoryModel.sizes`.
    """
    recording = memory.recording
    serials, born, died = forward_span(recording)
    sizes = memory.sizes_under(ranks, shape)[serials]
    changes: FloatArray = np.zeros(recording.forward_end + 2)
    np.add.at(changes, born, sizes)
    # A storage lives through the operator of its last use.
    np.add.at(changes, np.minimum(died, recording.forward_end) + 1, -sizes * (died < NEVER))
    return float(np.cumsum(changes).max())


def first_step_bytes(memory: MemoryModel, ranks: IntArray) -> float:
    """Return the peak of the first step, whose passes run before the optimizer has any state; see `forward_bytes`."""
    states = memory.states
    without = replace(memory, states=replace(states, optimizer=np.zeros_like(states.optimizer)))
    updating = states.other_gradients + float((states.weights + states.scratch) @ ranks)
    return max(without.peak(ranks), between_steps(memory, ranks) + updating)


def moments_of_run(
    memory: MemoryModel,
    targets: Sequence[ModuleSpec],
    ranks: IntArray,
    frozen_bytes: float,
    *,
    step_bytes: float,
    first_bytes: float | None = None,
    evaluation: Evaluation | None,
    quantised: bool = False,
    loaded_bytes: float = 0.0,
    awake_bytes: float = 0.0,
    generation_bytes: float = 0.0,
) -> tuple[Moment, ...]:
    """Return the moments of a run in the order in which they come.

    Args:
        memory: the byte model of a step.
        targets: the target modules.
        ranks: the plan, int64 (modules,).
        frozen_bytes: bytes of the frozen model on the device.
        step_bytes: peak of a step after the first, without the frozen model.
        first_bytes: peak of the first step, if the replay of a card tells it; by default that of the byte model.
        evaluation: batches of an evaluation; None for a run without one.
        quantised: whether frozen weights are quantised.
        loaded_bytes: bytes of main memory that loading takes.
        awake_bytes: bytes that an engine for generation holds during training.
        generation_bytes: bytes of generation beside these and the model; 0 for none.
    """
    states, held = memory.states, between_steps(memory, ranks)
    adapters = float(states.weights @ ranks + states.unranked @ (ranks > 0) + states.other_weights)
    widest = max(
        (each.d_in * each.d_out // each.experts for each, rank in zip(targets, ranks, strict=True) if rank), default=0
    )
    merged = (QUANTISED_DELTA_BYTES if quantised else DELTA_BYTES) * widest
    there = frozen_bytes + awake_bytes
    first = first_step_bytes(memory, ranks) if first_bytes is None else first_bytes
    found = [
        Moment("load", frozen_bytes, loaded_bytes),
        Moment("first step", there + min(first, step_bytes)),
        Moment("step", there + step_bytes),
    ]
    if evaluation:
        found.append(Moment("evaluation", there + evaluation.bytes(memory, ranks)))
    if awake_bytes or generation_bytes:
        found.append(Moment("generation", there + held + generation_bytes))
    return (
        *found,
        Moment("checkpoint", there + held, adapters),
        Moment("resume", there + held, held),
        Moment("merge", there + held + merged),
    )
