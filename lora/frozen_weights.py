"""Frozen weights below the adapters: their values and norms, and a guard against repacking.

The frozen model may be quantised (bitsandbytes, torchao, optimum-quanto). Its parameters then hold codes or packed
bytes, which must be dequantised before use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn

from ..errors import UnsupportedError


def guard_base(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU; call before the first evaluation. Idempotent.

    On CPUs with AVX512-BF16, the first forward pass in evaluation mode repacks each `Linear4bit` for fast inference
    (bitsandbytes 0.50, `Linear4bit.forward`). A repacked layer has no backward pass: adapters below it get no gradient,
    without an error. Any `state_dict()` unpacks it, but with block scales that are rounded to bfloat16 and, without
    double quantisation, transposed: other weights. The guard makes evaluation on such a CPU slower, and equal to what
    training computes. Other layers do not change.

    Raises:
        UnsupportedError: a layer has been repacked already, so its weights are no longer those that were loaded.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        # Repacking sets this attribute, and unpacking leaves it (as False).
        if hasattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu"):
            raise UnsupportedError(
                f"The 4-bit weights of {name!r} were repacked for inference by an evaluation on this CPU, and can no "
                "longer be trained through. Load the model again and call "
                "`rankpilot.lora.frozen_weights.guard_base(model)` before any evaluation."
            )
        if module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False


def scale_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside the weight of a quantised layer, outside of parameters and buffers."""
    weight = getattr(module, "weight", None)
    if get_bnb_param_type(weight):
        yield from _held(module)
        yield from _held(weight)


def _held(holder: Any) -> Iterator[torch.Tensor]:
    """The tensors in an object's attributes, and in those of quantisation states among them."""
    for value in vars(holder).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value).__name__ in ("QuantState", "MatmulLtState"):
            yield from _held(value)


def base_norm(layer: LoraLayer) -> float:
    """Frobenius norm of a layer's frozen weight; takes the layers of `real_weight`, and raises its errors."""
    weight = real_weight(layer)
    # Squares of half-precision values would overflow or vanish, so they are summed in single precision.
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


@torch.no_grad()
def real_weight(layer: LoraLayer) -> torch.Tensor:
    """The frozen weight of a linear layer (quantised or not), a Conv1D or an embedding.

    Returns:
        The weight in the base layer's orientation, in a floating-point dtype of at least 16 bits. A plain weight is
        returned itself, not copied.

    Raises:
        UnsupportedError: the weight is stored in an unknown form.
    """
    base = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    kind = get_bnb_param_type(weight)
    if kind == "4bit" or (kind == "8bit" and not weight.is_floating_point()):  # 16 bits with `has_fp16_weights`
        # On the CPU, dequantize_module_weight would replace the layer's parameter, so its inner function is called.
        weight = dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    elif weight is not None:
        weight = dequantize_module_weight(base).detach()
        if type(weight) is not torch.Tensor:  # PEFT does not dequantise quanto's tensors
            weight = weight.dequantize()
    if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        stored = "no weight" if weight is None else f"a weight of {weight.dtype}"
        raise UnsupportedError(
            f"{type(base).__name__} holds {stored}, whose real values cannot be read. Supported: plain weights, and "
            "weights quantised by bitsandbytes, torchao or optimum-quanto."
        )
    result: torch.Tensor = weight
    return result
