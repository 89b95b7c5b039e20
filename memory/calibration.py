"""Measures, by a few small recorded steps, what plans cost on a user's model and batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..common.arrays import FloatArray
from ..errors import UnsupportedError
from ..lora.factors import write_in_place
from ..lora.targets import TargetModule
from .batch_shape import BatchShape, reshaped
from .model import RANK, MemoryModel
from .model_states import model_states
from .recorder import Recorder
from .recording import Batch, Recording

CUDA_BLOCK = 512
"""CUDA's caching allocator rounds sizes up to multiples of this many bytes."""


@dataclass(frozen=True, eq=False)
class _Steps:
    """The recorded steps.

    Attributes:
        base: the step of the small batch, with every module at rank RANK.
        double: the same at twice that rank.
        short: the step of a batch of fewer tokens.
        wide: the step of that batch with one more row.
        shape: the shape of the small batch.
        row_ratio: rows of `wide` over those of `short`.
        length_ratio: length of `short` over that of `base`; 1 if the batch is too short to be cut.
        regular: whether the three shapes run the same operations, with sizes that follow from the shape. Otherwise
            only `base` and `double` count, and are of the whole batch.
    """

    base: Recording
    double: Recording
    short: Recording
    wide: Recording
    shape: BatchShape
    row_ratio: float
    length_ratio: float
    regular: bool


def calibrate(
    model: nn.Module,
    targets: Sequence[TargetModule],
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    signal_bytes: bool = True,
    accumulates: bool = False,
) -> MemoryModel:
    """Measure what plans cost on this model and batch.

    Four small steps are recorded (two or three rows; one step of half the length, one of higher ranks), and a forward
    pass. From these the size of every tensor follows for any shape. Weights, gradients, ranks and random state are
    restored afterwards.

    Args:
        model: the PEFT model, on its device, in the mode in which it trains.
        targets: its target modules.
        batch: keyword arguments of the model, as large as the largest batch that training will see.
        optimizer: decides the bytes of state; AdamW's two tensors without one.
        signal_bytes: count the buffers in which `SignalMeter` averages gradients.
        accumulates: gradients are kept over several micro-batches of each step.

    Raises:
        UnsupportedError: the model returns no loss, or a target module takes no part in its forward pass.
    """
    with _all_training(model, targets):
        steps = _record_steps(Recorder(model, targets), targets, batch)
    base = steps.base
    _check_all_ran(base, targets)
    slope = np.where(base.target_index >= 0, (steps.double.sizes - base.sizes) / RANK, 0.0)
    row_power, length_power = np.full(len(slope), np.nan), np.zeros(len(slope))
    if steps.regular:
        row_power = _power(steps.wide, steps.short, steps.row_ratio)
        length_power = _power(base, steps.short, 1 / steps.length_ratio)
    return MemoryModel(
        BatchShape.of(batch),
        accumulates,
        model_states(model, targets, optimizer, signal_bytes),
        base,
        steps.shape,
        base.sizes - RANK * slope,
        slope,
        row_power,
        length_power,
        steps.length_ratio,
        CUDA_BLOCK if next(model.parameters()).is_cuda else 1,
    )


def _record_steps(recorder: Recorder, targets: Sequence[TargetModule], batch: Batch) -> _Steps:
    """Record steps smaller than the batch, because a step with every module adapted may exceed the budget."""
    shape = BatchShape.of(batch)
    half = 2 if shape.length >= 4 else 1
    rows = half if shape.rows == 1 else 2  # one row takes short cuts; two rows of half the length are no larger
    length = -(-shape.length // (1 if shape.rows >= 4 else half))
    shorter = -(-length // half)
    small = reshaped(batch, BatchShape(rows, length))
    row_ratio = (rows + 1) / rows
    base = _record(recorder, targets, small)
    short = _record(recorder, targets, reshaped(batch, BatchShape(rows, shorter)))
    wide = _record(recorder, targets, reshaped(batch, BatchShape(rows + 1, shorter)))
    regular = (
        _same_operations(base, wide) and _same_operations(base, short) and _grows_regularly(short, wide, row_ratio)
    )
    if not regular:  # operations depend on the data, so only the batch itself tells
        base = _record(recorder, targets, batch)
        small = dict(batch)
    double = _record(recorder, targets, small, 2 * RANK)
    _prepare(targets, RANK)
    base = recorder.lifetimes(base, small)
    recorded = BatchShape.of(small)
    length_ratio = -(-recorded.length // half) / recorded.length
    return _Steps(base, double, short, wide, recorded, row_ratio, length_ratio, regular)


def _record(recorder: Recorder, targets: Sequence[TargetModule], batch: Batch, rank: int = RANK) -> Recording:
    _prepare(targets, rank)
    return recorder.step(batch)


def _prepare(targets: Sequence[TargetModule], rank: int) -> None:
    """Give every module this rank, and reset the random generator, so that steps draw the same numbers."""
    for target in targets:
        write_in_place(target.weight_a, target.weight_a.new_zeros(rank, target.d_in))
        write_in_place(target.weight_b, target.weight_b.new_zeros(target.d_out, rank))
    torch.manual_seed(0)


@contextmanager
def _all_training(model: nn.Module, targets: Sequence[TargetModule]) -> Iterator[None]:
    """Let every adapter train inside the context; restore values, gradients and random state afterwards."""
    parameters = [parameter for target in targets for parameter in target.parameters.values()]
    before = [(p, p.detach(), p.requires_grad) for p in parameters]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, value, trains in before:
                write_in_place(parameter, value)
                parameter.requires_grad_(trains)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _same_operations(one: Recording, other: Recording) -> bool:
    """Whether two recordings ran the same operations."""
    return one.forward_end == other.forward_end and np.array_equal(one.created, other.created)


def _grows_regularly(smaller: Recording, larger: Recording, factor: float) -> bool:
    """Whether sizes are whole powers of the rows, but for 1 % of the bytes; a mixture of experts' follow the data."""
    power = _power(larger, smaller, factor)
    irregular = np.abs(power - np.round(power)) > 0.1
    return bool(larger.sizes[irregular].sum() <= 0.01 * larger.sizes.sum())


def _power(larger: Recording, smaller: Recording, factor: float) -> FloatArray:
    """The power of `factor` by which each storage is larger, (storages,); 0 if the factor is 1."""
    if factor == 1:
        return np.zeros(len(larger.sizes))
    ratio = np.maximum(larger.sizes, 1) / np.maximum(smaller.sizes, 1)
    power: FloatArray = np.log(ratio) / np.log(factor)
    return power


def _check_all_ran(recording: Recording, targets: Sequence[TargetModule]) -> None:
    """Raise UnsupportedError if a target module took no part in the forward pass."""
    ran = np.unique(recording.target_index[recording.created <= recording.forward_end])
    absent = np.setdiff1d(np.arange(len(targets)), ran)
    if len(absent):
        name = targets[int(absent[0])].name
        raise UnsupportedError(f"{name!r} took no part in the forward pass. Leave it out of `target_modules`.")
