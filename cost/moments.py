"""Peaks of a run beside those of its steps: its first step, evaluation, checkpoints, resuming and merging.

Between steps a device holds the frozen model, the adapters and the optimizer's state. An evaluation adds a forward pass
that saves nothing, and the outputs that a metric asks for: the Trainer keeps those of all batches so far on the device,
until `eval_accumulation_steps` batches are full, and joins each batch to them in a new tensor. Merging adds two
products of the factors of one module (`peft`'s `get_delta_weight`).

Files pass through main memory: safetensors copies all tensors of a file there before it writes any, and the Trainer
loads the optimizer's state there, or onto each device if there are several (`Trainer._load_optimizer_and_scheduler`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

MERGED_FILE_BYTES = 50e9
"""Most bytes of one file of a merged model (`max_shard_size` of transformers' `save_pretrained`)."""

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
        main_bytes: bytes of main memory that the first process needs meanwhile, beside the program; 0 for little, and
            for a model on its own device.
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


@dataclass(frozen=True)
class Peaks:
    """Peaks of a run without the frozen model, in bytes of tensors on a device.

    Attributes:
        first: in the first step.
        step: in all steps.
        evaluation: in an evaluation; 0 without one.
        between: between steps.
    """

    first: float
    step: float
    evaluation: float
    between: float


@dataclass(frozen=True)
class Files:
    """What the files of a run on cards need, in bytes of its first process.

    Attributes:
        main: main memory by moment; 0 for a moment that is left out.
        resumed: what resuming loads onto the card beside the state that it replaces.
        streamed: frozen weights that stay in main memory throughout.
    """

    main: Mapping[MomentName, float]
    resumed: float = 0.0
    streamed: float = 0.0

    @classmethod
    def of(
        cls,
        memory: MemoryModel,
        ranks: IntArray,
        frozen_bytes: float,
        *,
        gpus: int = 1,
        sharding: str = "ddp",
        streamed: float = 0.0,
    ) -> Files:
        """Return what the files of a plan need.

        Args:
            memory: the byte model of a step on one card alone.
            ranks: the plan, int64 (modules,).
            frozen_bytes: bytes of the whole frozen model. The first process of fsdp2 or zero3 loads them before they
                are shared, and that of fsdp2 gathers them for a checkpoint (`FULL_STATE_DICT`).
            gpus: number of cards.
            sharding: how they share the run; see `Shards`.
            streamed: bytes of frozen weights that stay in main memory, and are written from there.
        """
        states = memory.states
        weights = float(states.weights @ ranks + states.unranked @ (ranks > 0) + states.other_weights)
        optimizer = between_steps(memory, ranks) - weights
        several = gpus > 1 and sharding == "ddp"
        main: dict[MomentName, float] = {
            "load": frozen_bytes * (sharding in ("fsdp2", "zero3")),
            "checkpoint": weights + frozen_bytes * (sharding == "fsdp2"),
            "resume": optimizer * (not several) / (gpus if sharding.startswith("zero") else 1),
            "merge": min(frozen_bytes - streamed, MERGED_FILE_BYTES),
        }
        return cls(main, optimizer * several, streamed)


def moments_of_run(
    targets: Sequence[ModuleSpec],
    ranks: IntArray,
    frozen_bytes: float,
    peaks: Peaks,
    files: Files | None = None,
    *,
    quantised: bool = False,
    awake_bytes: float = 0.0,
    generation_bytes: float = 0.0,
) -> tuple[Moment, ...]:
    """Return the moments of a run in the order in which they come.

    Args:
        targets: the target modules.
        ranks: the plan, int64 (modules,).
        frozen_bytes: bytes of the frozen model on the device.
        peaks: peaks without the frozen model.
        files: what the files need on cards; None for a model on its own device.
        quantised: whether frozen weights are quantised.
        awake_bytes: bytes that an engine for generation holds during training.
        generation_bytes: bytes of generation beside these and the model; 0 for none.
    """
    widest = max(
        (each.d_in * each.d_out // each.experts for each, rank in zip(targets, ranks, strict=True) if rank), default=0
    )
    merged = (QUANTISED_DELTA_BYTES if quantised else DELTA_BYTES) * widest
    there = frozen_bytes + awake_bytes
    found: list[tuple[MomentName, float]] = [
        ("load", frozen_bytes),
        ("first step", there + peaks.first),
        ("step", there + peaks.step),
    ]
    if peaks.evaluation:
        found.append(("evaluation", there + peaks.evaluation))
    if awake_bytes or generation_bytes:
        found.append(("generation", there + peaks.between + generation_bytes))
    held, files = there + peaks.between, files or Files({})
    found += [("checkpoint", held), ("resume", held + files.resumed), ("merge", held + merged)]
    return tuple(Moment(name, size, files.main.get(name, 0.0) + files.streamed) for name, size in found)
