"""Run operators on the meta device, and cache their results.

Meta tensors have no contents, and many operators compute sizes in Python. Layers of a model are alike, so a cached
result applies to all calls with the same sizes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_RESULTS: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
"""Size, strides and dtype of an operator's new tensor, by its arguments."""

_NONE = object()


def run(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run a dispatcher operator; one that creates a meta tensor runs once per set of sizes.

    Args:
        operator: an overload, as passed to `__torch_dispatch__`.
        arguments: its positional arguments.
        options: its keyword arguments.
    """
    real = arguments and isinstance(arguments[0], torch.Tensor) and not arguments[0].is_meta
    key = None if real or not _makes_one_tensor(operator) else _key((operator, arguments, options))
    if key is None:
        return operator(*arguments, **options)
    if key in _RESULTS:
        size, strides, dtype = _RESULTS[key]
        return torch.empty_strided(size, strides, dtype=dtype, device="meta")
    result = operator(*arguments, **options)
    if type(result) is torch.Tensor and result.is_meta and not _shares(result, (*arguments, *options.values())):
        made = result.shape, result.stride(), result.dtype
        plain = torch.empty_strided(*made[:2], dtype=made[2], device="meta")
        if plain.untyped_storage().nbytes() == result.untyped_storage().nbytes():
            _RESULTS[key] = made
    return result


@cache
def _makes_one_tensor(operator: Any) -> bool:
    """True if an operator's schema returns one new tensor and mutates no inputs."""
    schema = operator._schema
    single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    return single and schema.returns[0].alias_info is None and not schema.is_mutable


def _shares(result: torch.Tensor, arguments: tuple[Any, ...]) -> bool:
    """True if a result aliases an argument, regardless of the schema (`_unsafe_view`)."""
    own = result.untyped_storage()._cdata
    flat = (each for value in arguments for each in (value if isinstance(value, (list, tuple)) else (value,)))
    return any(isinstance(each, torch.Tensor) and each.untyped_storage()._cdata == own for each in flat)


def _key(value: Any) -> Any:
    """Return a hashable key of everything that affects result sizes; None beyond meta tensors and plain values."""
    if isinstance(value, torch.Tensor):
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_meta
        return (value.shape, value.stride(), value.dtype) if plain else None
    if isinstance(value, (tuple, list)):
        found = tuple(map(_key, value))
        return None if None in found else found
    if isinstance(value, dict):
        return _key(tuple(value.items()))
    return _NONE if value is None else (type(value), value)
