"""Which modules' gradients flow through each operation of a forward pass, read from autograd's graph.

An operation takes part in the backward pass if one of its inputs depends on something that trains. It saves a tensor if
one of the inputs *whose gradient needs that tensor* does: a product saves each factor for the gradient of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_iter

Modules = int
"""A set of target modules, as bits."""

_FACTOR_OF: dict[str, dict[str, int]] = {
    "MmBackward0": {"self": 1, "mat2": 0},
    "BmmBackward0": {"self": 1, "mat2": 0},
    "MvBackward0": {"self": 1, "vec": 0},
    "AddmmBackward0": {"mat1": 2, "mat2": 1},
    "BaddbmmBackward0": {"batch1": 2, "batch2": 1},
    "MulBackward0": {"self": 1, "other": 0},
    "DivBackward0": {"self": 1},
    "LinearBackward0": {"input": 1, "weight": 0},
}
"""Operations that save a tensor for the gradient of one input: the saved name, and the number of that input
(tools/autograd/derivatives.yaml of PyTorch). Any other operation is taken to save for all of its inputs, which can
only over-estimate."""


def flow_from(loss: torch.Tensor, trains: Callable[[torch.Tensor], Modules]) -> dict[Any, Modules]:
    """For each node of the graph of `loss`, the modules without which it would not be there.

    Args:
        loss: the end of the graph.
        trains: the modules that a leaf of the graph belongs to.
    """
    flow: dict[Any, Modules] = {}
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
        mask = trains(node.variable) if hasattr(node, "variable") else 0
        for source in inputs:
            mask |= flow[source]
        flow[node] = mask
    return flow


def saved_by(node: Any, flow: dict[Any, Modules]) -> Iterator[tuple[Any, Modules]]:
    """What a node saved, as packed by the saved-tensor hooks, and the modules for which it did.

    Tensors that a Python function keeps on its context come as they are.
    """
    factor_of = _FACTOR_OF.get(node.name(), {})
    sources = node.next_functions
    for attribute in _saving_attributes(node.__class__):
        kept = getattr(node, attribute)
        wanted = factor_of.get(attribute.removeprefix("_raw_saved_"))
        modules = flow[node]
        if wanted is not None and wanted < len(sources):
            modules = flow.get(sources[wanted][0], 0)
        for entry in kept if isinstance(kept, tuple) else (kept,):
            if entry.data is not None:
                yield entry.data, modules
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        for value in tree_iter(vars(node)):
            if isinstance(value, torch.Tensor):
                yield value, flow[node]


@cache
def _saving_attributes(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
