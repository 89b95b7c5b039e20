"""Contents of small tensors on the meta device, for models whose operators depend on them.

The sizes of pictures and the places of their tokens are numbers in a batch that models read: they loop over pictures,
cut patches into windows, and select rows by a mask. Inside `known_contents`, each operator whose inputs are known also
runs on the CPU, on mirrors of their storages. Views share a mirror, and operators in place change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ATEN = torch.ops.aten

MOST = 2**20
"""Largest number of elements of a mirrored tensor."""

_FILLED_TOO = (ATEN._to_copy.default, ATEN.clone.default, ATEN.index.Tensor)
"""Operators besides pointwise ones whose result holds one value throughout if their first input does."""

_KNOWN: ContextVar[_Mirrors | None] = ContextVar("_KNOWN", default=None)


@contextmanager
def known_contents(batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a batch on the meta device whose contents are known inside the context.

    Args:
        batch: tensors on the CPU, of at most `MOST` elements, or of any size if expanded from a single value.
    """
    mirrors = _Mirrors()
    moved = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in batch.items()}
    for name, tensor in batch.items():
        mirrors.know(moved[name], tensor)
    token = _KNOWN.set(mirrors)
    try:
        with mirrors, _NewTensors(mirrors):
            yield moved
    finally:
        _KNOWN.reset(token)


def content_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the contents of a tensor on the CPU; None if they are unknown."""
    mirrors = _KNOWN.get()
    return mirrors.of(tensor) if mirrors else None


def knows_all(tensors: Iterable[torch.Tensor]) -> bool:
    """True inside `known_contents` for an operator whose tensors, if any, all have known contents."""
    mirrors = _KNOWN.get()
    return mirrors is not None and all(mirrors.of(tensor) is not None for tensor in tensors)


class _NewTensors(TorchFunctionMode):
    """Knows tensors made of Python numbers, for which torch runs no operator."""

    def __init__(self, mirrors: _Mirrors) -> None:
        super().__init__()
        self._mirrors = mirrors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.tensor and made.is_meta:
            self._mirrors.know(made, func(*args, **{**(kwargs or {}), "device": "cpu"}))
        return made


class _Mirrors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mirrors on the CPU of storages on the meta device.

    A mirror is the content of a storage, with one axis; or without an axis if it holds one value throughout.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mirrors: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
        self._most = 1024

    def know(self, tensor: torch.Tensor, content: torch.Tensor) -> None:
        """Set the content of a new meta tensor; one of more than `MOST` different elements stays unknown."""
        if len(self._mirrors) >= self._most:
            self._mirrors = {key: pair for key, pair in self._mirrors.items() if not pair[0].expired()}  # type: ignore[no-untyped-call]
            self._most = 2 * len(self._mirrors) + 1024
        storage = tensor.untyped_storage()
        if _is_filled(content):
            mirror = _first(content).clone()
        elif content.numel() <= MOST:
            dense = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu").copy_(content)
            mirror = dense.as_strided((storage.nbytes() // dense.element_size(),), (1,), 0)
        else:
            return
        self._mirrors[storage._cdata] = StorageWeakRef(storage), mirror  # type: ignore[no-untyped-call]

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the content of a tensor, for a meta tensor as a view of its mirror; None if unknown."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return None
        if not tensor.is_meta:
            return tensor
        _, mirror = self._mirrors.get(tensor.untyped_storage()._cdata, (None, None))
        if mirror is None or mirror.dtype != tensor.dtype:
            return None
        if not mirror.dim():
            return mirror.expand(tensor.shape)
        return mirror.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATEN.masked_scatter_backward.default:  # holds what the mask selects, of the given sizes
            return args[0].new_empty(args[2])
        if func is ATEN.index.Tensor:
            args = args[0], [number for index in args[1] for number in self._numbers(index)]
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        known = [content for tensor in given if (content := self.of(tensor)) is not None]
        if len(known) < len(given):
            if func._schema.is_mutable:
                self._forget(args[0])
            return func(*args, **kwargs)
        to_cpu = func is ATEN._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu"
        if func is ATEN._local_scalar_dense.default or to_cpu:
            return func(known[0], **kwargs)
        if given and torch.Tag.dynamic_output_shape in func.tags and func is not ATEN.index.Tensor:
            return tree_map(self._on_meta, _on_cpu(func, args, kwargs, known))
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in func.name():
            self._follow(func, args, kwargs, known, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, known: Sequence[torch.Tensor], result: Any) -> None:
        """Repeat an operator on mirrors, if it changes one or makes new storages.

        Args:
            func: the operator.
            args: its positional arguments.
            kwargs: its keyword arguments.
            known: the contents of its tensors.
            result: its result on the meta device.
        """
        made = [each for each in tree_iter(result) if isinstance(each, torch.Tensor)]
        filled = bool(known) and _is_filled(known[0])
        if func._schema.is_mutable:
            if filled:
                self._forget(args[0])
            else:
                _on_cpu(func, args, kwargs, known)
        elif all(self.of(each) is not None for each in made):  # views
            return
        elif filled and func is ATEN.index.Tensor:
            self.know(made[0], _first(known[0]).expand(made[0].shape))
        elif filled and (torch.Tag.pointwise in func.tags or func in _FILLED_TOO):
            if all(_is_filled(each) or each.numel() == 1 for each in known):
                one = _on_cpu(func, args, kwargs, [_first(each) for each in known])
                self.know(made[0], one.expand(made[0].shape))
        elif all(each.numel() <= MOST for each in made):
            for each, content in zip(made, tree_iter(_on_cpu(func, args, kwargs, known)), strict=True):
                self.know(each, content)

    def _numbers(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return an index by a known mask as indices by numbers, whose count the meta device needs."""
        content = None if index is None or index.dtype != torch.bool else self.of(index)
        return [index] if content is None else [self._on_meta(each) for each in content.nonzero().unbind(1)]

    def _on_meta(self, content: Any) -> Any:
        if not isinstance(content, torch.Tensor):
            return content
        made = torch.empty(content.shape, dtype=content.dtype, device="meta")
        self.know(made, content)
        return made

    def _forget(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            self._mirrors.pop(tensor.untyped_storage()._cdata, None)


def _is_filled(content: torch.Tensor) -> bool:
    return content.numel() > 1 and not any(content.stride())


def _first(content: torch.Tensor) -> torch.Tensor:
    return content[(0,) * content.dim()]


def _on_cpu(func: Any, args: Any, kwargs: Any, known: Sequence[torch.Tensor]) -> Any:
    """Run an operator on the contents of its tensors, given in order."""
    contents = iter(known)

    def moved(value: Any) -> Any:
        return next(contents) if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(moved, (args, dict(kwargs)))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    return func(*args, **kwargs)
