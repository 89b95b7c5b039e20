"""The kind of device on which tensors are, or for which tensors on the meta device stand."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal

import torch

DeviceKind = Literal["cpu", "cuda"]

META_STANDS_FOR: ContextVar[DeviceKind] = ContextVar("META_STANDS_FOR", default="cpu")
"""The kind of device for which the meta device, whose tensors have no contents, stands in this context."""


def device_kind(tensor: torch.Tensor) -> str:
    """The type of a tensor's device, such as "cuda"; for the meta device, that for which it stands."""
    return META_STANDS_FOR.get() if tensor.is_meta else tensor.device.type
