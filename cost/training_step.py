"""A training step: the loss as a function of the batch, the optimizer, and checkpointed layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedError
from .step_config import OptimizerName, Quantization

LossFunction = Callable[[Any], torch.Tensor]
"""Runs the forward pass of a training step on a batch, and returns the loss with its graph."""


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A training step that a loop takes.

    Attributes:
        model: the PEFT model, on its device.
        loss: the loss of a batch.
        optimizer: decides the bytes of state; AdamW's two tensors count without one.
        rows_per_example: rows of a batch that one example takes; see `reshaped`.
        accumulates: whether gradients are there all the time, because they are kept over several batches of each step.
        bucket_copies: how often the loop holds all gradients besides, all the time, to send them to other processes.
        message_bytes: bytes of the model's buffers on their way to other processes while a forward pass runs.
        offloads: whether inputs of checkpointed layers lie in main memory until they run again.
    """

    model: nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer | None
    rows_per_example: int = 1
    accumulates: bool = False
    bucket_copies: float = 0.0
    message_bytes: int = 0
    offloads: bool = False


def checked_loss(loss: LossFunction) -> LossFunction:
    """A loss that raises UnsupportedError where the function returns something else than a tensor of one number."""

    def checked(batch: Any) -> torch.Tensor:
        value = loss(batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UnsupportedError(
                f"The loss function returned {got}. It has to return the loss of the batch as a tensor of one number, "
                "with its graph, such as `model(**batch).loss`."
            )
        return value

    return checked


def model_loss(model: nn.Module) -> LossFunction:
    """The loss that a transformers model returns for a batch that holds labels.

    The function raises UnsupportedError if the model returns none.
    """

    def loss(batch: Any) -> torch.Tensor:
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise UnsupportedError(
                f"{type(model).__name__} returned no loss, so no step can be measured. Give its batches labels, or "
                "pass the function that computes your loss."
            )
        result: torch.Tensor = value
        return result

    return loss


CHECKPOINTING = {"use_reentrant": False}
"""How segments run again: reentrant checkpointing would need inputs with gradients, which a frozen base has not."""


_OF_BITSANDBYTES: dict[str, str] = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def check_installed(optimizer: OptimizerName = "adamw", quantization: Quantization = "none") -> None:
    """Raise UnsupportedError if the library that an optimizer or a quantisation needs is missing."""
    if optimizer == "adamw4bit" and find_spec("torchao") is None:
        raise UnsupportedError("The optimizer adamw4bit needs torchao: pip install torchao.")
    needing = [f"optimizer {optimizer}"] if optimizer in _OF_BITSANDBYTES else []
    needing += [f"quantization {quantization}"] if quantization != "none" else []
    if needing and find_spec("bitsandbytes") is None:
        raise UnsupportedError(f"The {needing[0]} needs bitsandbytes: pip install 'rankpilot[quant]'.")


def new_optimizer(name: OptimizerName, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of that name with the Trainer's settings, over all parameters that train; see `check_installed`."""
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
    if trains[0].is_meta:  # torch knows no fused kernel for the meta device, which stands for one that has it
        hollow = torch.optim.AdamW(trains, lr=1e-4)
        hollow.defaults["fused"] = True
        return hollow
    return torch.optim.AdamW(trains, lr=1e-4, fused=True)


def has_checkpointing(base: Any) -> bool:
    """Whether the class of a transformers model has gradient checkpointing."""
    return bool(getattr(base, "supports_gradient_checkpointing", False))


def check_checkpointing(base: Any) -> None:
    """Raise UnsupportedError if a transformers model has no gradient checkpointing."""
    if not has_checkpointing(base):
        raise UnsupportedError(f"{type(base).__name__} does not support gradient checkpointing.")


def switch_checkpointing(base: Any, wanted: bool, *, reentrant: bool = False) -> None:
    """Switch gradient checkpointing of a transformers model on or off; raise UnsupportedError if it has none.

    Reentrant checkpointing needs inputs with gradients, which a frozen base does not have: it is asked for them.
    """
    check_checkpointing(base)
    # Its name from transformers 5.20 on, and before.
    name = "activation_checkpointing" if hasattr(base, "activation_checkpointing_enable") else "gradient_checkpointing"
    if wanted:
        getattr(base, f"{name}_enable")(CHECKPOINTING | {"use_reentrant": reentrant})
        for layer in inner_layers(base):  # it runs again with the layer around it
            layer.gradient_checkpointing = False
        release_inputs(base)
    else:
        getattr(base, f"{name}_disable")()


def inner_layers(model: nn.Module) -> set[GradientCheckpointingLayer]:
    """Layers that can be checkpointed and lie inside of another one, as in Zamba 2."""
    layers = {module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    return {inner for layer in layers for inner in layers & set(layer.modules()) - {layer}}


def is_reentrant(function: Any) -> bool:
    """Whether a module's checkpointing function is reentrant: torch's is by default, and transformers binds options."""
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def release_inputs(model: nn.Module) -> None:
    """Let the model's inputs require no gradients any more, unless its checkpointing is reentrant and needs them.

    transformers makes them require gradients under either checkpointing. Then every layer below the lowest adapter
    holds tensors for the backward pass, which runs down to the embeddings for nothing.
    """
    functions = (vars(module).get(CHECKPOINT) for module in model.modules())
    if any(function is not None and is_reentrant(function) for function in functions):
        return
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if requires_grad_hook(hook):
                del module._forward_hooks[key]


def requires_grad_hook(hook: object) -> bool:
    """Whether a forward hook makes a module's output require gradients, as transformers and PEFT install them."""
    return "require_grad" in getattr(hook, "__name__", "")


CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps a module's checkpointing function."""


@contextmanager
def segments_marked(modules: Sequence[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Replace transformers' checkpointing function by another one inside.

    It stays replaced where a step switches checkpointing off and on again, which gives every module another function.

    Args:
        modules: those that have such a function.
        run: called with whether the function is reentrant, and then with what the function is called with.
    """
    functions = [vars(module)[CHECKPOINT] for module in modules]
    kinds, marked = {type(module) for module in modules}, _Marked(modules, run)
    try:
        for kind in kinds:
            setattr(kind, CHECKPOINT, marked)
        yield
    finally:
        for kind in kinds:
            delattr(kind, CHECKPOINT)  # no class of transformers has one of its own
        for module, function in zip(modules, functions, strict=True):
            setattr(module, CHECKPOINT, function)


class _Marked:
    """The checkpointing function of all modules of a class, as an attribute that hides those of the modules."""

    def __init__(self, modules: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        self._modules, self._run = {id(module) for module in modules}, run

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None or CHECKPOINT not in vars(module):
            raise AttributeError(f"{kind.__name__} has no attribute {CHECKPOINT!r}")
        function = vars(module)[CHECKPOINT]
        return partial(self._run, is_reentrant(function)) if id(module) in self._modules else function

    def __set__(self, module: nn.Module, function: Any) -> None:
        vars(module)[CHECKPOINT] = function

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[CHECKPOINT]
