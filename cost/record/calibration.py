"""Calibrate a training step: byte model, cost of a plan, and budget in the same unit.

The byte model is built from a few small recorded steps of the user's model and batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft.utils.integrations import get_bnb_param_type
from torch import nn

from ...common.arrays import IntArray
from ...common.errors import RankPilotError, UnsupportedError
from ...common.text import branches_to
from ...lora.adapters import signal_buffer_bytes
from ...lora.resize import write_in_place
from ...lora.targets import TargetModule
from ..batch_shape import Batch, follows_rows, reshaped, shape_of
from ..budget import Budget, Limit
from ..cards import MOST_WORKSPACE_BYTES
from ..cost import ByteCost, Cost, ParameterCost
from ..growth import Growth
from ..model import RANK, MemoryModel, ModelStates, checkpointed_cost
from ..recording import BatchShape, Recording
from ..savers.exact import ExactSavers
from ..savers.later_logits import expecting_one
from ..savers.prices import Saved
from ..savers.streamed_base import streaming_of
from ..savers.tiled_loss import scaled
from ..tile_size import LossTiles
from ..training_step import LossFunction, TrainingStep
from .live_storages import device_kind
from .model_states import frozen_bytes, model_states, trained_outside
from .recorder import AGREE, Recorder

CUT_FAILS = (RuntimeError, ValueError, LookupError, TypeError, AssertionError)
"""Exceptions a loss function may raise for a resized batch."""

MOST_BRANCHES = 3
"""Maximum number of unused branches of a model to list in an error."""

CUDA_BLOCK = 512
"""CUDA's caching allocator rounds sizes up to multiples of this many bytes."""


def calibrate(
    model: nn.Module,
    targets: Sequence[TargetModule],
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: LossFunction | None = None,
    rows_per_example: int = 1,
    signal_bytes: bool = True,
    accumulates: bool = False,
) -> MemoryModel:
    """Measure the cost of plans on this model and batch.

    Records four small steps (two or three rows; one at half the length, one with higher ranks) and a forward pass. They
    determine the size of every tensor at any shape. Weights, gradients, ranks and random state are restored.

    Args:
        model: the PEFT model, on its device, in training mode.
        targets: its target modules.
        batch: input of the loss function, as large as the largest training batch.
        optimizer: sets the bytes of state; None means AdamW's two tensors.
        loss: loss of a batch; by default the loss returned by the model for these keyword arguments.
        rows_per_example: rows of the batch per example; see `reshaped`.
        signal_bytes: count the buffers in which `SignalMeter` averages gradients.
        accumulates: whether gradients accumulate over several micro-batches per step.

    Raises:
        UnsupportedError: the model returns no loss, or a target module is not part of its forward pass.
    """
    shape, outside = shape_of(batch), trained_outside(model, optimizer)
    tiles = LossTiles(shape)
    with all_training(model, targets, outside), expecting_one(model):
        recorder = _ScaledRecorder(Recorder(model, targets, loss, outside), targets, tiles)
        shapes = _small_shapes(shape, rows_per_example, cut=not keeps_state(model))
        batches = [reshaped(batch, other, rows_per_example) for other in shapes]
        small, cuts = batches[0], follows_rows(batch)
        series = _same_series(recorder, batches) if cuts else []
        series = _same_series(recorder, batches) if AGREE.get() and cuts and len(series) < len(batches) else series
        whole = len(series) == len(batches)
        growth = Growth.of(shape, [shape_of(each) for each in batches], series, tiles) if whole else None
        if not (growth or (series and shape_of(small) == shape)):  # operations depend on the data
            recorder.warm_up(batch)
            series, small = [recorder.step(batch)], batch
        base = series[0]
        growth = growth or Growth.unknown(shape, len(base.sizes))  # only this batch is known
        double = recorder.step(small, 2 * RANK, like=base)
        base = recorder.lifetimes(base, small)
    _check_all_ran(base, targets)
    ranks = RANK * np.append(recorded_ranks(targets), 1)[base.target_index]
    slope = np.where(base.target_index >= 0, (double.sizes - base.sizes) / ranks, 0.0)
    return MemoryModel(
        shape=shape,
        accumulates=accumulates,
        states=model_states(model, targets, optimizer, signal_bytes),
        recording=base,
        _base=base.sizes - ranks * slope,
        _slope=slope,
        _growth=growth,
        _block_bytes=CUDA_BLOCK if device_kind(next(model.parameters())) == "cuda" else 1,
    )


def _same_series(recorder: _ScaledRecorder, batches: Sequence[Batch]) -> list[Recording]:
    """Record these batches; those whose operations are not those of the first are left out."""
    found: dict[BatchShape, Recording] = {}
    try:
        recorder.warm_up(batches[1])
        for batch in batches:
            if (shape := shape_of(batch)) not in found:  # a batch that cannot be cut is as small as the first
                found[shape] = recorder.step(batch, like=next(iter(found.values()), None))
    except (RankPilotError, torch.OutOfMemoryError):
        raise
    except CUT_FAILS:  # the loss only accepts whole batches, such as packed rows with separate limits
        pass
    recordings = [found[shape] for batch in batches if (shape := shape_of(batch)) in found]
    return [each for each in recordings if _same_operations(each, recordings[0])]


def keeps_state(model: nn.Module) -> bool:
    """True if layers keep a state (Mamba, Qwen3-Next): they pad rows to whole chunks, or step through them."""
    return any(hasattr(module, "A_log") for module in model.modules())


def small_batch(model: nn.Module, batch: Batch, rows_per_example: int) -> Batch:
    """Return the first rows of a batch as steps of them are recorded; the whole batch if it cannot be cut."""
    if not follows_rows(batch):
        return batch
    small, *_ = _small_shapes(shape_of(batch), rows_per_example, cut=not keeps_state(model))
    return reshaped(batch, small, rows_per_example)


def _small_shapes(shape: BatchShape, rows_per_example: int, *, cut: bool) -> tuple[BatchShape, BatchShape, BatchShape]:
    """Return three shapes: small, since a fully adapted step may exceed the budget; shorter; and one row wider."""
    parts = 2 if cut and shape.length >= 4 else 1
    examples = shape.rows // rows_per_example
    few = parts if examples == 1 else 2  # some operators take shortcuts for one row
    length = shape.length if examples >= 4 else -(-shape.length // parts)
    shorter = -(-length // parts)
    sizes = (few, length), (few, shorter), (few + 1, shorter)
    small, short, wide = (BatchShape(count * rows_per_example, tokens) for count, tokens in sizes)
    return small, short, wide


@dataclass(frozen=True, eq=False)
class _ScaledRecorder:
    """Records small steps scaled down from the whole batch."""

    recorder: Recorder
    targets: Sequence[TargetModule]
    tiles: LossTiles

    def warm_up(self, batch: Batch) -> None:
        """Run a forward pass if layers permanently cast their biases in the first call, which is not part of a step.

        bitsandbytes layers do so, in four and in eight bits.
        """
        modules = self.recorder.model.modules()
        if any(
            getattr(m, "bias", None) is not None and get_bnb_param_type(getattr(m, "weight", None)) for m in modules
        ):
            prepare(self.targets, RANK)
            self.recorder.forward(batch)

    def step(self, batch: Batch, rank: int = RANK, *, like: Recording | None = None) -> Recording:
        """Record a step with all modules at this rank; see `Recorder.step`."""
        prepare(self.targets, rank)
        with scaled(self.tiles, shape_of(batch)):
            return self.recorder.step(batch, like=like)

    def lifetimes(self, recording: Recording, batch: Batch) -> Recording:
        """See `Recorder.lifetimes`."""
        prepare(self.targets, RANK)
        with scaled(self.tiles, shape_of(batch)):
            return self.recorder.lifetimes(recording, batch)


ALIGNED = 4
"""Factor on the rank of experts in recorded steps: grouped products need factors with rows in multiples of 16 bytes,
and pad others (`lora/routed_rows.py`).
"""


def recorded_ranks(targets: Sequence[TargetModule]) -> IntArray:
    """Return the rank multiplier of each module in recorded steps, int64 (modules,)."""
    return np.array([ALIGNED if target.experts > 1 else 1 for target in targets], dtype=np.int64)


def prepare(targets: Sequence[TargetModule], rank: int) -> None:
    """Set every module to this rank and reset the random generator, so steps draw the same numbers."""
    for target, times in zip(targets, recorded_ranks(targets), strict=True):
        for weight, zeros in zip((target.weight_a, target.weight_b), target.zeros(rank * int(times)), strict=True):
            write_in_place(weight, zeros)
    torch.manual_seed(0)


@contextmanager
def all_training(
    model: nn.Module, targets: Sequence[TargetModule], outside: Sequence[nn.Parameter] = ()
) -> Iterator[None]:
    """Make every adapter trainable inside the context; restore values, gradients and random state afterwards.

    Args:
        model: the PEFT model.
        targets: its target modules.
        outside: trained parameters outside the model; their gradients are restored too.
    """
    parameters = [parameter for target in targets for parameter in target.parameters.values()]
    before = [(p, p.detach(), p.requires_grad) for p in parameters]
    gradients = [(p, p.grad) for p in (*model.parameters(), *outside)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
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
    return one.forward_end == other.forward_end and np.array_equal(one.created, other.created)


def _check_all_ran(recording: Recording, targets: Sequence[TargetModule]) -> None:
    ran = np.unique(recording.target_index[recording.created <= recording.forward_end])
    absent = np.setdiff1d(np.arange(len(targets)), ran)
    if len(absent):
        raise UnsupportedError(
            _without_part([targets[i].name for i in absent], [targets[i].name for i in ran if i >= 0])
        )


def _without_part(absent: Sequence[str], ran: Sequence[str]) -> str:
    """Return an error text for target modules unused in the forward pass: their names, and how to exclude them."""
    # Find the branch of each without running target modules; at least its own name.
    branches = dict.fromkeys(
        next(branch for branch in branches_to(name) if not any(other.startswith(f"{branch}.") for other in ran))
        for name in absent
    )
    named, rest = list(branches)[:MOST_BRANCHES], len(branches) - MOST_BRANCHES
    if len(absent) == 1:
        text = f"{absent[0]!r} took no part in the forward pass. Remove it from `target_modules`"
    else:
        where = ", ".join(map(repr, named)) + (f" and {rest} more" if rest > 0 else "")
        text = (
            f"{len(absent)} of {len(absent) + len(ran)} target modules took no part in the forward pass, all "
            f"those of {where}. Remove them from `target_modules`"
        )
    if rest > 0:
        return f"{text}."
    pattern = "|".join(map(re.escape, named))
    return rf'{text}, or set exclude_modules=r"({pattern})(\..*)?" in the LoraConfig.'


LOOP_BYTES = 1024
"""Allowance for the few scalars a training loop adds to the graph, such as a loss divided by a token count."""


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """The cost of plans, and its limit.

    Attributes:
        cost: cost of a plan.
        limit: limit of the cost.
        memory: predicts other batch shapes; None under a budget of parameters.
        saved: memory of a plain LoRA step without exact savers, and with them.
        savers: names of the enabled savers.
        alone: the shape of one example, used to price plans for steps that run in parts; else None.
    """

    cost: Cost
    limit: Limit
    memory: MemoryModel | None
    saved: tuple[Saved, ...] = ()
    savers: tuple[str, ...] = ()
    alone: BatchShape | None = None


def measure_memory(step: TrainingStep, targets: Sequence[TargetModule], batch: Batch, *, signals: bool) -> MemoryModel:
    """Return the byte model of a training loop's step: `calibrate`, plus the loop's scalars and buckets.

    Takes batches and raises errors as `calibrate` does; with `signals`, plans pay for signal buffers.
    """
    memory = calibrate(
        step.model,
        targets,
        batch,
        step.optimizer,
        loss=step.loss,
        rows_per_example=step.rows_per_example,
        signal_bytes=signals,
        accumulates=step.accumulates,
    )
    return replace(memory, states=step_states(step, targets, signals=signals))


def step_states(step: TrainingStep, targets: Sequence[TargetModule], *, signals: bool) -> ModelStates:
    """Return the bytes a loop holds between steps, with its scalars, buckets and messages; see `measure_memory`."""
    states = model_states(step.model, targets, step.optimizer, signals)
    states = replace(states, others=states.others + LOOP_BYTES + step.message_bytes)
    return states.with_buckets(step.bucket_copies)


def plan_costs(
    budget: Budget,
    step: TrainingStep,
    targets: Sequence[TargetModule],
    batch: Batch,
    *,
    signals: bool,
    least: Callable[[ByteCost], float] | None = None,
    savers: ExactSavers | None = None,
    reference: IntArray,
    kept: IntArray | None = None,
    whole: bool = False,
    in_parts: TrainingStep | None = None,
) -> PlanCosts:
    """Return the cost of plans for this step on its largest batch, and the limit set by a budget.

    A share refers to the `reference` ranks without signal buffers and without `savers`, the enabled exact savers. With
    `least`, layers may be checkpointed, as all are in the configured step: `checkpointed_cost` sets the cost of plans,
    and a share refers to a step without checkpointing. If the reference does not fit, activations are checkpointed
    first; see `ExactSavers.within`. A budget of parameters needs no measurement. See `Budget.resolve` for `kept`,
    `checkpointed_cost` for `whole`, and `measure_memory` for the other arguments. With `in_parts`, the same step run in
    parts, plans are priced for one example of the batch's length on top of the gradients of others, if the byte model
    covers it.
    """
    if budget.kind == "parameters":
        return PlanCosts(*limited_cost(budget, targets, None, reference, kept), None)

    def measured() -> MemoryModel:
        return measure_memory(step, targets, batch, signals=False)

    priced = savers.price(measured, reference, each=False) if savers else None
    plain = priced.plain if priced else measured()
    cost, limit = limited_cost(
        beside_model(budget, step.model), targets, plain.with_checkpointed(()) if least else plain, reference, kept
    )
    alone = BatchShape(in_parts.rows_per_example, plain.shape.length) if in_parts else None
    alone = alone if alone and plain.predicts(alone) else None
    if priced and alone and not priced.memory.predicts(alone):
        alone = None
    if least and savers and priced:
        priced = savers.within(limit.value, priced, measured, reference, least, alone)
    memory = priced.memory if priced else plain
    if signals:
        memory = replace(memory, states=replace(memory.states, signals=signal_buffer_bytes(targets)))
    if alone and in_parts:
        states = memory.states.with_buckets(in_parts.bucket_copies - step.bucket_copies)
        memory = replace(memory, accumulates=True, states=states)
    if least:
        cost = checkpointed_cost(memory, reference, limit.value, alone, kept, least=least, whole=whole)
    elif signals or savers or alone:
        cost = memory.cost(alone)
    names = savers.names if savers else ()
    return PlanCosts(cost, limit, memory, priced.saved if priced else (), names, alone)


def limited_cost(
    budget: Budget,
    targets: Sequence[TargetModule],
    memory: MemoryModel | None,
    reference: IntArray,
    kept: IntArray | None = None,
) -> tuple[Cost, Limit]:
    """Return the cost a budget limits, and its limit.

    A "total" budget must already be reduced by `beside_model`. `memory` is the byte model without signal buffers; None
    only under a budget of parameters. See `Budget.resolve` for `reference` and `kept`.
    """
    cost: Cost = ParameterCost.of(targets) if budget.kind == "parameters" or memory is None else memory.cost()
    # "auto" reads the free memory here, once libraries have allocated their own.
    return cost, budget.resolve(cost, reference, targets[0].weight_a.device, kept)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes on the model's device not covered by plans.

    They include the frozen model; on CUDA also all usage outside torch's allocator, by contexts and other processes,
    and cuBLAS workspaces.
    """
    streaming, device = streaming_of(model), next(model.parameters()).device
    frozen = frozen_bytes(model) - (streaming.freed_bytes if streaming else 0)
    if device.type != "cuda":
        return frozen
    free, total = torch.cuda.mem_get_info(device)
    return frozen + total - free - torch.cuda.memory_reserved(device) + MOST_WORKSPACE_BYTES


def beside_model(budget: Budget, model: nn.Module) -> Budget:
    """Reduce a "total" budget by the plan-independent bytes on the device; other budgets are unchanged.

    These are the frozen model and, on CUDA, contexts and libraries; see `resident_bytes` and `Budget.beside`.

    Raises:
        BudgetError: they already exhaust the budget.
    """
    if budget.kind != "total":
        return budget
    return budget.beside(resident_bytes(model), cuda=next(model.parameters()).device.type == "cuda")
