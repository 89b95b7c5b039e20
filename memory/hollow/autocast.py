"""Autocast for tensors without contents: which operators of a device compute in another precision.

Torch's own autocast looks at the device of each tensor, and the meta device has none. Which operators take part is read
from the installed torch; the lists below say how those do that do not simply compute in fp32
(aten/src/ATen/autocast_mode.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..device_kind import DeviceKind


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER = _names(
    """
    _addmm_activation _convolution _convolution.deprecated _native_multi_head_attention
    _scaled_dot_product_flash_attention _thnn_fused_gru_cell _thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm
    chain_matmul conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution einsum gru_cell linalg_multi_dot linalg_vecdot linear
    lstm_cell matmul mkldnn_rnn_layer mm mv prelu rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention
    """
)
"""Operators that compute in the lower precision."""

WITH_DTYPE = _names(
    """
    cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm log_softmax.int prod prod.dim_int
    softmax.int sum sum.dim_IntList
    """
)
"""Operators that read the lower precision and compute in fp32 on CUDA, by their argument `dtype`."""

WIDEST = _names(
    """
    addcdiv addcmul atan2 bilinear cat cross dot grid_sampler index_copy index_put scatter_add stack tensordot vdot
    """
)
"""Operators that compute in the widest precision among their inputs."""


@dataclass
class Autocast:
    """Autocast on one kind of device, inside a context.

    Attributes:
        kind: the device.
        dtype: the lower precision.
    """

    kind: DeviceKind
    dtype: torch.dtype
    _copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def cast(
        self, name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an operator ("softmax.int") as autocast gives them to it."""
        given = arguments, dict(options)
        if name not in operators(self.kind):
            return given
        if name in LOWER:
            return self._all_to(given, self.dtype)
        if self.kind == "cuda" and name in WITH_DTYPE:
            has_dtype = options.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in arguments)
            if has_dtype or not _castable(arguments[0]):
                return given
            return arguments, given[1] | {"dtype": torch.float32}
        if name in WIDEST:
            return self._all_to(given, _widest(given) or self.dtype)
        return self._all_to(given, torch.float32)

    def _all_to(
        self, given: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        result: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(
            lambda value: self._to(value, dtype) if _castable(value) else value, given
        )
        return result

    def _to(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in another precision; a parameter that trains is cast once in each forward pass."""
        if tensor.dtype == dtype:
            return tensor
        kept = dtype == self.dtype and tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf
        if not kept or tensor._is_view():
            return tensor.to(dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor, tensor.to(dtype)
        return self._copies[id(tensor)][1]


def _castable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _widest(given: tuple[tuple[Any, ...], dict[str, Any]]) -> torch.dtype | None:
    """fp32 if a tensor among the arguments has it."""
    dtypes: set[torch.dtype] = set()
    tree_map(lambda value: dtypes.add(value.dtype) if _castable(value) else None, given)
    return torch.float32 if torch.float32 in dtypes else None


@cache
def operators(kind: DeviceKind) -> frozenset[str]:
    """The operators that take part in a device's autocast, such as "softmax.int", in the installed torch."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[kind]
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name.removeprefix("aten::") for name in names if has_kernel(name, key))
