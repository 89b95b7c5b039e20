"""Lets a recorder run the segments of gradient checkpointing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from .step_parts import is_reentrant

CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps a module's checkpointing function."""


@contextmanager
def segments_marked(modules: Sequence[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Replace transformers' checkpointing function by another one inside.

    It stays replaced where a step switches checkpointing off and on again, which gives every module another function.

    Args:
        modules: those that have such a function.
        run: called with whether the function is reentrant, and then with what the function is called with.
    """
    functions = [vars(module)[CHECKPOINT] for module in modules]
    kinds, marked = {type(module) for module in modules}, _Marked(modules, run)
    try:
        for kind in kinds:
            setattr(kind, CHECKPOINT, marked)
        yield
    finally:
        for kind in kinds:
            delattr(kind, CHECKPOINT)  # no class of transformers has one of its own
        for module, function in zip(modules, functions, strict=True):
            setattr(module, CHECKPOINT, function)


class _Marked:
    """The checkpointing function of all modules of a class, as an attribute that hides those of the modules."""

    def __init__(self, modules: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        self._modules, self._run = {id(module) for module in modules}, run

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None or CHECKPOINT not in vars(module):
            raise AttributeError(f"{kind.__name__} has no attribute {CHECKPOINT!r}")
        function = vars(module)[CHECKPOINT]
        return partial(self._run, is_reentrant(function)) if id(module) in self._modules else function

    def __set__(self, module: nn.Module, function: Any) -> None:
        vars(module)[CHECKPOINT] = function

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[CHECKPOINT]
