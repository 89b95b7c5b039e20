"""Counts the work of a training step by running it once, on any device, the meta device included."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers.modeling_layers import GradientCheckpointingLayer

from ..lora.targets import TargetModule
from .autograd_flow import ModuleSet, flow_from
from .calibration import all_training, prepare
from .live_storages import tensors_in
from .marked_segments import CHECKPOINT, segments_marked
from .model import RANK
from .recording import Batch
from .step_work import StepWork
from .training_step import LossFunction


def count_work(model: nn.Module, targets: Sequence[TargetModule], loss: LossFunction, batch: Batch) -> StepWork:
    """Count what a step computes, operator by operator.

    One step runs in which every module has a small rank; afterwards weights, gradients, ranks and random state are as
    they were. Layers that run again in the backward pass are counted once.

    Args:
        model: the PEFT model, in the mode in which it trains.
        targets: its target modules.
        loss: the loss of a batch.
        batch: of the shape that is asked about.
    """
    with all_training(model, targets):
        prepare(targets, RANK)
        return _Count(model, targets).run(loss, batch)


@dataclass(frozen=True)
class _Place:
    """Where an operator belongs: the target module whose adapter it is part of, and the layer that can run again."""

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
        self._targets = {id(target.layer): index for index, target in enumerate(targets)}
        self._bases = {id(target.layer.base_layer) for target in targets}
        self._of_parameter = {id(p): 1 << i for i, target in enumerate(targets) for p in target.parameters.values()}
        self._every_plan = 1 << len(targets)
        self._widths = np.array([target.d_in + target.d_out for target in targets], dtype=np.int64)
        self._place, self._callers = _Place(), [""]
        self._outer: list[_Place] = []
        self._places, self._sequences = [self._place], [0]
        self._flow: dict[int, ModuleSet] | None = None
        self._now = self._place, self._every_plan  # in the backward pass
        self._rows: list[tuple[float, float, bool, int, int, ModuleSet]] = []

    def run(self, loss: LossFunction, batch: Batch) -> StepWork:
        """Run the step, and return what it computes."""
        with _Operators(self._note), self._watching(), segments_marked(self._checkpointing, self._segment):
            value = loss(batch)
            flow = flow_from(value, lambda leaf: self._of_parameter.get(id(leaf), self._every_plan))
            self._flow = {node._sequence_nr(): modules for node, modules in flow.items()}
            del flow  # it would keep the graph alive
            with torch.autocast("cpu" if value.is_meta else value.device.type, enabled=False):
                value.backward()  # type: ignore[no-untyped-call]
        flops, moved, backward, module, layer, needed = zip(*self._rows, strict=True)
        return StepWork(
            np.array(flops, dtype=np.float64),
            np.array(moved, dtype=np.float64),
            np.array(backward, dtype=np.bool_),
            np.array(module, dtype=np.int64),
            np.array(layer, dtype=np.int64),
            needed,
            RANK,
            self._widths,
            tuple(self._layers),
            tuple(dict.fromkeys(self._again)),
        )

    def _note(self, flops: float, moved: float) -> None:
        if self._flow is None:
            self._rows.append((flops, moved, False, self._place.target, self._place.layer, 0))
            return
        node = torch._C._current_autograd_node()
        sequence = -1 if node is None else node._sequence_nr()
        if sequence in self._flow:  # else a sum of gradients, which belongs to the node before it
            place = self._places[max(bisect_right(self._sequences, sequence) - 1, 0)]
            self._now = place, self._flow[sequence]
        place, needed = self._now
        self._rows.append((flops, moved, True, place.target, place.layer, needed))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Follow which module runs."""
        entering = register_module_forward_pre_hook(self._enter)
        leaving = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self._outer.append(self._place)
        name = self._names.get(id(module), self._callers[-1])
        self._callers.append(name)
        place = self._place
        if name in self._layers and id(module) in self._names:
            place = replace(place, layer=self._layers[name])
        if id(module) in self._targets:
            place = replace(place, target=self._targets[id(module)])
        elif id(module) in self._bases:
            place = replace(place, target=-1)
        self._go(place)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._callers.pop()
        self._go(self._outer.pop())

    def _go(self, place: _Place) -> None:
        self._place = place
        self._places.append(place)
        self._sequences.append(int(torch._C._autograd._get_sequence_nr()))

    def _segment(self, reentrant: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a checkpointed segment without checkpointing, as a layer that can run again."""
        name, before = self._callers[-1], self._place
        self._again.append(name)
        self._go(replace(before, layer=self._layers.setdefault(name, len(self._layers))))
        output = function(*arguments)
        self._go(before)
        return output


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that reports the floating-point operations and the moved bytes of every operator."""

    def __init__(self, note: Callable[[float, float], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and report its work."""
        options = options or {}
        result = operator(*arguments, **options)
        if not _is_view(operator):
            moved = sum(_bytes(tensor) for values in (arguments, options, result) for tensor in tensors_in(values))
            self._note(_flops(operator, arguments, options, result), float(moved))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See `LiveStorages`."""
        return False


@cache
def _is_view(operator: Any) -> bool:
    return bool(getattr(operator, "is_view", False)) or operator.name() in ("aten::_unsafe_view", "aten::detach")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> float:
    packet = getattr(operator, "overloadpacket", None)
    count = flop_registry.get(packet)
    if count is not None:
        return float(count(*arguments, **options, out_val=result))
    name = getattr(packet, "__name__", "")
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return float(sdpa_flop_count(*(value.shape for value in arguments[:3])))  # type: ignore[no-untyped-call]
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        shapes = (value.shape for value in arguments[:4])
        return float(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    return 0.0
