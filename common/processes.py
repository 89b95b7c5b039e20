"""Communication between the processes training one model: results of one process are shared with all of them.

Messages go between host memories over gloo, so no accelerator waits for them.
"""

from __future__ import annotations

import builtins
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import errors

T = TypeVar("T")

PATIENCE = timedelta(days=2)
"""Timeout for another process, possibly waiting for a person. A dead process is noticed at once."""


def is_first_process() -> bool:
    """True for rank 0 of a launcher such as torchrun, or without a launcher; works before process groups exist."""
    return os.environ.get("RANK", "0") == "0"


class Processes:
    """The processes of one run. A single process sends nothing, and gets its own inputs back.

    All processes call the same methods in the same order.

    Attributes:
        rank: rank of this process, from 0.
        count: number of processes.
    """

    count: int
    rank: int

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group

    @classmethod
    def of_this_run(cls) -> Processes:
        """Processes of torch's default process group, in a new group; a single process if there is none."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        default = dist.group.WORLD
        known = _known.get("group")
        if known is None or known[0] is not default:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            _known["group"] = known = (default, cls(dist.get_rank(), dist.get_world_size(), group))
        return known[1]

    @property
    def first(self) -> bool:
        """True for the process that decides and writes."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """Number of processes on this machine, which share its main memory."""
        return 1 if self.count == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def on_first(self, work: Callable[[], T]) -> T:
        """Call a function in the first process only, and return its result in all of them.

        Raises:
            Exception: the function's error, in all processes: of the same type if it is from rankpilot or Python, else
                a ProcessError with its text.
        """
        if self.count == 1:
            return work()
        if self.first:
            try:
                result = work()
                message = pickle.dumps((result, None))
            except Exception as error:
                self._sent(pickle.dumps((None, (type(error).__name__, str(error)))))
                raise
            self._sent(message)
            return result
        received: tuple[T, tuple[str, str] | None]
        received = pickle.loads(self._sent(b""))  # noqa: S301 - from the first process of this run, like gradients
        value, failure = received
        if failure is not None:
            raise _error_of(*failure)
        return value

    def on_each(self, work: Callable[[], T]) -> T:
        """Call a function in each process, in which none waits for others, and return its result there.

        Raises:
            Exception: the function's error in this process, else that of another one as by `on_first`.
        """
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        told = self.of_each(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        for rank, each in enumerate(told):
            if each is not None:
                raise _error_of(*each, f"Process {rank}")
        return result

    def most(self, *numbers: float) -> list[float]:
        """Maximum of each number over all processes."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def least(self, *numbers: float) -> list[float]:
        """Minimum of each number over all processes."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def of_each(self, value: T) -> list[T]:
        """Value of each process, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _reduced(self, numbers: tuple[float, ...], operation: Any) -> list[float]:
        if self.count == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self._group)
        return [*map(float, tensor)]

    def _sent(self, message: bytes) -> bytes:
        """Message of the first process."""
        size = torch.tensor([len(message)])
        dist.broadcast(size, src=0, group=self._group)
        content = torch.frombuffer(bytearray(message if self.first else int(size)), dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self._group)
        return content.numpy().tobytes()


_known: dict[str, tuple[Any, Processes]] = {}
"""Processes of the latest default group, so each run adds only one group."""


def _error_of(name: str, text: str, who: str = "The first process") -> Exception:
    """Rebuild the error of another process."""
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # its constructor takes more than a text
            return kind(text)
    return errors.ProcessError(f"{who} failed with {name}: {text}")
