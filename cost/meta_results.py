"""Runs operators on the meta device, and remembers what they return there.

A tensor on the meta device has no contents, and many operators work out its sizes in Python. The layers of a model are
alike, so what an operator returned for some sizes stands for all calls with the same ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_RESULTS: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
"""Size, strides and type of the new tensor that an operator makes of some arguments."""

_NONE = object()


def run(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run an operator of torch's dispatcher; one that makes a new tensor on the meta device runs once for equal sizes.

    Args:
        operator: an overload, as `__torch_dispatch__` gets it.
        arguments: its arguments.
        options: those given by name.
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
    """Whether an operator returns one tensor of its own, and changes none of its inputs, going by its schema."""
    schema = operator._schema
    single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    return single and schema.returns[0].alias_info is None and not schema.is_mutable


def _shares(result: torch.Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether a result lies in the memory of an argument, whatever the schema says (`_unsafe_view`)."""
    own = result.untyped_storage()._cdata
    flat = (each for value in arguments for each in (value if isinstance(value, (list, tuple)) else (value,)))
    return any(isinstance(each, torch.Tensor) and each.untyped_storage()._cdata == own for each in flat)


def _key(value: Any) -> Any:
    """All that decides the sizes of results, hashable; None where there is more than meta tensors and plain values."""
    if isinstance(value, torch.Tensor):
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_meta
        return (value.shape, value.stride(), value.dtype) if plain else None
    if isinstance(value, (tuple, list)):
        found = tuple(map(_key, value))
        return None if None in found else found
    if isinstance(value, dict):
        return _key(tuple(value.items()))
    return _NONE if value is None else (type(value), value)
