"""A context in which the meta device stands for a CPU or a CUDA device: the same operators, kernels and answers.

A dispatch key of hardware that torch no longer has (`AutocastIPU`) comes before autograd and before the kernels of the
meta device. Inside the context it is switched on, and so Python functions take the place of the operators at which the
meta device differs from the device for which it stands. Outside of it nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from ..device_kind import META_STANDS_FOR, DeviceKind
from .attention import Attention, attend
from .autocast import Autocast, operators

ATEN = torch.ops.aten

_KEY = "AutocastIPU"
_DISPATCH_KEY = getattr(torch._C.DispatchKey, _KEY)
_KEYS = torch._C.DispatchKeySet(_DISPATCH_KEY)


@dataclass(frozen=True)
class HollowDevice:
    """The device for which the meta device stands.

    Attributes:
        kind: "cpu" or "cuda".
        attention: which kernels CUDA has.
        padded: whether batches are padded, which decides what is answered where a model reads its mask.
        autocast: the autocast of the context; None for none.
    """

    kind: DeviceKind
    attention: Attention = "auto"
    padded: bool = False
    autocast: Autocast | None = None


_DEVICE: ContextVar[HollowDevice] = ContextVar("_DEVICE")


@contextmanager
def hollow_device(device: HollowDevice) -> Iterator[None]:
    """Let the meta device stand for `device` inside the context, and make new tensors there."""
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
def hollow_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast inside a `hollow_device`; None does nothing."""
    device = _DEVICE.get()
    token = _DEVICE.set(replace(device, autocast=Autocast(device.kind, dtype) if dtype else None))
    try:
        yield
    finally:
        _DEVICE.reset(token)


def _scaled_dot_product_attention(device: HollowDevice, *arguments: Any, **options: Any) -> Any:
    with hollow_autocast(None):
        return attend(device.kind, device.attention, *arguments, **options)


def _softmax(
    fused: Any, plain: Any, device: HollowDevice, tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None
) -> Any:
    """CUDA reads half precision and computes in fp32 without a copy, but not of bfloat16."""
    if device.kind == "cuda" and tensor.dtype == torch.float16 and dtype == torch.float32:
        return fused(tensor, dim, True)
    return _below(plain, tensor, dim, dtype)


def _dropout(device: HollowDevice, tensor: torch.Tensor, p: float, train: bool) -> Any:
    """CUDA keeps a mask of one byte for each value."""
    if device.kind == "cuda" and train and 0 < p < 1:
        return ATEN.native_dropout(tensor, p, True)[0]
    return _below(ATEN.dropout.default, tensor, p, train)


def _read(device: HollowDevice, tensor: torch.Tensor) -> Any:
    """What a mask says where it is read: whether all of it is ones; numbers are 1."""
    if not tensor.is_meta:
        return _below(ATEN._local_scalar_dense.default, tensor)
    if tensor.dtype == torch.bool:
        return not device.padded
    return 1.0 if tensor.is_floating_point() else 1


def _equal(device: HollowDevice, one: torch.Tensor, other: torch.Tensor) -> Any:
    return not device.padded if one.is_meta else _below(ATEN.equal.default, one, other)


_REPLACED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "softmax.int": partial(_softmax, ATEN._softmax.default, ATEN.softmax.int),
    "log_softmax.int": partial(_softmax, ATEN._log_softmax.default, ATEN.log_softmax.int),
    "dropout": _dropout,
    "_local_scalar_dense": _read,
    "equal": _equal,
}
"""By name of an operator, what runs in its place."""


def _below(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Run an operator as the meta device does."""
    with torch._C._ExcludeDispatchKeyGuard(_KEYS):
        return operator(*arguments, **options)


def _run(name: str, operator: Any, *arguments: Any, **options: Any) -> Any:
    """Run an operator as the device of the context does."""
    device = _DEVICE.get()
    if device.autocast is not None:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            arguments, options = device.autocast.cast(name, arguments, options)
    if name in _REPLACED:
        return _REPLACED[name](device, *arguments, **options)
    return _below(operator, *arguments, **options)


@cache
def _register() -> list[Any]:
    """Put Python functions before the operators that differ, once in a process; without the key nothing calls them."""
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
