"""Scratch memory: what CUDA kernels allocate for themselves while they run, which no tensor of the program holds.

The allocator counts it, so the peak of a step has it. Only what grows with the batch or with weights is listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .device_kind import device_kind

DEQUANTISED_ABOVE = 8
"""With more rows than this a product with 4-bit weights may make the weights whole first (bitsandbytes 0.50)."""


def scratch_bytes(operator: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> int:
    """Bytes that the kernel of an operator allocates and frees again; 0 on other devices than CUDA."""
    size = _SCRATCH.get(operator.name())
    if size is None or device_kind(arguments[0]) != "cuda":
        return 0
    return size(*arguments, **options)


def _softmax_backward(gradient: torch.Tensor, *rest: Any, **options: Any) -> int:
    """The product of gradient and output (aten/src/ATen/native/cuda/SoftMax.cu)."""
    return gradient.numel() * gradient.element_size()


def _flash_backward(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> int:
    """The query's gradient in fp32, row sums, and gradients of keys and values for each head of the query.

    Source: transformers/cuda/flash_attn/flash_api.cpp: mha_bwd; lengths are rounded to 128, widths to 32.
    """
    rows, heads, length, width = query.shape
    rounded = rows * heads * _up(length, 128)
    expanded = 2 * rows * heads * key.shape[2] * width * query.element_size() if key.shape[1] != heads else 0
    return 4 * rounded * (_up(width, 32) + 1) + expanded


def _efficient_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any
) -> int:
    """Gradients summed up in fp32 where inputs have half precision: the query's, and wide keys' and values'.

    Source: transformers/cuda/mem_eff_attention/kernel_backward.h: workspace_size; blocks of 64.
    """
    if query.element_size() > 2:
        return 0
    rows, heads, length, width = query.shape
    keys = 2 * _up(key.shape[2], 64) if width > 128 else 0
    return 4 * rows * heads * (_up(length, 64) + keys) * _up(width, 64)


def _four_bit_product(
    inputs: torch.Tensor, codes: torch.Tensor, shape: Sequence[int], *rest: Any, **options: Any
) -> int:
    """The dequantised weight (bitsandbytes/backends/cuda/ops.py: gemm_4bit)."""
    rows = inputs.numel() // inputs.shape[-1]
    return math.prod(shape) * inputs.element_size() if rows > DEQUANTISED_ABOVE else 0


def _eight_bit_product(codes: torch.Tensor, weight: torch.Tensor, *rest: Any, dtype: Any = None, **options: Any) -> int:
    """The product in int32, and in fp16 where the result has another precision (int8_scaled_mm)."""
    count = codes.numel() // codes.shape[-1] * weight.shape[0]
    return count * (4 if dtype in (None, torch.float16) else 6)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


_SCRATCH: dict[str, Callable[..., int]] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "bitsandbytes::gemm_4bit": _four_bit_product,
    "bitsandbytes::int8_scaled_mm": _eight_bit_product,
}
"""By operator, the bytes of scratch memory as a function of its arguments."""
