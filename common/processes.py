"""The processes that train one model together: what one of them works out, all of them know.

Messages go from one host's memory to another's over gloo, so that no accelerator waits for them.
"""

from __future__ import annotations

import builtins
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .. import errors

T = TypeVar("T")

PATIENCE = timedelta(days=2)
"""How long a process waits for another, which may wait for a person. One that has died is noticed at once."""


def is_first_process() -> bool:
    """Whether a launcher such as torchrun has started no process before this one; before any group of them is there."""
    return os.environ.get("RANK", "0") == "0"


class Processes:
    """The processes of one run. One that is alone sends nothing, and gets back what it passes in.

    All processes call the same methods in the same order.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
    """

    count: int
    rank: int

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group

    @classmethod
    def of_this_run(cls) -> Processes:
        """Those of torch's default process group, with a group of their own; alone, where there is none."""
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
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """What a function returns in the first process, in all of them; only there it is called.

        Raises:
            Exception: what it raised there, in all processes: of the same kind where it is one of rankpilot or of
                Python, else a ProcessError with its text.
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
        received = pickle.loads(self._sent(b""))  # noqa: S301 - from the first process of this run, as gradients are
        value, failure = received
        if failure is not None:
            raise _error_of(*failure)
        return value

    def most(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def least(self, *numbers: float) -> list[float]:
        """The smallest of each number over all processes."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def of_each(self, value: T) -> list[T]:
        """The value of each process, in the order of their numbers."""
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
        result: list[float] = tensor.tolist()
        return result

    def _sent(self, message: bytes) -> bytes:
        """The message of the first process."""
        size = torch.tensor([len(message)])
        dist.broadcast(size, src=0, group=self._group)
        content = torch.empty(int(size), dtype=torch.uint8)
        if self.first:
            content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self._group)
        return content.numpy().tobytes()


_known: dict[str, tuple[Any, Processes]] = {}
"""The processes of the default group that was there last, so that each run has one group more and no new ones."""


def _error_of(name: str, text: str) -> Exception:
    """The error of another process."""
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # it takes more than a text
            pass
    return errors.ProcessError(f"The first process failed with {name}: {text}")
