"""The attention kernel that a device would choose, for tensors without contents.

Source: aten/src/ATen/native/transformers/attention.cpp (scaled_dot_product_attention) and cuda/sdp_utils.cpp.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional

from ..device_kind import DeviceKind

ATEN = torch.ops.aten

Attention = Literal["auto", "efficient", "math"]
"""Which kernels CUDA has.

auto: as from Ampere on, flash attention in half precision without a mask, and otherwise the memory-efficient kernel.
efficient: as on Turing, no flash attention; keys and values are repeated for all heads of the query.
math: no fused kernel.
"""

WIDEST_FLASH = 256
"""The largest width of a head that flash attention takes."""


def attend(
    kind: DeviceKind,
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as a kind of device runs it; the last arguments are those of torch."""
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    mask = _additive(attn_mask, query)
    tensors: tuple[torch.Tensor, ...] = query, key, value
    same_heads = enable_gqa or query.shape[:-2] == key.shape[:-2]
    fused = query.dim() == 4 and same_heads and attention != "math"
    if kind == "cpu" and fused and not dropout_p and not (mask is not None and mask.requires_grad):
        output = ATEN._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, is_causal, attn_mask=mask, scale=scale)
        return _first(output)
    if kind == "cuda" and fused:
        if attention == "auto" and mask is None and query.element_size() == 2 and query.shape[-1] <= WIDEST_FLASH:
            return _flash(tensors, dropout_p, is_causal, scale)
        if attention == "efficient" and grouped:
            repeats, grouped = query.shape[-3] // key.shape[-3], False
            tensors = query, *(tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
        if not grouped:  # the kernel takes one key for each head of the query
            return _efficient(tensors, mask, dropout_p, is_causal, scale)
    output = ATEN._scaled_dot_product_attention_math(
        *tensors, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=grouped
    )
    return _first(output)


def _flash(tensors: tuple[torch.Tensor, ...], dropout_p: float, is_causal: bool, scale: float | None) -> torch.Tensor:
    width = tensors[0].shape[-1]
    scale = width**-0.5 if scale is None else scale
    tensors = tuple(_padded(tensor, 8) for tensor in tensors)
    output = _first(
        ATEN._scaled_dot_product_flash_attention(*tensors, dropout_p, is_causal, False, scale=scale),
    )
    return output if output.shape[-1] == width else output[..., :width]


def _efficient(
    tensors: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    query, key, _ = tensors
    if mask is not None:  # rows of the mask begin at addresses that are multiples of 16 elements
        length = mask.shape[-1]
        mask = mask if length % 16 == 0 else _padded(mask, 16)[..., :length]
        mask = mask.expand(*query.shape[:3], key.shape[2])
    log_sums = any(tensor.requires_grad for tensor in tensors)
    return _first(
        ATEN._scaled_dot_product_efficient_attention(*tensors, mask, log_sums, dropout_p, is_causal, scale=scale)
    )


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A mask of truth values as one that is added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    seen, hidden = (torch.scalar_tensor(value, dtype=query.dtype) for value in (0.0, float("-inf")))
    return torch.where(mask, seen, hidden)


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """The tensor with its last axis filled up to a multiple."""
    missing = -tensor.shape[-1] % multiple
    return functional.pad(tensor, (0, missing)) if missing else tensor


def _first(outputs: Any) -> torch.Tensor:
    output: torch.Tensor = outputs[0]
    return output
