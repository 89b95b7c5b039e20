"""A training step: the loss as a function of the batch, the optimizer, and checkpointed layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.errors import UnsupportedError, install, shown
from .step_config import OptimizerName, Quantization

LossFunction = Callable[[Any], torch.Tensor]
"""Runs the forward pass of a training step on a batch, and returns the loss with its graph."""


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A training step of a loop.

    Attributes:
        model: the PEFT model, on its device.
        loss: the loss of a batch.
        optimizer: sets the bytes of state; None means AdamW's two tensors.
        rows_per_example: rows of a batch per example; see `reshaped`.
        accumulates: whether gradients always exist, because they accumulate over several batches per step.
        bucket_copies: number of permanent extra copies of all gradients, for communication with other processes.
        message_bytes: bytes of the model's buffers in transit to other processes during a forward pass.
    """

    model: nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer | None
    rows_per_example: int = 1
    accumulates: bool = False
    bucket_copies: float = 0.0
    message_bytes: int = 0


def checked_loss(loss: LossFunction) -> LossFunction:
    """Wrap a loss to raise UnsupportedError unless it returns a one-element tensor."""

    def checked(batch: Any) -> torch.Tensor:
        value = loss(batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UnsupportedError(
                f"The loss function returned {got}. It must return the loss of the batch as a scalar tensor with "
                "its graph, such as `model(**batch).loss`."
            )
        return value

    return checked


def model_loss(model: nn.Module) -> LossFunction:
    """Return the loss function of a transformers model, for batches with labels.

    It raises UnsupportedError if the model returns no loss.
    """

    def loss(batch: Any) -> torch.Tensor:
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise UnsupportedError(
                f"{type(model).__name__} returned no loss, so no step can be measured. Add labels to its batches, "
                "or pass the function that computes your loss."
            )
        result: torch.Tensor = value
        return result

    return loss


CHECKPOINTING = {"use_reentrant": False}
"""Checkpointing options: the reentrant variant needs inputs with gradients, which a frozen base lacks."""


_OF_BITSANDBYTES: dict[str, str] = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def check_installed(optimizer: OptimizerName = "adamw", quantization: Quantization = "none") -> None:
    """Raise UnsupportedError if the library needed by an optimizer or a quantisation is missing."""
    if optimizer == "adamw4bit" and find_spec("torchao") is None:
        raise UnsupportedError("The optimizer adamw4bit requires torchao: pip install torchao.")
    needing = [f"optimizer {optimizer}"] if optimizer in _OF_BITSANDBYTES else []
    needing += [f"quantization {quantization}"] if quantization != "none" else []
    if needing and find_spec("bitsandbytes") is None:
        raise UnsupportedError(f"The {needing[0]} requires bitsandbytes: {install('quant')}.")


def new_optimizer(name: OptimizerName, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer over all trained parameters, with the Trainer's settings; see `check_installed`."""
    check_installed(name)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trains, lr=1e-4)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        factored: torch.optim.Optimizer = Adafactor(trains, lr=1e-4, scale_parameter=False, relative_step=False)
        return factored
    if name in _OF_BITSANDBYTES:
        kind = getattr(importlib.import_module("bitsandbytes.optim"), _OF_BITSANDBYTES[name])
        optimizer: torch.optim.Optimizer = kind(trains, lr=1e-4)
        return optimizer
    if name == "adamw4bit":
        four_bits: torch.optim.Optimizer = importlib.import_module("torchao.optim").AdamW4bit(trains, lr=1e-4)
        return four_bits
    if trains[0].is_meta:  # torch has no fused kernel for the meta device, unlike the emulated one
        hollow = torch.optim.AdamW(trains, lr=1e-4)
        hollow.defaults["fused"] = True
        return hollow
    return torch.optim.AdamW(trains, lr=1e-4, fused=True)


def has_checkpointing(base: Any) -> bool:
    """True if a transformers model class supports gradient checkpointing."""
    return bool(getattr(base, "supports_gradient_checkpointing", False))


def check_checkpointing(base: Any) -> None:
    """Raise UnsupportedError if a transformers model has no gradient checkpointing."""
    if not has_checkpointing(base):
        raise UnsupportedError(f"{type(base).__name__} does not support gradient checkpointing.")


def switch_checkpointing(base: Any, wanted: bool, *, reentrant: bool = False) -> None:
    """Turn a transformers model's gradient checkpointing on or off; raises UnsupportedError if unsupported.

    Reentrant checkpointing needs inputs with gradients, which a frozen base lacks, so it enables them. Where a program
    has replaced torch's function by one of the other kind (ms-swift), the layers get torch's own.
    """
    check_checkpointing(base)
    # Its name from transformers 5.20 on, and before.
    name = "activation_checkpointing" if hasattr(base, "activation_checkpointing_enable") else "gradient_checkpointing"
    if wanted:
        getattr(base, f"{name}_enable")(CHECKPOINTING | {"use_reentrant": reentrant})
        for module in base.modules():
            function = vars(module).get(CHECKPOINT)
            if function is not None and is_reentrant(function) != reentrant:
                setattr(module, CHECKPOINT, partial(_torchs_own(function.func), **function.keywords))
        for layer in inner_layers(base):  # recomputed with the enclosing layer
            layer.gradient_checkpointing = False
        release_inputs(base)
    else:
        getattr(base, f"{name}_disable")()


def inner_layers(model: nn.Module) -> set[GradientCheckpointingLayer]:
    """Return checkpointable layers nested in another one, as in Zamba 2."""
    layers = {module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    return {inner for layer in layers for inner in layers & set(layer.modules()) - {layer}}


def is_reentrant(function: Any) -> bool:
    """True if a module's checkpointing function is reentrant: torch's default; transformers binds options.

    Some programs replace torch's function by one that ignores its options (ms-swift). That one is tried out.
    """
    called, asked = getattr(function, "func", function), getattr(function, "keywords", {}).get("use_reentrant")
    if isinstance(called, FunctionType) and not _is_torchs(called):
        return _tried_reentrant(called, asked)
    return asked is None or bool(asked)


def _is_torchs(function: Any) -> bool:
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch.")


def _torchs_own(function: Any) -> Any:
    """Return torch's checkpointing function from within one that wraps it; raises UnsupportedError if it has none."""
    while not _is_torchs(function):
        if not hasattr(function, "__wrapped__"):
            raise UnsupportedError(
                f"Another library has replaced torch.utils.checkpoint.checkpoint by {shown(function)}, which is "
                "reentrant. Set gradient_checkpointing to False."
            )
        function = function.__wrapped__
    return function


@lru_cache(maxsize=16)
def _tried_reentrant(function: Callable[..., Any], asked: bool | None) -> bool:
    """Checkpoint one number: reentrant functions compute it without a graph. One that fails counts as reentrant."""
    with_graph: list[bool] = []

    def segment(number: torch.Tensor) -> torch.Tensor:
        with_graph.append(torch.is_grad_enabled())
        return number * 1

    with suppress(Exception), torch.enable_grad():
        function(segment, torch.ones(1, requires_grad=True), use_reentrant=asked)
    return with_graph != [True]


def release_inputs(model: nn.Module) -> None:
    """Stop the model's inputs from requiring gradients, unless reentrant checkpointing needs them.

    transformers enables them under either variant. Every layer below the lowest adapter would then save tensors for a
    backward pass that needlessly runs down to the embeddings. They stay where a hook of the user sees them.
    """
    functions = (vars(module).get(CHECKPOINT) for module in model.modules())
    if any(function is not None and is_reentrant(function) for function in functions):
        return
    for module in model.modules():
        hooks = module._forward_hooks
        others = [hook for hook in hooks.values() if not requires_grad_hook(hook)]
        if all(str(getattr(hook, "__module__", "")).partition(".")[0] in _LIBRARIES for hook in others):
            for key in [key for key, hook in hooks.items() if requires_grad_hook(hook)]:
                del hooks[key]


_LIBRARIES = ("accelerate", "peft", "rankpilot", "torch", "transformers", "trl")
"""Packages whose hooks need no gradients of a model's inputs."""


def requires_grad_hook(hook: object) -> bool:
    """True if a forward hook makes outputs require gradients, as installed by transformers and PEFT."""
    return "require_grad" in getattr(hook, "__name__", "")


CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute with a module's checkpointing function in transformers."""


@contextmanager
def segments_marked(modules: Sequence[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Replace transformers' checkpointing function inside the context.

    The replacement survives a step that turns checkpointing off and on, which reassigns the modules' functions.

    Args:
        modules: the modules with such a function.
        run: called with the function's reentrancy, the layer that owns it (None if it is another module's), and its
            call arguments. Some versions of transformers call it before the layer's hooks, others inside of them, so
            the module that runs does not tell the layer.
    """
    functions = [vars(module)[CHECKPOINT] for module in modules]
    kinds, marked = {type(module) for module in modules}, _Marked(modules, run)
    try:
        for kind in kinds:
            setattr(kind, CHECKPOINT, marked)
        yield
    finally:
        for kind in kinds:
            delattr(kind, CHECKPOINT)  # no transformers class defines its own
        for module, function in zip(modules, functions, strict=True):
            setattr(module, CHECKPOINT, function)


class _Marked:
    """The checkpointing function of all modules of a class, as an attribute that shadows those of instances."""

    def __init__(self, modules: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        self._modules, self._run = {id(module) for module in modules}, run

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None or CHECKPOINT not in vars(module):
            raise AttributeError(f"{kind.__name__} has no attribute {CHECKPOINT!r}")
        function = vars(module)[CHECKPOINT]
        if id(module) not in self._modules:
            return function
        layer = module if isinstance(module, GradientCheckpointingLayer) else None
        return partial(self._run, is_reentrant(function), layer)

    def __set__(self, module: nn.Module, function: Any) -> None:
        vars(module)[CHECKPOINT] = function

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[CHECKPOINT]
