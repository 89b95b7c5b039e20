"""Measure the time of a training step: count its work, and time a few steps on the user's device.

Work is counted in a single run of the step, on any device including the meta device.
"""

import gc
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers.modeling_layers import GradientCheckpointingLayer

from ...common.arrays import BoolArray, FloatArray, IntArray
from ...lora.resize import write_in_place
from ...lora.routed_rows import parts_of
from ...lora.spec import REFERENCE_RANK, highest_ranks
from ...lora.targets import TargetModule
from ..batch_shape import Batch
from ..cost import ModuleSet
from ..model import RANK
from ..step_time import OPERATOR_SECONDS, Rates, StepTime, StepWork, fitted
from ..streaming import PartSeconds, published_rates
from ..training_step import CHECKPOINT, LossFunction, TrainingStep, segments_marked
from .calibration import all_training, prepare
from .live_storages import run_on_meta, tensors_in
from .recorder import flow_from

ROUNDS, SHORT_ROUNDS = 3, 5
"""Timed repetitions per plan after one warm-up round, and repetitions if all steps are short; the median counts."""

SHARE_ROUNDS = 6
"""Alternations of a plan and its reference; the median of their ratios counts."""

SHORT_SECONDS = 0.3
"""Shorter steps run once before each timed one: the first step after a change of ranks is slightly slower."""

HIGH_RANK, HIGHEST_RANK = 32, 64
"""Ranks of two plans used to measure the growth with rank; it may be steeper between them than up to the first."""

REFERENCE_WEIGHT = 3
"""Weight in the fit of plain LoRA, the reference for shares in budgets."""

LEAST_GROWTH = 0.75
"""Lower bound on the growth factor: at rank 64, thin products take at least this much per rank relative to large ones
(three models; benchmarks/EXPERIMENTS.md).
"""

TimedPlan = tuple[IntArray, tuple[str, ...]]
"""Ranks (modules,), and the names of the checkpointed layers."""

Take = Callable[[Collection[str]], object]
"""Checkpoints exactly the layers with these names."""


def measure_step_time(
    step: TrainingStep,
    targets: Sequence[TargetModule],
    batch: Batch,
    take: Take | None = None,
    *,
    rounds: int | None = None,
) -> StepTime:
    """Measure the step time of any plan from a handful of plans that isolate its parts; see `timed_plans`.

    Plans alternate. Counted work (`StepWork`) distributes each part over modules and layers. CUDA seconds are device
    time; CPU seconds are CPU time divided by the number of threads, which is less sensitive to other load. Clipping and
    fused AdamW are included. Weights, gradients, ranks and random state are restored.

    Args:
        step: the step of the loop.
        targets: the target modules of its model.
        batch: a batch on the device, of the shape to time.
        take: sets the checkpointed layers, if they can be set individually; all are checkpointed before and after.
        rounds: repetitions per plan, at least 1; by default `ROUNDS` or `SHORT_ROUNDS`.

    Raises:
        UnsupportedError: the model returns no loss.
    """
    device = targets[0].weight_a.device
    work = count_work(step.model, targets, step.loss, batch)
    layers = work.running_again if take else ()
    plans = timed_plans(targets, layers, () if take else work.running_again)

    def round_of(warm: BoolArray) -> FloatArray:
        """Return the seconds of each plan, (plans,)."""
        seconds = np.zeros(len(plans))
        for number, (ranks, again) in enumerate(plans):
            if take:
                take(again)
            seconds[number] = _timed_step(step, targets, ranks, batch, warm=bool(warm[number]))
        return seconds

    with all_training(step.model, targets), _no_collection():
        short = round_of(np.zeros(len(plans), dtype=np.bool_)) < SHORT_SECONDS
        rounds = rounds or (SHORT_ROUNDS if short.all() else ROUNDS)
        seconds = usual_seconds(np.stack([round_of(short) for _ in range(rounds)]))
    if take:
        take(layers)
    often = [0] * (REFERENCE_WEIGHT - 1) + list(range(len(plans)))
    nominal = work.time(measured_rates(device))
    return fitted(nominal, [plans[number] for number in often], seconds[often], least_growth=LEAST_GROWTH)


def measured_share(
    step: TrainingStep,
    targets: Sequence[TargetModule],
    batch: Batch,
    plan: TimedPlan,
    reference: TimedPlan,
    take: Take | None = None,
) -> float:
    """Return the ratio of a plan's step time to that of a reference, measured alternately.

    Args:
        step: see `measure_step_time`, as for the next two.
        targets: the target modules.
        batch: a batch on the device.
        plan: the plan to time.
        reference: the plan to compare with.
        take: sets the checkpointed layers, left at those of the reference; None to leave them unchanged.
    """

    def seconds(timed: TimedPlan) -> float:
        ranks, layers = timed
        if take:
            take(layers)
        return _timed_step(step, targets, ranks, batch, warm=True)

    with all_training(step.model, targets), _no_collection():
        return float(np.median([seconds(plan) / seconds(reference) for _ in range(SHARE_ROUNDS)]))


def usual_seconds(seconds: FloatArray) -> FloatArray:
    """Return the typical time of each plan, (plans,), corrected for the pace of each round.

    A slow round slows all plans alike. Its pace is the median of their times relative to each plan's own median.

    Args:
        seconds: (rounds, plans), > 0.
    """
    pace = np.median(seconds / np.median(seconds, axis=0), axis=1, keepdims=True)
    return np.asarray(np.median(seconds / pace, axis=0), dtype=np.float64)


def timed_plans(
    targets: Sequence[TargetModule], layers: tuple[str, ...], always: tuple[str, ...] = ()
) -> list[TimedPlan]:
    """Return the plans to time in order to isolate the parts of a step.

    They are: all modules at rank 8 (the reference for shares), and at rank 32; only the uppermost module, nearly a bare
    forward pass; only the lowest layer, nearly a full backward pass with few adapters; the upper half, and the upper
    half at rank 64, typical of a time limit; and all modules at rank 8 with all layers checkpointed.

    Args:
        targets: the target modules.
        layers: layers that can be checkpointed individually.
        always: layers checkpointed under every plan.
    """
    blocks = np.array([target.block for target in targets])
    most = highest_ranks(targets)
    modules = np.arange(len(targets))
    usual = np.minimum(REFERENCE_RANK, most)
    upper = blocks >= min((blocks.max() + 1) / 2, blocks.max())  # a single layer is its own upper half
    among = (modules == modules[blocks == blocks.max()][-1], blocks == 0, upper)
    plans: list[TimedPlan] = [(usual, always), (np.minimum(HIGH_RANK, most), always)]
    plans += [(np.where(chosen, usual, 0), always) for chosen in among]
    plans += [(np.where(upper, np.minimum(HIGHEST_RANK, most), 0), always)]
    return plans + ([(usual, layers)] if layers else [])


def measured_rates(device: torch.device) -> Rates:
    """Measure a device's rates with a matrix product and a copy; accurate enough for proportions."""
    matrix, long = torch.ones(512, 512, device=device), torch.ones(2**20, device=device)
    product = _median_seconds(device, lambda: matrix @ matrix)
    copy = _median_seconds(device, partial(torch.empty_like(long).copy_, long))
    return Rates(2 * 512**3 / product, 2 * long.nbytes / copy, OPERATOR_SECONDS)


def _median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    work()
    return max(float(np.median([_seconds(device, work) for _ in range(5)])), 1e-9)


def _timed_step(
    step: TrainingStep, targets: Sequence[TargetModule], ranks: IntArray, batch: Batch, *, warm: bool
) -> float:
    """Return the seconds of one step under a plan; with `warm`, those of a second step."""
    for target, rank in zip(targets, ranks.tolist(), strict=True):
        for weight, zeros in zip((target.weight_a, target.weight_b), target.zeros(rank), strict=True):
            write_in_place(weight, zeros)
        for parameter in target.parameters.values():
            parameter.requires_grad_(rank > 0)
    trains = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=0.0, weight_decay=0.0, fused=True)
    for parameter in trains:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates its state
    optimizer.zero_grad(set_to_none=True)

    def whole() -> None:
        step.loss(batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if warm:
        whole()
    return _seconds(trains[0].device, whole)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):  # events are recorded on the stream of the current device
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    start = time.process_time()
    work()
    return (time.process_time() - start) / torch.get_num_threads()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable the garbage collector during a timed step."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def count_work(model: nn.Module, targets: Sequence[TargetModule], loss: LossFunction, batch: Batch) -> StepWork:
    """Count the computation of a step per operator.

    Runs one step with all modules at a small rank; weights, gradients, ranks and random state are restored.
    Checkpointed layers count once.

    Args:
        model: the PEFT model, in training mode.
        targets: its target modules.
        loss: the loss of a batch.
        batch: a batch of the shape to count.
    """
    with all_training(model, targets):
        prepare(targets, RANK)
        return _Count(model, targets).run(loss, batch)


@dataclass(frozen=True)
class _Place:
    """The place of an operator: its module, the target module if it is in an adapter, and the layer."""

    name: str = ""
    target: int = -1
    layer: int = -1


class _Count:
    """The state of one count while the model runs."""

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        named = dict(model.named_modules())
        self._names = {id(module): name for name, module in named.items()}
        self._checkpointing = [module for module in named.values() if CHECKPOINT in vars(module)]
        layers = [name for name, module in named.items() if isinstance(module, GradientCheckpointingLayer)]
        self._layers = {name: index for index, name in enumerate(layers)}
        self._again: list[str] = []
        self._targets = {id(p): index for index, target in enumerate(targets) for p in parts_of(target.layer)}
        self._bases = {id(target.layer.base_layer) for target in targets}
        self._of_parameter = {id(p): 1 << i for i, target in enumerate(targets) for p in target.parameters.values()}
        self._every_plan = 1 << len(targets)
        self._widths = np.array([target.d_in + target.d_out for target in targets], dtype=np.int64)
        self._place = _Place()
        self._outer: list[_Place] = []
        self._places, self._sequences = [self._place], [0]
        self._flow: dict[int, ModuleSet] | None = None
        self._now = self._place, self._every_plan  # in the backward pass
        self._rows: list[tuple[float, float, bool, int, int, ModuleSet]] = []

    def run(self, loss: LossFunction, batch: Batch) -> StepWork:
        """Run the step, and return its computation."""
        with _Operators(self._note), self._watching(), segments_marked(self._checkpointing, self._segment):
            value = loss(batch)
            flow = flow_from(value, lambda leaf: self._of_parameter.get(id(leaf), self._every_plan))
            self._flow = {node._sequence_nr(): modules for node, modules in flow.items()}
            del flow  # it would keep the graph alive
            with torch.autocast("cpu" if value.is_meta else value.device.type, enabled=False):
                value.backward()  # type: ignore[no-untyped-call]
        flops, moved, backward, module, layer, needed = zip(*self._rows, strict=True)
        return StepWork(
            flops=np.array(flops, dtype=np.float64),
            moved=np.array(moved, dtype=np.float64),
            backward=np.array(backward, dtype=np.bool_),
            module=np.array(module, dtype=np.int64),
            layer=np.array(layer, dtype=np.int64),
            needed=needed,
            rank=RANK,
            widths=self._widths,
            layers=tuple(self._layers),
            running_again=tuple(dict.fromkeys(self._again)),
        )

    def _note(self, flops: float, moved: float) -> None:
        if self._flow is None:
            self._rows.append((flops, moved, False, self._place.target, self._place.layer, 0))
            return
        node = torch._C._current_autograd_node()
        sequence = -1 if node is None else node._sequence_nr()
        if sequence in self._flow:  # otherwise a sum of gradients, which belongs to the node before it
            place = self._places[max(bisect_right(self._sequences, sequence) - 1, 0)]
            self._now = place, self._flow[sequence]
        place, needed = self._now
        self._rows.append((flops, moved, True, place.target, place.layer, needed))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Track the running module."""
        entering = register_module_forward_pre_hook(self._enter)
        leaving = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        place, name = self._place, self._names.get(id(module))
        self._outer.append(place)
        if name is not None:
            place = replace(place, name=name, layer=self._layers.get(name, place.layer))
        if id(module) in self._targets:
            place = replace(place, target=self._targets[id(module)])
        elif id(module) in self._bases:
            place = replace(place, target=-1)
        self._go(place)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._go(self._outer.pop())

    def _go(self, place: _Place) -> None:
        self._place = place
        self._places.append(place)
        self._sequences.append(int(torch._C._autograd._get_sequence_nr()))

    def _segment(self, reentrant: bool, layer: nn.Module | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a checkpointed segment without checkpointing, marked as a checkpointable layer."""
        before = self._place
        name = self._names.get(id(layer), before.name)
        self._again.append(name)
        self._go(replace(before, layer=self._layers.setdefault(name, len(self._layers))))
        output = function(*arguments)
        self._go(before)
        return output


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that reports the floating-point operations and memory traffic of every operator."""

    def __init__(self, note: Callable[[float, float], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and report its work."""
        options = options or {}
        result, _ = run_on_meta(operator, arguments, options)
        if not _is_view(operator):
            moved = sum(_bytes(tensor) for values in (arguments, options, result) for tensor in tensors_in(values))
            self._note(_flops(operator, arguments, options, result), float(moved))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so torch calls `__torch_dispatch__` without a wrapper, as in `LiveStorages`."""
        return False


@cache
def _is_view(operator: Any) -> bool:
    return bool(getattr(operator, "is_view", False)) or operator.name() in ("aten::_unsafe_view", "aten::detach")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> float:
    packet = getattr(operator, "overloadpacket", None)
    count, name = flop_registry.get(packet), getattr(packet, "__name__", "")
    if count is not None:
        return float(count(*arguments, **options, out_val=result)) * _attended(operator, arguments, options)
    if name == "_grouped_mm":  # each row with the weights of one expert
        return float(2 * arguments[0].numel() * arguments[1].shape[-1])
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        flops = sdpa_flop_count(*(value.shape for value in arguments[:3]))  # type: ignore[no-untyped-call]
        return float(flops) * _attended(operator, arguments, options)
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        flops = sdpa_backward_flop_count(*(value.shape for value in arguments[:4]))  # type: ignore[no-untyped-call]
        return float(flops) * _attended(operator, arguments, options)
    return 0.0


def _attended(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
    """Return the share of token pairs that attention computes: kernels skip those hidden by a causal mask."""
    names = [argument.name for argument in operator._schema.arguments]
    if "is_causal" not in names:
        return 1.0
    place = names.index("is_causal")
    return 0.5 if (arguments[place] if place < len(arguments) else options.get("is_causal")) else 1.0


def product_sizes(model: nn.Module) -> tuple[int, int]:
    """Return the number of weights in a model's products, and the width of its hidden states."""
    matrices = (getattr(m, "weight", None) for m in model.modules() if not isinstance(m, nn.Embedding))
    weights = sum(w.numel() for w in matrices if isinstance(w, torch.Tensor) and w.dim() == 2)
    return weights, int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the published rates of a device for a model of this precision."""
    half = torch.is_autocast_enabled(device.type) or dtype == torch.bfloat16
    name = "bf16" if half else "fp16" if dtype == torch.float16 else "fp32"
    return published_rates(torch.cuda.get_device_name(device) if device.type == "cuda" else "", name)


def part_seconds_of(model: nn.Module, operators: int, layers: int) -> PartSeconds:
    """Estimate the seconds of parts of a model's step on its device.

    Args:
        model: the PEFT model.
        operators: number of operators in a step.
        layers: number of checkpointable layers.
    """
    weight = next(model.parameters())
    rates, overlaps = rates_of(weight.device, weight.dtype), weight.device.type == "cuda"
    return PartSeconds.of_sizes(product_sizes(model), operators, layers, rates, overlaps=overlaps)
