"""Follows the storages that code creates, and counts the bytes of those that are live, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .scratch import scratch_bytes


def storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    """The storages of tensors, including those inside of tensor subclasses (quantised weights)."""
    for tensor in tensors:
        if type(tensor) is torch.Tensor:
            yield tensor.untyped_storage()
            continue
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is not None:
            parts = (getattr(tensor, name) for name in inner()[0])
            yield from storages(part for part in parts if isinstance(part, torch.Tensor))
        else:
            yield tensor.untyped_storage()


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that reports every storage that operators create inside it, and when it is freed.

    Scratch memory inside an operator is held by no tensor. What CUDA kernels take (`memory/scratch.py`) counts as a
    storage that is freed at once.

    Args:
        created: called with the serial number and bytes of a new storage, in the order of creation.
        freed: called with the serial number of a storage that is freed.

    Attributes:
        now: number of operators that have run.
        count: number of storages created.
    """

    def __init__(self, created: Callable[[int, int], None], freed: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.count: int = 0
        self._created, self._freed = created, freed
        # By `_cdata`, a number that no other live storage has, empty ones included.
        self._seen: dict[int, tuple[int | None, weakref.ref[torch.UntypedStorage]]] = {}

    def serial(self, tensor: torch.Tensor) -> int | None:
        """The serial number of a tensor's storage; None if it was not created inside the context."""
        entry = self._seen.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else None

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and report new storages among its results."""
        options = options or {}
        result = operator(*arguments, **options)
        self.now += 1
        results = (result,) if type(result) is torch.Tensor else tensors_in(result)
        unseen = {each._cdata: each for each in storages(results) if each._cdata not in self._seen}
        if unseen:
            self._see(unseen, tensors_in([*arguments, *options.values()]))
        scratch = scratch_bytes(operator, arguments, options)
        if scratch:
            serial, self.count = self.count, self.count + 1
            self._created(serial, scratch)
            self._freed(serial)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, so that torch calls `__torch_dispatch__` without a wrapper, which would take as long as all else here.

        The wrapper keeps torch.compile out; whoever enters this context does so himself, by the stance "force_eager".
        """
        return False

    def _see(self, unseen: dict[int, torch.UntypedStorage], inputs: Iterable[torch.Tensor]) -> None:
        """Note storages seen for the first time; those are new that are not among the operator's inputs."""
        old = {storage._cdata for storage in storages(inputs)}
        for key, storage in unseen.items():
            if key in old:
                self._seen[key] = None, weakref.ref(storage, partial(self._forget, key))
            else:
                self._created(self._follow(storage), storage.nbytes())

    def _follow(self, storage: torch.UntypedStorage) -> int:
        """Report the end of a storage, under the serial number that this returns."""
        key, serial = storage._cdata, self.count
        self.count += 1

        def freed(reference: object) -> None:
            self._forget(key, reference)
            self._freed(serial)

        self._seen[key] = serial, weakref.ref(storage, freed)
        return serial

    def _forget(self, key: int, reference: object) -> None:
        self._seen.pop(key, None)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors among an operator's inputs or results; much faster than pytree, since it runs for every operator."""
    if isinstance(values, torch.Tensor):
        return [values]
    found: list[torch.Tensor] = []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return found
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_in(value)
    return found


class LivePeak(LiveStorages):  # type: ignore[no-untyped-call]
    """A context that counts the live bytes of the storages created inside it.

    Attributes:
        bytes: live bytes now.
        peak: the highest value of `bytes` so far.
    """

    def __init__(self) -> None:
        super().__init__(self._add, self._drop)
        self.bytes: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take tensors that are there already off `bytes` when they are freed; views of larger storages stay out."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == tensor.nbytes and storage._cdata not in self._seen:
                self._sizes[self._follow(storage)] = tensor.nbytes

    def _add(self, serial: int, size: int) -> None:
        self._sizes[serial] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _drop(self, serial: int) -> None:
        self.bytes -= self._sizes.pop(serial)
