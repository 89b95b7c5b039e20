"""A context that makes the meta device emulate a CPU or CUDA device: same operators, kernels and results.

A dispatch key of hardware no longer supported by torch (`AutocastIPU`) takes precedence over autograd and the meta
kernels. The context enables it, so Python functions replace the operators whose meta versions differ from the emulated
device. Nothing changes outside the context.

The choice of attention kernel follows aten/src/ATen/native/transformers/attention.cpp (scaled_dot_product_attention)
and cuda/sdp_utils.cpp. Torch's autocast depends on each tensor's device, and ignores the meta device: the set of
autocast operators is read from the installed torch, and the lists below cover those that do not simply compute in fp32
(aten/src/ATen/autocast_mode.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional

from ...common.devices import META_AUTOCAST
from ..step_config import Attention
from .known_contents import content_of
from .live_storages import META_STANDS_FOR, DeviceKind, tensors_in

ATEN = torch.ops.aten

_KEY = "AutocastIPU"
_DISPATCH_KEY = getattr(torch._C.DispatchKey, _KEY)
_KEYS = torch._C.DispatchKeySet(_DISPATCH_KEY)


@dataclass(frozen=True)
class DeviceOnMeta:
    """The device emulated by the meta device.

    Attributes:
        kind: "cpu" or "cuda".
        attention: attention kernels available on CUDA.
        padded: whether batches are padded; sets the answer when a model reads its mask.
        autocast: the autocast of the context; None for none.
    """

    kind: DeviceKind
    attention: Attention = "auto"
    padded: bool = False
    autocast: Autocast | None = None


_DEVICE: ContextVar[DeviceOnMeta] = ContextVar("_DEVICE")


@contextmanager
def device_on_meta(device: DeviceOnMeta) -> Iterator[None]:
    """Emulate `device` on the meta device inside the context, and create new tensors there."""
    _register()
    tokens = _DEVICE.set(device), META_STANDS_FOR.set(device.kind)
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, False)
    try:
        with torch.device("meta"), torch._C._IncludeDispatchKeyGuard(_DISPATCH_KEY):
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, True)
        _DEVICE.reset(tokens[0])
        META_STANDS_FOR.reset(tokens[1])


@contextmanager
def autocast_known_on_meta() -> Iterator[None]:
    """Let code disable autocast for a meta tensor's device type, which torch refuses."""
    real = torch.autocast

    def made(device_type: str, *arguments: Any, **options: Any) -> Any:
        if device_type == "meta" and not options.get("enabled", True):
            return autocast_on_meta(None)
        return real(device_type, *arguments, **options)

    torch.autocast = made  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Enable autocast inside a `device_on_meta`; None does nothing."""
    device = _DEVICE.get()
    token = _DEVICE.set(replace(device, autocast=Autocast(device.kind, dtype) if dtype else None))
    outside = META_AUTOCAST.set(dtype)
    try:
        yield
    finally:
        META_AUTOCAST.reset(outside)
        _DEVICE.reset(token)


def _scaled_dot_product_attention(device: DeviceOnMeta, *arguments: Any, **options: Any) -> Any:
    with autocast_on_meta(None):
        return attend(device.kind, device.attention, *arguments, **options)


def _softmax(
    fused: Any, plain: Any, device: DeviceOnMeta, tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None
) -> Any:
    """Run softmax; CUDA reads float16 and computes in fp32 without a copy, but not bfloat16."""
    if device.kind == "cuda" and tensor.dtype == torch.float16 and dtype == torch.float32:
        return fused(tensor, dim, True)
    return _below(plain, tensor, dim, dtype)


def _dropout(device: DeviceOnMeta, tensor: torch.Tensor, p: float, train: bool) -> Any:
    """Run dropout; CUDA keeps a one-byte mask per value."""
    if device.kind == "cuda" and train and 0 < p < 1:
        return ATEN.native_dropout(tensor, p, True)[0]
    return _below(ATEN.dropout.default, tensor, p, train)


def _read(device: DeviceOnMeta, tensor: torch.Tensor) -> Any:
    """Return the value read from a tensor; of unknown contents, for a mask whether it is all ones, for numbers 1."""
    if not tensor.is_meta:
        return _below(ATEN._local_scalar_dense.default, tensor)
    if (content := content_of(tensor)) is not None:
        return content.item()
    if tensor.dtype == torch.bool:
        return not device.padded
    return 1.0 if tensor.is_floating_point() else 1


def _equal(device: DeviceOnMeta, one: torch.Tensor, other: torch.Tensor) -> Any:
    if one.is_meta and (content := content_of(one)) is not None and (others := content_of(other)) is not None:
        return content.equal(others)
    return not device.padded if one.is_meta else _below(ATEN.equal.default, one, other)


def _grouped_mm(device: DeviceOnMeta, rows: torch.Tensor, weights: torch.Tensor, *rest: Any) -> Any:
    """Multiply rows with the weights of their experts; the result has the same size for any expert.

    The meta kernel only supports bfloat16.
    """
    if rows.dtype == torch.bfloat16 or (rows.dim(), weights.dim()) != (2, 3):
        return _below(ATEN._grouped_mm.default, rows, weights, *rest)
    return _below(ATEN.mm.default, rows, weights[0])


_REPLACED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "softmax.int": partial(_softmax, ATEN._softmax.default, ATEN.softmax.int),
    "log_softmax.int": partial(_softmax, ATEN._log_softmax.default, ATEN.log_softmax.int),
    "dropout": _dropout,
    "_grouped_mm": _grouped_mm,
    "_local_scalar_dense": _read,
    "equal": _equal,
}
"""Replacement functions by operator name."""


def _below(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Run an operator with its meta kernel."""
    with torch._C._ExcludeDispatchKeyGuard(_KEYS):
        return operator(*arguments, **options)


def _run(name: str, operator: Any, *arguments: Any, **options: Any) -> Any:
    """Run an operator as the emulated device does."""
    device = _DEVICE.get()
    if device.autocast is not None:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            arguments, options = device.autocast.cast(name, arguments, options)
    if name in _REPLACED:
        return _REPLACED[name](device, *arguments, **options)
    of_parts = device.autocast is not None and name not in operators(device.kind)  # autocast applies to its parts
    found = operator.decompose(*arguments, **options) if of_parts else NotImplemented
    return _below(operator, *arguments, **options) if found is NotImplemented else found


@cache
def _register() -> list[Any]:
    """Register Python functions over the differing operators, once per process; inactive without the key."""
    make_library: Any = torch.library.Library
    others = make_library("_", "IMPL", _KEY)
    others.fallback(torch.library.fallthrough_kernel)
    library = make_library("aten", "IMPL", _KEY)
    for name in sorted({*_REPLACED, *operators("cpu"), *operators("cuda")}):
        base, _, overload = name.partition(".")
        operator = getattr(getattr(ATEN, base, None), overload or "default", None)
        if operator is not None:
            library.impl(operator, partial(_run, name, operator))
    return [others, library]


ATEN = torch.ops.aten


WIDEST_FLASH = 256
"""Largest head width supported by flash attention."""


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
    """Run `scaled_dot_product_attention` as on a kind of device; the last arguments are torch's."""
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    mask = _additive(attn_mask, query)
    tensors: tuple[torch.Tensor, ...] = query, key, value
    same_heads = enable_gqa or query.shape[:-2] == key.shape[:-2]
    fused = query.dim() == 4 and same_heads and attention != "math"
    same_width = query.shape[-1] == value.shape[-1]  # false for latent attention (DeepSeek)
    if kind == "cpu" and fused and same_width and not dropout_p and not (mask is not None and mask.requires_grad):
        output = ATEN._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, is_causal, attn_mask=mask, scale=scale)
        return _first(output)
    if kind == "cuda" and fused:
        halves = query.element_size() == 2 and query.shape[-1] <= WIDEST_FLASH
        if attention == "auto" and mask is None and halves and same_width:
            return _flash(tensors, dropout_p, is_causal, scale)
        if attention == "efficient" and grouped:
            repeats, grouped = query.shape[-3] // key.shape[-3], False
            tensors = query, *(tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
        if not grouped:  # the kernel needs one key per query head
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
    if mask is not None:  # rows of the mask are aligned to 16 elements
        length = mask.shape[-1]
        mask = mask if length % 16 == 0 else _padded(mask, 16)[..., :length]
        mask = mask.expand(*query.shape[:3], key.shape[2])
    log_sums = any(tensor.requires_grad for tensor in tensors)
    return _first(
        ATEN._scaled_dot_product_efficient_attention(*tensors, mask, log_sums, dropout_p, is_causal, scale=scale)
    )


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """Convert a boolean mask to an additive one."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    seen, hidden = (torch.scalar_tensor(value, dtype=query.dtype) for value in (0.0, float("-inf")))
    return torch.where(mask, seen, hidden)


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad the last axis of a tensor to a multiple."""
    missing = -tensor.shape[-1] % multiple
    return functional.pad(tensor, (0, missing)) if missing else tensor


def _first(outputs: Any) -> torch.Tensor:
    output: torch.Tensor = outputs[0]
    return output


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
"""Operators run in the lower precision under autocast."""

WITH_DTYPE = _names(
    """
    cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm log_softmax.int prod prod.dim_int
    softmax.int sum sum.dim_IntList
    """
)
"""CUDA operators that read the lower precision and compute in fp32, through their `dtype` argument."""

WIDEST = _names(
    """
    addcdiv addcmul atan2 bilinear cat cross dot grid_sampler index_copy index_put scatter_add stack tensordot vdot
    """
)
"""Operators run in the widest precision of their inputs."""


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
        """Return an operator's arguments ("softmax.int") after autocast."""
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
        arguments, options = given
        cast = partial(self._cast, dtype=dtype)
        return tuple(map(cast, arguments)), {name: cast(value) for name, value in options.items()}

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Cast an argument: a tensor, or a list of tensors; anything else is unchanged."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(each, dtype) for each in value)
        return self._to(value, dtype) if _castable(value) else value

    def _to(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cast a tensor; trained parameters are cast once per forward pass."""
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
    """Return fp32 if any tensor argument has it."""
    arguments, options = given
    tensors = filter(_castable, tensors_in([*arguments, *options.values()]))
    return torch.float32 if any(tensor.dtype == torch.float32 for tensor in tensors) else None


@cache
def operators(kind: DeviceKind) -> frozenset[str]:
    """Return the operators in a device's autocast, such as "softmax.int", in the installed torch."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[kind]
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name.removeprefix("aten::") for name in names if has_kernel(name, key))
