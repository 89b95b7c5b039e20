"""Streamed base: frozen weights stay in main memory, and those of a layer are on the device only while it runs.

Most bytes of a LoRA fine-tune are weights that never change. Each layer needs its own once in the forward and once in
the backward pass. Before a layer runs, its weights are copied to the device while the layer before it still computes;
afterwards their device storage is emptied. Parameters stay the same objects and nothing is computed differently, so
losses and gradients are equal bit for bit. Between their turns parameters refer to the copy in main memory, so
whoever reads them finds them whole at any time, and whoever changes them between passes changes what is streamed.

Related: FSDP frees parameters in the same way (arXiv:2304.11277, section 4.2). Not yet measured on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from ...common.errors import ConfigError, UnsupportedError
from ...common.text import format_bytes
from ...lora.targets import scale_tensors
from ..streaming import LEAST_BYTES, ON_DEVICE, spread
from ..training_step import inner_layers
from .exact import is_compiled

PLAIN = ("Tensor", "Parameter", "Buffer", "Params4bit")
"""Types of tensors that can be streamed; others keep data of their own."""

DEVICES: frozenset[str] = frozenset({"cuda"})
"""Types of devices with memory of their own; on others streaming frees nothing."""

_DDP = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model in which DistributedDataParallel looks for names to leave alone."""


class Copies:
    """Copies between a CUDA device and pinned main memory, in a separate stream; on the CPU, plain ones."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

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

    def wait(self, done: Any) -> None:
        """Make later work on the device wait for a copy."""
        if done is not None:
            torch.cuda.current_stream().wait_event(done)


class StreamedWeight:
    """A frozen tensor in main memory, and at times on the device.

    Args:
        tensor: a parameter or the scales of a quantised one; it stays the same object.
        device: the device where it is used.
        copies: copies between the two.

    Attributes:
        tensor: as above.
        bytes: its size.
        found_here: True if it was on the device before.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device, copies: Copies) -> None:
        found = tensor.data  # unlike `detach`, with a version counter of its own: copying is no change to autograd
        self.tensor, self.bytes, self._copies = tensor, found.numel() * found.itemsize, copies
        self.found_here: bool = found.device == device
        self._there = torch.empty(found.shape, dtype=found.dtype, pin_memory=device.type == "cuda")
        self._there.copy_(found)
        if self.found_here and not found.untyped_storage().resizable():  # a mapped file
            tensor.data = found = found.clone()
        self._here = found if self.found_here else torch.empty(0, dtype=found.dtype, device=device)
        if not self.found_here:
            self._here.untyped_storage().resize_(self.bytes)
            self._here.set_(self._here.untyped_storage(), 0, found.shape, self._there.stride())
        self._done: Any = None

    def come(self) -> None:
        """Start copying it to the device."""
        self._adopt()
        self._here.untyped_storage().resize_(self.bytes)
        self._done = self._copies.into(self._here, self._there)

    def arrive(self) -> None:
        """Refer to the device's copy, for work that follows the copying."""
        self._copies.wait(self._done)
        self.tensor.data = self._here

    def leave(self) -> None:
        """Refer to the copy in main memory, then empty the device's; a copy still under way is waited for."""
        self._copies.wait(self._done)
        self._adopt()
        self.tensor.data = self._there
        self._here.untyped_storage().resize_(0)

    def _adopt(self) -> None:
        """Stream data that it was given from outside, as by merging."""
        if self.tensor.data_ptr() not in (self._there.data_ptr(), self._here.data_ptr()):
            self._there.copy_(self.tensor.data)


class StreamedLayer:
    """A layer with streamed weights.

    Args:
        module: the layer.
        weights: its weights.

    Attributes:
        bytes: size of its weights.
        state: "away", in main memory; "coming"; or "here", on the device.
        changes: undoes the changes to the module when closed.
    """

    def __init__(self, module: nn.Module, weights: Sequence[StreamedWeight]) -> None:
        self.module, self.weights, self.changes = module, tuple(weights), ExitStack()
        self.bytes = sum(weight.bytes for weight in weights)
        self.state: Literal["away", "coming", "here"] = "here"

    # Wherever these are interrupted, tensors refer to whole data, and `come` copies again what was begun.

    def come(self) -> None:
        """Start copying its weights to the device."""
        if self.state == "away":
            for weight in self.weights:
                weight.come()
            self.state = "coming"

    def arrive(self) -> None:
        """Have its weights on the device for the work that follows."""
        self.come()
        if self.state == "coming":
            for weight in self.weights:
                weight.arrive()
            self.state = "here"

    def leave(self) -> None:
        """Empty its weights on the device."""
        if self.state != "away":
            self.state = "away"
            for weight in self.weights:
                weight.leave()


class StreamedBase:
    """Streams the frozen weights of a model's layers from now on.

    Args:
        model: the model, on the device or in main memory.
        layers: layers to stream, from the model's input to its output; see `streamable_layers`.
        device: where the model runs.

    Attributes:
        layers: the streamed layers. At most two of them are on the device at once.
        copied_bytes: bytes copied to the device so far.

    Raises:
        UnsupportedError: the model streams already, or main memory is short.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
        if streaming_of(model):
            raise UnsupportedError("This model streams its base already: call `put_back()` of that streaming first.")
        copies, tensors = Copies(), _streamed_tensors(model, layers)
        self._model, self.layers = model, list[StreamedLayer]()
        self.copied_bytes = 0
        self._apart = device.type in DEVICES
        self._rests_later = False  # after the backward pass that runs
        inside = set(layers)
        around = [module for module in model.modules() if inside & set(module.modules()) and module not in inside]
        check_main_memory(model, layers)
        self._changes = ExitStack()
        try:
            for module in around:
                self._changes.callback(module.register_forward_hook(self._after_pass).remove)
            self._changes.enter_context(_left_alone_by_ddp(model, {id(tensor) for own in tensors for tensor in own}))
            for module, own in zip(layers, tensors, strict=True):
                layer = StreamedLayer(module, [StreamedWeight(tensor, device, copies) for tensor in own])
                self.layers.append(layer)  # first, so that an error can put it back
                layer.leave()
            for layer in self.layers:
                self._follow(layer)
        except BaseException:
            self.put_back()
            raise
        _STREAMING[model] = ref(self)  # its hooks keep it as long as the model

    @property
    def main_memory_bytes(self) -> int:
        """Bytes of the weights in main memory."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def away_bytes(self) -> int:
        """Bytes of streamed weights not on the device while two layers are."""
        return self.main_memory_bytes - sum(sorted(layer.bytes for layer in self.layers)[-ON_DEVICE:])

    @property
    def freed_bytes(self) -> int:
        """Bytes that streaming frees on the device: on a CPU below 0, since both copies of two layers are there."""
        return self.away_bytes - (0 if self._apart else self.main_memory_bytes)

    @property
    def device_bytes(self) -> int:
        """Bytes of streamed weights on the device now."""
        return sum(layer.bytes for layer in self.layers if layer.state != "away")

    def keep(self, streamed: int) -> None:
        """Have all layers on the device from now on, but for this number of them, evenly spread."""
        chosen = [self.layers[index] for index in spread(streamed, len(self.layers))]
        with _disable_current_modes():
            for layer in self.layers:
                if layer not in chosen:
                    layer.arrive()
                    layer.changes.close()
        self.layers = chosen

    def put_back(self) -> None:
        """Stop streaming: weights are again where they were found. A second call has no effect."""
        _STREAMING.pop(self._model, None)
        self._changes.close()
        with _disable_current_modes():
            for layer in self.layers:
                layer.arrive() if all(weight.found_here for weight in layer.weights) else layer.leave()
                layer.changes.close()
        self.layers = []

    def _follow(self, layer: StreamedLayer) -> None:
        """Call `visit` whenever a pass reaches a layer."""

        def before(*_: Any) -> None:
            # Checkpointed layers run forward again inside the backward pass.
            if torch._C._current_graph_task_id() == -1:
                self._rests_later = False
                self.visit(layer, 1)
            else:
                backward()

        def backward(*_: Any) -> None:
            if not self._rests_later:
                self._rests_later = True
                torch.autograd.Variable._execution_engine.queue_callback(self.rest)
            self.visit(layer, -1)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            # The backward pass reaches a layer through its outputs: the engine runs later operations first.
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(backward)  # type: ignore[no-untyped-call]

        layer.changes.callback(layer.module.register_forward_pre_hook(before, prepend=True).remove)
        layer.changes.callback(layer.module.register_forward_hook(after).remove)
        streamed = {id(weight.tensor) for weight in layer.weights}
        for module in layer.module.modules():
            if any(id(parameter) in streamed for parameter in module._parameters.values()):
                layer.changes.enter_context(_leaving_alone(module, streamed))

    def _after_pass(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            self.rest()

    def rest(self) -> None:
        """Empty all streamed weights on the device after a pass: whoever changes one changes the only copy."""
        self._rests_later = False
        with _disable_current_modes():
            for layer in self.layers:
                layer.leave()

    def visit(self, reached: StreamedLayer, way: Literal[-1, 1]) -> None:
        """Have a layer on the device, and start copying the next one in the pass's direction."""
        if reached not in self.layers:  # it stays on the device
            return
        number = self.layers.index(reached)
        near = [index for index in (number, number + way) if 0 <= index < len(self.layers)]
        with _disable_current_modes(), torch.no_grad():
            for index, layer in enumerate(self.layers):
                if index not in near:
                    layer.leave()
            for index in near:
                if self.layers[index].state == "away":
                    self.copied_bytes += self.layers[index].bytes
                self.layers[index].arrive() if index == number else self.layers[index].come()


_STREAMING: WeakKeyDictionary[nn.Module, ref[StreamedBase]] = WeakKeyDictionary()


def streaming_of(model: nn.Module) -> StreamedBase | None:
    """Return the streaming of a model; None if its whole base is on the device."""
    return found() if (found := _STREAMING.get(model)) else None


@contextmanager
def _left_alone_by_ddp(model: nn.Module, streamed: set[int]) -> Iterator[None]:
    """Have a DistributedDataParallel that is made meanwhile neither reject parameters in main memory nor send them."""
    before = vars(model).get(_DDP)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in streamed]
    vars(model)[_DDP] = [*(before or ()), *names]
    yield
    if before is None:
        del vars(model)[_DDP]
    else:
        vars(model)[_DDP] = before


@contextmanager
def _leaving_alone(module: nn.Module, streamed: set[int]) -> Iterator[None]:
    """Have `_apply` of a module, as `to` and `cuda` call it, leave its streamed parameters alone."""
    original: Callable[..., nn.Module] = module._apply

    def apply(function: Any, *arguments: Any, **options: Any) -> nn.Module:
        every = dict(module._parameters)
        held = {name: own for name, own in every.items() if own is not None and id(own) in streamed}
        for name, own in held.items():
            probe = torch.empty(0, dtype=own.dtype, device=own.device)
            if function(probe).dtype != own.dtype:
                raise ConfigError(f"{name} is streamed, so its dtype {own.dtype} cannot change: convert before.")
        for name in held:
            del module._parameters[name]
        try:
            return original(function, *arguments, **options)
        finally:
            after = module._parameters | held
            module._parameters.clear()
            module._parameters.update({name: after[name] for name in every})

    before = vars(module).get("_apply")
    vars(module)["_apply"] = apply
    yield
    if before is None:
        del module._apply
    else:
        vars(module)["_apply"] = before


def streamable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated layers of a transformers model that can be streamed, by name, from input to output.

    Raises:
        UnsupportedError: there is none, or the model's weights are managed otherwise.
    """
    if reason := unstreamable(model):
        raise UnsupportedError(f"The base cannot be streamed: {reason}.")
    inner = inner_layers(model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    return {name: layer for name, layer in found.items() if layer not in inner}


def unstreamable(model: nn.Module) -> str:
    """Return why a model cannot be streamed, for people; empty if it can."""
    if is_compiled(model):
        return "a compiled model reads weights in its own order"
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        return f"{type(model).__name__} has no layers that transformers can checkpoint"
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            return "ZeRO-3 already moves its weights"
        if not parameter.requires_grad and (kind := type(parameter).__name__) not in PLAIN:
            return "its weights are sharded" if kind == "DTensor" else f"{name} is a {kind}"
        if not parameter.requires_grad and type(parameter.data).__name__ not in PLAIN:
            return f"{name} holds a {type(parameter.data).__name__}"
    return ""


def _shared(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Return the storages used by more than one layer, or by a layer and the rest of the model."""
    inside = [{_storage(tensor) for tensor in _tensors(layer)} for layer in layers]
    counts = Counter(chain.from_iterable(inside))
    counts.update(_storage(tensor) for tensor in _tensors_outside(model, layers))
    return {storage for storage, count in counts.items() if count > 1}


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    yield from chain.from_iterable(scale_tensors(each) for each in module.modules())


def _tensors_outside(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)


def _streamed_tensors(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[torch.Tensor]]:
    """Return the tensors of each layer to stream: frozen, large, and alone in their storage."""
    shared = _shared(model, layers)
    return [_large_tensors(layer, shared) for layer in layers]


def _large_tensors(layer: nn.Module, shared: set[int]) -> list[torch.Tensor]:
    scales = chain.from_iterable(scale_tensors(module) for module in layer.modules())
    found: dict[int, torch.Tensor] = {}
    for tensor in chain((p for p in layer.parameters() if not p.requires_grad), scales):
        size, storage = tensor.numel() * tensor.itemsize, tensor.untyped_storage()
        whole = storage.nbytes() == size and tensor.is_contiguous()
        if size >= LEAST_BYTES and whole and _storage(tensor) not in shared:
            found.setdefault(_storage(tensor), tensor)
    return list(found.values())


def stream_base(model: nn.Module, device: str | torch.device | None = None) -> StreamedBase:
    """Stream the frozen weights of all layers of a model that is too large for the device.

    Everything else is moved to the device: embeddings, head, norms and adapters. The model's own `to` leaves streamed
    weights in main memory, so a Trainer can be made with it. Under `rankpilot.attach` as many layers stay on the device
    as the budget allows.

    Args:
        model: a PEFT model of transformers in main memory, as `from_pretrained` loads it without a device_map.
        device: where it trains; by default the first GPU.

    Returns:
        The streaming; `put_back()` ends it.

    Raises:
        ConfigError: there is no GPU, and no device was given.
        UnsupportedError: the model cannot be streamed, or main memory is short.
    """
    if device is None and not torch.cuda.is_available():
        raise ConfigError('There is no GPU to stream weights to. To try it without one, give device="cpu".')
    place = torch.device(device or f"cuda:{torch.cuda.current_device()}")
    streamed = StreamedBase(model, [*streamable_layers(model).values()], place)
    if not streamed.main_memory_bytes:
        streamed.put_back()
        raise UnsupportedError("No layer has frozen weights to stream: add adapters first (peft.get_peft_model).")
    with suppress(AttributeError):
        del model.hf_device_map  # of one place, which no longer holds
    model.to(place)
    known = {id(weight.tensor) for layer in streamed.layers for weight in layer.weights}
    for scale in chain.from_iterable(scale_tensors(module) for module in model.modules()):
        if id(scale) not in known:  # those of streamed weights, which `to` has left alone
            scale.data = scale.data.to(place)
    return streamed


def check_main_memory(model: nn.Module, layers: Sequence[nn.Module], processes: int = 1) -> None:
    """Raise UnsupportedError unless main memory has room for a copy of the layers' weights in each process.

    Args:
        model: the model.
        layers: the layers to stream.
        processes: number of processes that begin together on this machine.
    """
    import psutil

    free = psutil.virtual_memory().available
    size = sum(tensor.nbytes for tensor in chain.from_iterable(_streamed_tensors(model, layers)))
    if size * processes > free:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise UnsupportedError(
            f"Streaming keeps {format_bytes(size)} of weights in main memory{each}, and {format_bytes(free)} are "
            "available. Free main memory, stream fewer layers, or load the base in fewer bits."
        )
