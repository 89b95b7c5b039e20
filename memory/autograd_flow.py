"""Reads from autograd's graph which target modules each operation's backward pass serves.

An operation takes part in the backward pass if one of its inputs depends on something that trains. It saves a tensor if
one of the inputs *whose gradient needs that tensor* does: a product saves each factor for the gradient of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from ..common.arrays import BoolArray, IntArray

ModuleSet = int
"""A set of target modules as a bit mask: bit i is target module i. The bit after the last is what always trains."""

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
"""Operations that save a tensor for the gradient of one input: by name of the saved tensor, the number of that input
(tools/autograd/derivatives.yaml of PyTorch). Any other operation counts as saving for all of its inputs, which can only
over-estimate."""


def adapted_modules(ranks: IntArray | BoolArray) -> ModuleSet:
    """The modules that a plan adapts, with what always trains; `ranks`, or whether each is above 0, (modules,)."""
    return sum(1 << int(module) for module in np.flatnonzero(ranks)) | 1 << len(ranks)


def flow_from(loss: torch.Tensor, trains: Callable[[torch.Tensor], ModuleSet]) -> dict[Any, ModuleSet]:
    """For each node of the graph of `loss`, the modules of which at least one must be adapted for the node to exist.

    `trains` returns the modules to which a leaf of the graph belongs.
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
    """Yield each value that a node saved, as the saved-tensor hooks packed it, and the modules that it is saved for."""
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
    """Yield the tensors that a Python function keeps on its context, where hooks do not see them."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        yield from (value for value in tree_iter(vars(node)) if isinstance(value, torch.Tensor))


@cache
def _saving_attributes(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
