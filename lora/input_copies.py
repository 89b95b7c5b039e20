"""One copy of an input in another precision for all adapters that read it.

PEFT casts the input of each adapted module to the precision of its adapter, and under autocast each product with a
factor casts once more. The query, key and value of a layer read one tensor, and hold three copies of it for the
backward pass. Here the first of them makes the copy and the others take it. Each still has a node of its own in
autograd's graph, so gradients are rounded and added as before: they are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..common.devices import autocast_dtype

CAST = "_cast_input_dtype"
"""The method by which PEFT's layers cast their inputs."""

_COPY = "_rankpilot_copy"
"""The attribute of an input that holds its copy. It lives as long as the input's Python object does."""


def share_input_copies(model: nn.Module) -> Callable[[], None]:
    """Let the plain LoRA layers of a model share copies of their inputs; returns what undoes it.

    Left out are layers that drop inputs at random, whose copies differ, and variants such as DoRA.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        setattr(layer, CAST, cast_once)

    def undo() -> None:
        for layer in layers:
            vars(layer).pop(CAST, None)

    return undo


def _is_plain(layer: LoraLayer) -> bool:
    products = all(type(factor) is nn.Linear for factor in layer.lora_A.values())
    drops = any(getattr(each, "p", 0) > 0 for each in layer.lora_dropout.values())
    asked = getattr(layer, "cast_input_dtype_enabled", True) and CAST not in vars(layer)
    return products and bool(layer.lora_A) and not drops and not layer.lora_variant and asked


def cast_once(inputs: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """An input in the precision in which the product with an adapter's factor is computed.

    Args:
        inputs: of shape (..., d_in).
        dtype: of the factor. Under autocast, products are in autocast's precision instead.
    """
    if inputs is None:
        return None
    wanted = autocast_dtype(inputs) or dtype
    if inputs.dtype == wanted:
        return inputs
    if torch.compiler.is_compiling() or inputs.is_inference():  # the compiler finds equal casts by itself
        return inputs.to(wanted)
    version, copy = getattr(inputs, _COPY, (None, None))
    if copy is None or copy.dtype != wanted or version != inputs._version:
        copy = inputs.detach().to(wanted)
        setattr(inputs, _COPY, (inputs._version, copy))
    if not (inputs.requires_grad and torch.is_grad_enabled()):
        return copy
    result: torch.Tensor = _Cast.apply(inputs, copy)  # type: ignore[no-untyped-call]
    return result


class _Cast(torch.autograd.Function):
    """A cast whose result is there already."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.dtype = inputs.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype), None
