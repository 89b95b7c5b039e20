"""Remembers what a function finds out about tasks, without keeping a user's own model alive."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial, update_wrapper
from typing import Generic, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

from ..tasks.finetune import FineTune

Result = TypeVar("Result")
Further = TypeVarTuple("Further")


class Remembered(Generic[Result, *Further]):
    """A function of a task, and perhaps of further values, that finds each result out once.

    Tasks that are equal share their results, of which the latest are kept. A task that equals itself alone, as an
    `OwnTask` does, has its results for as long as it lives, and is not kept alive by them: its model is freed with it.

    Args:
        function: finds a result out.
        size: the most results of tasks that others may equal.
    """

    def __init__(self, function: Callable[[FineTune, *Further], Result], size: int) -> None:
        self._function, self._of_equals = function, lru_cache(maxsize=size)(function)
        self._of_single: WeakKeyDictionary[FineTune, dict[Hashable, Result]] = WeakKeyDictionary()
        update_wrapper(self, function)

    def __call__(self, task: FineTune, *further: *Further) -> Result:
        """The result for a task."""
        if type(task).__hash__ is not object.__hash__:
            return self._of_equals(task, *further)
        results = self._of_single.setdefault(task, {})
        if further not in results:
            results[further] = self._function(task, *further)
        return results[further]

    def cache_clear(self) -> None:
        """Forget all results."""
        self._of_equals.cache_clear()
        self._of_single.clear()


def remembered(
    size: int,
) -> Callable[[Callable[[FineTune, *Further], Result]], Remembered[Result, *Further]]:
    """The decorator that makes a function one that remembers; see `Remembered`."""
    return partial(Remembered, size=size)
