"""From a training step to the limit of its plans: byte model, cost of a plan, budget in the same unit.

The byte model comes of a few small steps that are recorded on the user's model and batch.
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

from ..common.arrays import IntArray
from ..common.text import branches_to, format_bytes
from ..errors import BudgetError, RankPilotError, UnsupportedError
from ..lora.adapters import signal_buffer_bytes
from ..lora.resize import write_in_place
from ..lora.spec import highest_ranks
from ..lora.targets import TargetModule
from .batch_shape import Batch, reshaped, shape_of
from .budget import AUTO_SHARE, Budget, Limit
from .cards import HOPPER_WORKSPACE_BYTES
from .cost import ByteCost, ParameterCost, UntimedCost
from .growth import Growth
from .later_logits import expecting_one
from .live_storages import device_kind
from .loss_tiles import scaled
from .model import RANK, MemoryModel, ModelStates, checkpointed_cost
from .model_states import frozen_bytes, model_states, trained_outside
from .recorder import AGREE, Recorder
from .recording import BatchShape, Recording
from .saver_prices import Saved
from .savers import ExactSavers
from .tile_size import LossTiles
from .training_step import LossFunction, TrainingStep

CUT_FAILS = (RuntimeError, ValueError, LookupError, TypeError, AssertionError)
"""What a loss function may raise for a batch that was cut."""

MOST_BRANCHES = 3
"""Branches of a model without part in its forward pass that an error names, at most."""

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
    """Measure what plans cost on this model and batch.

    Four small steps are recorded (two or three rows; one step of half the length, one of higher ranks), and a forward
    pass. The size of every tensor follows for any shape. Weights, gradients, ranks and random state are restored.

    Args:
        model: the PEFT model, on its device, in the mode in which it trains.
        targets: its target modules.
        batch: what the loss function takes, as large as the largest batch that training will see.
        optimizer: decides the bytes of state; AdamW's two tensors without one.
        loss: the loss of a batch; by default the one that the model returns for these keyword arguments.
        rows_per_example: rows of the batch that one example takes; see `reshaped`.
        signal_bytes: count the buffers in which `SignalMeter` averages gradients.
        accumulates: gradients are kept over several micro-batches of each step.

    Raises:
        UnsupportedError: the model returns no loss, or a target module takes no part in its forward pass.
    """
    shape = shape_of(batch)
    tiles = LossTiles(shape)
    outside = trained_outside(model, optimizer)
    with all_training(model, targets, outside), expecting_one(model):
        recorder = _ScaledRecorder(Recorder(model, targets, loss, outside), targets, tiles)
        shapes = _small_shapes(shape, rows_per_example, cut=not keeps_state(model))
        batches = [reshaped(batch, other, rows_per_example) for other in shapes]
        small, series = batches[0], _same_series(recorder, batches)
        series = _same_series(recorder, batches) if AGREE.get() and not series else series
        growth = series and Growth.of(shape, [shape_of(each) for each in batches], series, tiles)
        if series and growth:
            base = series[0]
        else:  # operations depend on the data, so only the batch itself tells
            recorder.warm_up(batch)
            base, small = recorder.step(batch), batch
            growth = Growth.unknown(shape, len(base.sizes))
        double = recorder.step(small, 2 * RANK, sizes_alone=True)
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


def _same_series(recorder: _ScaledRecorder, batches: Sequence[Batch]) -> list[Recording] | None:
    """The recordings of these batches; None if they are not of the same operations."""
    found: dict[BatchShape, Recording] = {}
    try:
        recorder.warm_up(batches[1])
        for batch in batches:
            if (shape := shape_of(batch)) not in found:  # a batch that cannot be cut is as small as the first
                found[shape] = recorder.step(batch, sizes_alone=bool(found))
    except (RankPilotError, torch.OutOfMemoryError):
        raise
    except CUT_FAILS:  # the loss takes whole batches alone, such as packed rows with their limits beside them
        return None
    recordings = [found[shape_of(batch)] for batch in batches]
    return recordings if all(_same_operations(recordings[0], other) for other in recordings[1:]) else None


def keeps_state(model: nn.Module) -> bool:
    """Whether layers keep a state (Mamba, Qwen3-Next): these pad rows to whole pieces, or take a step for each."""
    return any(hasattr(module, "A_log") for module in model.modules())


def _small_shapes(shape: BatchShape, rows_per_example: int, *, cut: bool) -> tuple[BatchShape, BatchShape, BatchShape]:
    """Three shapes: small, since a step with every module adapted may exceed the budget; cut; and with one row more."""
    parts = 2 if cut and shape.length >= 4 else 1
    examples = shape.rows // rows_per_example
    few = parts if examples == 1 else 2  # with one row some operators take short cuts
    length = shape.length if examples >= 4 else -(-shape.length // parts)
    shorter = -(-length // parts)
    sizes = (few, length), (few, shorter), (few + 1, shorter)
    small, short, wide = (BatchShape(count * rows_per_example, tokens) for count, tokens in sizes)
    return small, short, wide


@dataclass(frozen=True, eq=False)
class _ScaledRecorder:
    """Records small steps that stand for those of the whole batch."""

    recorder: Recorder
    targets: Sequence[TargetModule]
    tiles: LossTiles

    def warm_up(self, batch: Batch) -> None:
        """Run a forward pass where layers cast their biases for good in their first call: that is no part of a step.

        Layers of bitsandbytes do so, in four and in eight bits.
        """
        modules = self.recorder.model.modules()
        if any(
            getattr(m, "bias", None) is not None and get_bnb_param_type(getattr(m, "weight", None)) for m in modules
        ):
            prepare(self.targets, RANK)
            self.recorder.forward(batch)

    def step(self, batch: Batch, rank: int = RANK, *, sizes_alone: bool = False) -> Recording:
        """A step in which all modules have this rank; see `Recorder.step`."""
        prepare(self.targets, rank)
        with scaled(self.tiles, shape_of(batch)):
            return self.recorder.step(batch, sizes_alone=sizes_alone)

    def lifetimes(self, recording: Recording, batch: Batch) -> Recording:
        """See `Recorder.lifetimes`."""
        prepare(self.targets, RANK)
        with scaled(self.tiles, shape_of(batch)):
            return self.recorder.lifetimes(recording, batch)


ALIGNED = 4
"""How many times the rank of other modules experts have while steps are recorded: products of groups take factors
whose rows are multiples of 16 bytes, and others are padded (`lora/routed_rows.py`)."""


def recorded_ranks(targets: Sequence[TargetModule]) -> IntArray:
    """By how much the rank of each module is multiplied while steps are recorded, int64 (modules,)."""
    return np.array([ALIGNED if target.experts > 1 else 1 for target in targets], dtype=np.int64)


def prepare(targets: Sequence[TargetModule], rank: int) -> None:
    """Give every module this rank, and reset the random generator, so that steps draw the same numbers."""
    for target, times in zip(targets, recorded_ranks(targets), strict=True):
        for weight, zeros in zip((target.weight_a, target.weight_b), target.zeros(rank * int(times)), strict=True):
            write_in_place(weight, zeros)
    torch.manual_seed(0)


@contextmanager
def all_training(
    model: nn.Module, targets: Sequence[TargetModule], outside: Sequence[nn.Parameter] = ()
) -> Iterator[None]:
    """Let every adapter train inside the context; restore values, gradients and random state afterwards.

    Args:
        model: the PEFT model.
        targets: its target modules.
        outside: parameters that train beside the model's; their gradients are restored as well.
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
    """The error for target modules that took no part in the forward pass: what they are, and how to leave them out."""
    # Each is in a branch of the model in which no target module ran; its own name at the least.
    branches = dict.fromkeys(
        next(branch for branch in branches_to(name) if not any(other.startswith(f"{branch}.") for other in ran))
        for name in absent
    )
    named, rest = list(branches)[:MOST_BRANCHES], len(branches) - MOST_BRANCHES
    if len(absent) == 1:
        text = f"{absent[0]!r} took no part in the forward pass. Leave it out of `target_modules`"
    else:
        where = ", ".join(map(repr, named)) + (f" and {rest} more" if rest > 0 else "")
        text = (
            f"{len(absent)} of {len(absent) + len(ran)} target modules took no part in the forward pass, all those of "
            f"{where}. Leave them out of `target_modules`"
        )
    if rest > 0:
        return f"{text}."
    pattern = "|".join(map(re.escape, named))
    return rf"""{text}, or give LoraConfig exclude_modules=r"({pattern})(\..*)?"."""


LOOP_BYTES = 1024
"""Room for the few scalars that a training loop adds to the graph, such as a loss divided by a token count."""


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """What plans cost, and their limit.

    Attributes:
        cost: of a plan.
        limit: of that.
        memory: predicts other batch shapes; None under a budget of parameters.
        saved: what a step of plain LoRA takes without exact savers, and with them.
        savers: names of those that are on.
        alone: the shape of one example, with which plans are priced where steps run in parts; else None.
    """

    cost: UntimedCost
    limit: Limit
    memory: MemoryModel | None
    saved: tuple[Saved, ...] = ()
    savers: tuple[str, ...] = ()
    alone: BatchShape | None = None


def measure_memory(step: TrainingStep, targets: Sequence[TargetModule], batch: Batch, *, signals: bool) -> MemoryModel:
    """The byte model of a training loop's step: `calibrate`, with the scalars and the buckets that the loop adds.

    Takes batches as `calibrate` does and raises its errors; with `signals`, plans pay for signal buffers.
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
    memory = replace(memory, states=step_states(step, targets, signals=signals))
    return memory.offloaded() if step.offloads else memory


def step_states(step: TrainingStep, targets: Sequence[TargetModule], *, signals: bool) -> ModelStates:
    """What a training loop holds between steps, with its scalars, buckets and messages; see `measure_memory`."""
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
    kept: IntArray | None = None,
    whole: bool = False,
    in_parts: TrainingStep | None = None,
) -> PlanCosts:
    """What plans cost in this step, on its largest batch, and the limit that a budget sets them.

    A share is a share of what *plain* LoRA takes, rank 8 on all modules, without signal buffers and without `savers`,
    the exact savers that are on. With `least`, layers may be checkpointed, as all are in the step as
    it is set: plans cost what `checkpointed_cost` says, and a share is one of what plain LoRA takes where none does.
    Where plain LoRA does not fit, activations are checkpointed first; see `ExactSavers.within`.
    Under a budget of parameters nothing is measured. See `Budget.resolve` for `kept`, `checkpointed_cost` for `whole`,
    and `measure_memory` for the other arguments. With `in_parts`, the step as it is taken in parts, plans are priced
    with one example of the batch's length, beside the gradients of others, if the byte model can tell of it.
    """
    if budget.kind == "parameters":
        return PlanCosts(*limited_cost(budget, targets, None, kept), None)

    def measured() -> MemoryModel:
        return measure_memory(step, targets, batch, signals=False)

    priced = savers.price(measured, targets, each=False) if savers else None
    plain = priced.plain if priced else measured()
    cost, limit = limited_cost(
        beside_model(budget, step.model), targets, plain.with_checkpointed(()) if least else plain, kept
    )
    alone = BatchShape(in_parts.rows_per_example, plain.shape.length) if in_parts else None
    alone = alone if alone and plain.predicts(alone) else None
    if priced and alone and not priced.memory.predicts(alone):
        alone = None
    if least and savers and priced:
        priced = savers.within(limit.value, priced, measured, targets, least, alone)
    memory = priced.memory if priced else plain
    if signals:
        memory = replace(memory, states=replace(memory.states, signals=signal_buffer_bytes(targets)))
    if alone and in_parts:
        states = memory.states.with_buckets(in_parts.bucket_copies - step.bucket_copies)
        memory = replace(memory, accumulates=True, states=states)
    if least:
        highest = highest_ranks(targets)
        cost = checkpointed_cost(memory, highest, limit.value, alone, kept=kept, least=least, whole=whole)
    elif signals or savers or alone:
        cost = memory.cost(alone)
    names = savers.names if savers else ()
    return PlanCosts(cost, limit, memory, priced.saved if priced else (), names, alone)


def limited_cost(
    budget: Budget, targets: Sequence[TargetModule], memory: MemoryModel | None, kept: IntArray | None = None
) -> tuple[UntimedCost, Limit]:
    """The cost that a budget limits, and its limit.

    A budget of "total" bytes comes as what is left of it (`beside_model`). `memory` is the byte model without signal
    buffers; None only under a budget of parameters. See `Budget.resolve` for `kept`.
    """
    cost: UntimedCost = ParameterCost.of(targets) if budget.kind == "parameters" or memory is None else memory.cost()
    # "auto" reads the free memory here: by now, libraries have taken the memory that they need to compute.
    return cost, budget.resolve(cost, highest_ranks(targets), targets[0].weight_a.device, kept)


MOST_WORKSPACE_BYTES = 2 * HOPPER_WORKSPACE_BYTES
"""What cuBLAS takes through torch's allocator at most: a workspace for each of two threads (on Hopper; less before)."""


def resident_bytes(model: nn.Module) -> int:
    """Bytes on the model's device beside those that plans are priced with.

    They are those of the frozen model; on CUDA also all that is used outside torch's allocator, by contexts and other
    processes, and workspaces of cuBLAS.
    """
    frozen, device = frozen_bytes(model), next(model.parameters()).device
    if device.type != "cuda":
        return frozen
    free, total = torch.cuda.mem_get_info(device)
    return frozen + total - free - torch.cuda.memory_reserved(device) + MOST_WORKSPACE_BYTES


def beside_model(budget: Budget, model: nn.Module) -> Budget:
    """What is left of a budget of "total" bytes beside what lies on the device whatever the plan; any other as it is.

    That is the frozen model and, on CUDA, what contexts and libraries take (`resident_bytes`), and what torch's
    allocator reserves beside tensors (`AUTO_SHARE`).

    Raises:
        BudgetError: that alone takes all of it.
    """
    if budget.kind != "total":
        return budget
    resident = resident_bytes(model)
    if resident >= budget.value:
        raise BudgetError(
            f"The budget of {format_bytes(budget.value)} in all is less than the frozen model and the device's context "
            f"take, {format_bytes(resident, up=True)}. Give more, or load the model in a smaller precision (bf16, or "
            f"quantised). For a step alone, beside the frozen model, write '{format_bytes(budget.value)} step'."
        )
    share = AUTO_SHARE if next(model.parameters()).device.type == "cuda" else 1.0
    return Budget("bytes", share * (budget.value - resident))
