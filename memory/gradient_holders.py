"""Follows which nodes of autograd's graph hold each gradient, and so under which plans it lives on.

A gradient that goes two ways, such as into a layer and past it, waits until both have been gone. Under a plan whose
graph has one of the ways only, it is freed after that one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from .autograd_flow import ModuleSet
from .recording import Phases


class GradientHolders:
    """Watches the nodes of a graph while its backward pass runs.

    It keeps none of the nodes: a node would keep alive what its function has on its context.

    Args:
        flow: the modules of each node; see `flow_from`.
        serial: the serial number of a tensor's storage, None if it was not created in the step.
        now: the time.
    """

    def __init__(
        self, flow: dict[Any, ModuleSet], serial: Callable[[torch.Tensor], int | None], now: Callable[[], int]
    ) -> None:
        self._serial, self._now = serial, now
        numbers = {node: number for number, node in enumerate(flow)}
        self._modules = list(flow.values())
        self._next = [[numbers[to] for to, _ in node.next_functions if to in numbers] for node in flow]
        self._ways_in = Counter(number for following in self._next for number in following)
        self._order: list[int] = []  # of the nodes that ran
        self._starts: list[int] = []  # of these, in the same order
        self._incoming: dict[int, set[int]] = {}
        self._handles = [node.register_prehook(partial(self._enter, number)) for node, number in numbers.items()]

    def _enter(self, number: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        serials = (self._serial(gradient) for gradient in gradients if gradient is not None)
        self._incoming[number] = {serial for serial in serials if serial is not None}
        self._order.append(number)
        self._starts.append(self._now())

    def needed_later(
        self, created: Sequence[int], freed: Sequence[int], needed: dict[int, ModuleSet]
    ) -> dict[int, Phases]:
        """Stop watching, and return `Recording.needed_later`; `needed` is `Recording.needed`."""
        for handle in self._handles:
            handle.remove()
        held = self._held(created, freed)
        found = {serial: _shrinking(held[serial], freed[serial], needed.get(serial, 0)) for serial in held}
        return {serial: phases for serial, phases in found.items() if phases}

    def _held(self, created: Sequence[int], freed: Sequence[int]) -> dict[int, list[tuple[int, ModuleSet]]]:
        """By serial number of a storage of the backward pass: until when nodes hold it, and the modules of each."""
        held: dict[int, list[tuple[int, ModuleSet]]] = {}
        start_of = dict(zip(self._order, self._starts, strict=True))
        ends = [*self._starts[1:], self._now()]
        for number, start, end in zip(self._order, self._starts, ends, strict=True):
            new = range(bisect_right(created, start), bisect_right(created, end))
            for serial in self._incoming[number].union(new):
                if freed[serial] <= end and serial not in held:  # this node alone holds it
                    continue
                holders = held.setdefault(serial, [])
                holders.append((end, self._modules[number]))
                for to in self._next[number]:
                    # A gradient that is the only one of its node comes in as it is. Others may have been added up.
                    if serial not in self._incoming.get(to, ()) and self._ways_in[to] > 1:
                        holders.append((start_of.get(to, freed[serial]), self._modules[to]))
        return held


def _shrinking(holders: list[tuple[int, ModuleSet]], freed: int, needed: ModuleSet) -> Phases:
    """The times at which nodes let go of a storage so that fewer modules need it; none if something else holds it."""
    holders.sort()
    if holders[-1][0] < freed:
        return ()
    phases: list[tuple[int, ModuleSet]] = []
    rest = 0
    for (end, _), (later, modules) in reversed([*pairwise(holders)]):
        rest |= modules & needed
        if end < min(later, freed) and rest:
            phases.append((end, rest))
    kept = []
    for end, rest in reversed(phases):
        if rest != needed:
            kept.append((end, rest))
            needed = rest
    return tuple(kept)
