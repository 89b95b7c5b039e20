"""Measure what plans cost on a user's own model and batch: a few small recorded steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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

ALLOCATION = 512
"""CUDA's caching allocator hands out blocks of multiples of this many bytes."""


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

    Records four steps of two or three rows, one of them half as long and one of higher ranks, and a forward pass; from
    these the size of every tensor follows for any shape. Weights, gradients, ranks and random state are as before
    afterwards.

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
    shape = BatchShape.of(batch)
    half = 2 if shape.length >= 4 else 1
    few = half if shape.rows == 1 else 2  # one row takes short cuts; two of half the length are not more
    part = 1 if shape.rows >= 4 else half  # of the length: all modules adapted may be more than the budget
    length = -(-shape.length // part)
    shorter = -(-length // half)
    small = reshaped(batch, BatchShape(few, length))
    with _probing(model, targets):
        recorder = Recorder(model, targets)
        base = _record(recorder, targets, small)
        short = _record(recorder, targets, reshaped(batch, BatchShape(few, shorter)))
        wide = _record(recorder, targets, reshaped(batch, BatchShape(few + 1, shorter)))
        flexible = _alike(base, wide) and _alike(base, short) and _grows_regularly(short, wide, (few + 1) / few)
        if not flexible:  # operations depend on the data: only the batch itself tells
            base = _record(recorder, targets, batch)
            small = dict(batch)
        double = _record(recorder, targets, small, 2 * RANK)
        _start(targets, RANK)
        base = recorder.lifetimes(base, small)
    _check_flow(base, targets)
    probed = BatchShape.of(small)
    shortened = -(-probed.length // half) / probed.length  # of the batch itself where only that tells
    slope = np.where(base.owners >= 0, (double.sizes - base.sizes) / RANK, 0.0)
    return MemoryModel(
        shape,
        accumulates,
        model_states(model, targets, optimizer, signal_bytes),
        base,
        probed,
        base.sizes - RANK * slope,
        slope,
        _power(wide, short, (few + 1) / few) if flexible else np.full(len(slope), np.nan),
        _power(base, short, 1 / shortened) if flexible else np.zeros(len(slope)),
        shortened,
        ALLOCATION if next(model.parameters()).is_cuda else 1,
    )


def _record(recorder: Recorder, targets: Sequence[TargetModule], batch: Batch, rank: int = RANK) -> Recording:
    _start(targets, rank)
    return recorder.step(batch)


def _start(targets: Sequence[TargetModule], rank: int) -> None:
    """Every module at this rank, and the same random draws each time."""
    for target in targets:
        write_in_place(target.weight_a, target.weight_a.new_zeros(rank, target.d_in))
        write_in_place(target.weight_b, target.weight_b.new_zeros(target.d_out, rank))
    torch.manual_seed(0)


@contextmanager
def _probing(model: nn.Module, targets: Sequence[TargetModule]) -> Iterator[None]:
    """Let every adapter train for a while; values, gradients and random state are put back afterwards."""
    pairs = [parameter for target in targets for parameter in target.parameters.values()]
    before = [(p, p.detach(), p.requires_grad) for p in pairs]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for parameter in pairs:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, value, trains in before:
                write_in_place(parameter, value)
                parameter.requires_grad_(trains)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _alike(one: Recording, other: Recording) -> bool:
    """Whether two recordings are of the same operations."""
    return one.forward_end == other.forward_end and np.array_equal(one.births, other.births)


def _grows_regularly(smaller: Recording, larger: Recording, factor: float) -> bool:
    """Whether sizes follow the rows: unchanged, linear or quadratic. Those of a mixture of experts follow the data."""
    power = _power(larger, smaller, factor)
    odd = np.abs(power - np.round(power)) > 0.1
    return bool(larger.sizes[odd].sum() <= 0.01 * larger.sizes.sum())


def _power(larger: Recording, smaller: Recording, factor: float) -> FloatArray:
    """The power with which each storage grew from one shape to another."""
    if factor == 1:
        return np.zeros(len(larger.sizes))
    ratio = np.maximum(larger.sizes, 1) / np.maximum(smaller.sizes, 1)
    power: FloatArray = np.log(ratio) / np.log(factor)
    return power


def _check_flow(recording: Recording, targets: Sequence[TargetModule]) -> None:
    """Make sure that every target module ran."""
    ran = np.unique(recording.owners[recording.births <= recording.forward_end])
    absent = np.setdiff1d(np.arange(len(targets)), ran)
    if len(absent):
        name = targets[int(absent[0])].name
        raise UnsupportedError(f"{name!r} took no part in the forward pass. Leave it out of `target_modules`.")
