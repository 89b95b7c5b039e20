"""Offload of checkpointed layers' inputs to main memory until recomputation: the same bits, fewer bytes.

A checkpointed layer saves only its input, so the inputs of all layers are what remains to be saved. An input is copied
to main memory in parallel to the computation, leaves the device after `INPUTS_ON_DEVICE` further layers have begun, and
is copied back the same number of layers before it is needed. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model import INPUTS_ON_DEVICE
from ..training_step import CHECKPOINT
from .exact import is_compiled


class Input:
    """Input of a layer, in main memory, on the device, or both.

    Args:
        tensor: the input, on the device.
        copies: copies between the two.
        number: its index among all inputs.
    """

    def __init__(self, tensor: torch.Tensor, copies: Copies, number: int) -> None:
        self.number, self._copies = number, copies
        self._here: torch.Tensor | None = tensor
        self._there, self._done = copies.to_main(tensor)

    def leave(self) -> None:
        """Free it on the device, once its copy is done."""
        self._copies.wait(self._done)
        self._here = None

    def come(self) -> None:
        """Start copying it back, if it is not on the device."""
        if self._here is None:
            self._here, self._done = self._copies.to_device(self._there)

    def take(self) -> torch.Tensor:
        """Return the input, and give up ownership of it."""
        self.come()
        self._copies.wait(self._done)
        assert self._here is not None, "it has come"
        tensor, self._here = self._here, None
        return tensor


class Copies:
    """Copies between a CUDA device and pinned main memory, in a separate stream; on the CPU, plain ones."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_main(self, tensor: torch.Tensor) -> tuple[Any, Any]:
        """Return a copy in main memory, and its completion event."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return (there, tensor.device), self.into(there, tensor)

    def to_device(self, there: Any) -> tuple[torch.Tensor, Any]:
        """Return a copy on the device, and its completion event."""
        tensor, device = there
        here = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return here, self.into(here, tensor)

    def wait(self, done: Any) -> None:
        """Make later work on the device wait for a copy."""
        if done is not None:
            torch.cuda.current_stream().wait_event(done)

    def into(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy a tensor into another one, after all earlier work; return the completion event."""
        device = source.device if source.is_cuda else target.device
        if device.type != "cuda":
            target.copy_(source)
            return None
        if (stream := self._streams.get(device)) is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()


class OffloadedInputs:
    """Keeps inputs of checkpointed layers in main memory.

    Args:
        copies: copies between device and main memory.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self._copies, self._count = copies or Copies(), 0
        self._near = deque[Input]()  # on the device since the forward pass
        self._known: WeakValueDictionary[int, Input] = WeakValueDictionary()  # graphs hold them

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return the graph's replacement of a layer's input; masks, positions and parameters are left alone."""
        if not tensor.is_floating_point() or tensor.dim() < 3 or isinstance(tensor, nn.Parameter):
            return tensor
        made = Input(tensor.detach(), self._copies, self._count)
        self._known[self._count] = made
        self._count += 1
        self._near.append(made)
        if len(self._near) > INPUTS_ON_DEVICE:
            self._near.popleft().leave()
        return made

    def unpack(self, packed: Any) -> torch.Tensor:
        """Return the input, and start copying those of the layers below."""
        if not isinstance(packed, Input):
            tensor: torch.Tensor = packed
            return tensor
        for number in range(packed.number, packed.number - INPUTS_ON_DEVICE, -1):
            if below := self._known.get(number):
                below.come()
        if packed in self._near:
            self._near.remove(packed)
        return packed.take()


class _Offloading:
    """A checkpointing function with inputs in main memory; `func` and `keywords` are those of transformers' partial."""

    def __init__(self, function: Any, inputs: OffloadedInputs) -> None:
        self._function, self._inputs = function, inputs
        self.func: Any = getattr(function, "func", function)
        self.keywords: dict[str, Any] = getattr(function, "keywords", {})

    def __call__(self, run: Any, *arguments: Any, **options: Any) -> Any:
        """Run a layer."""
        with saved_tensors_hooks(self._inputs.pack, self._inputs.unpack):
            return self._function(run, *arguments, **options)


def can_offload(model: nn.Module) -> bool:
    """True if the inputs of a model's layers can be offloaded: it runs on CUDA, and is not compiled."""
    return next(model.parameters()).is_cuda and not is_compiled(model)


def offload_inputs(model: nn.Module, inputs: OffloadedInputs | None = None) -> Callable[[], None]:
    """Keep inputs of a model's checkpointed layers in main memory from now on; return a function that undoes it.

    Args:
        model: a model with gradient checkpointing switched on, of all layers or some.
        inputs: keeps them.
    """
    inputs = inputs or OffloadedInputs()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [(layer, vars(layer)[CHECKPOINT]) for layer in layers if CHECKPOINT in vars(layer)]
    for layer, function in before:
        setattr(layer, CHECKPOINT, _Offloading(function, inputs))

    def undo() -> None:
        for layer, function in before:
            if isinstance(vars(layer).get(CHECKPOINT), _Offloading):
                setattr(layer, CHECKPOINT, function)

    return undo
