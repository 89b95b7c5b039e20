"""Autograd's graph of a loss: the modules each operation serves, and the tensors it saves for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from ..cost import ModuleSet

_SAVED_FOR: dict[str, dict[str, int]] = {
    "MmBackward0": {"self": 1, "mat2": 0},
    "BmmBackward0": {"self": 1, "mat2": 0},
    "MvBackward0": {"self": 1, "vec": 0},
    "AddmmBackward0": {"mat1": 2, "mat2": 1},
    "BaddbmmBackward0": {"batch1": 2, "batch2": 1},
    "MulBackward0": {"self": 1, "other": 0},
    "DivBackward0": {"self": 1},
    "LinearBackward0": {"input": 1, "weight": 0},
}
"""Operations that save a tensor for the gradient of one input: maps the name of the saved tensor to the index of that
input (tools/autograd/derivatives.yaml of PyTorch). Any other operation counts as saving for all its inputs, which can
only overestimate.
"""


def flow_from(loss: torch.Tensor, trains: Callable[[torch.Tensor], ModuleSet]) -> dict[Any, ModuleSet]:
    """Map each node in the graph of `loss` to the modules of which at least one must be adapted for it to exist.

    `trains` returns the modules of a leaf of the graph.
    """
    flow: dict[Any, ModuleSet] = {}
    stack = [loss.grad_fn] if loss.grad_fn is not None else []
    while stack:
        node = stack[-1]
        if node in flow:
            stack.pop()
            continue
        inputs = [source for source, _ in node.next_functions if source is not None]
        waiting = [source for source in inputs if source not in flow]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        modules = trains(node.variable) if hasattr(node, "variable") else 0
        for source in inputs:
            modules |= flow[source]
        flow[node] = modules
    return flow


def saved_by(node: Any, flow: dict[Any, ModuleSet]) -> Iterator[tuple[Any, ModuleSet]]:
    """Yield each value saved by a node, as packed by the saved-tensor hooks, and the modules it is saved for."""
    saved_for = _SAVED_FOR.get(node.name(), {})
    sources = node.next_functions
    for attribute in _saving_attributes(node.__class__):
        saved = getattr(node, attribute)
        number = saved_for.get(attribute.removeprefix("_raw_saved_"))
        modules = flow[node]
        if number is not None and number < len(sources):
            modules = flow.get(sources[number][0], 0)
        for entry in saved if isinstance(saved, tuple) else (saved,):
            if entry.data is not None:
                yield entry.data, modules


def kept_on_context(node: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors a Python function keeps on its context, invisible to hooks."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        yield from (value for value in tree_iter(vars(node)) if isinstance(value, torch.Tensor))


@cache
def _saving_attributes(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
