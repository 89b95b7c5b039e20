"""Count the work of a training step, on any device including the meta device, and measure the rates of a device."""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
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

from ...lora.routed_rows import parts_of
from ...lora.targets import TargetModule
from ..batch_shape import Batch
from ..cost import ModuleSet
from ..model import RANK
from ..step_time import OPERATOR_SECONDS, Rates, StepWork
from ..streaming import PartSeconds, published_rates
from ..training_step import CHECKPOINT, LossFunction, segments_marked
from .calibration import all_training, prepare
from .live_storages import run_on_meta, tensors_in
from .recorder import flow_from


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device's rates with a matrix product in this precision and a copy; accurate enough for proportions."""
    size = 2048 if device.type == "cuda" else 512
    matrix, long = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size**2, device=device)
    product = _median_seconds(device, lambda: matrix @ matrix)
    copy = _median_seconds(device, partial(torch.empty_like(long).copy_, long))
    return Rates(2 * size**3 / product, 2 * long.nbytes / copy, OPERATOR_SECONDS)


def _median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    work()
    return max(float(np.median([_seconds(device, work) for _ in range(5)])), 1e-9)


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
