"""The part of a plan's price that depends on which modules are adapted, kept up to date as they come and go.

`Cost.fixed` prices one set of modules. A plan is built from thousands of sets that differ by one module each, and
most of what they cost is the same.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .ladder import IntArray
from .memory import ByteCost, Cost


class FixedPrice(Protocol):
    """What `Cost.fixed` says of a set of modules that changes one by one.

    Attributes:
        value: the price now.
    """

    value: float

    def having(self, module: int) -> float:
        """The price if this module, which is not adapted, were so too."""

    def add(self, module: int) -> None:
        """Adapt a module that is not adapted."""

    def remove(self, module: int) -> None:
        """Stop adapting a module that is adapted."""


def fixed_price(cost: Cost, active: NDArray[np.bool_]) -> FixedPrice:
    """The running price of this cost, with the `active` modules adapted, (modules,)."""
    return _FixedBytes(cost, active) if isinstance(cost, ByteCost) else _AnyFixed(cost, active)


class _AnyFixed:
    """Asks the cost anew each time."""

    def __init__(self, cost: Cost, active: NDArray[np.bool_]) -> None:
        self._cost = cost
        self._active = active.copy()
        self.value = cost.fixed(active)

    def having(self, module: int) -> float:
        active = self._active.copy()
        active[module] = True
        return self._cost.fixed(active)

    def add(self, module: int) -> None:
        self._set(module, True)

    def remove(self, module: int) -> None:
        self._set(module, False)

    def _set(self, module: int, active: bool) -> None:
        self._active[module] = active
        self.value = self._cost.fixed(self._active)


class _FixedBytes:
    """`ByteCost.fixed`: one look-up for a module above the lowest adapted one, a row of `extra` for a new lowest.

    As there, an input that several adapted modules share is priced as that of the first of them.
    """

    def __init__(self, cost: ByteCost, active: NDArray[np.bool_]) -> None:
        self._cost = cost
        self._none = len(active)
        self._forward = np.argsort(cost.order, kind="stable")
        self._place = np.argsort(self._forward).tolist()
        _, groups = np.unique(cost.shared, return_inverse=True)
        self._members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
        self._groups, self._blocks = groups.tolist(), cost.block.tolist()
        self._active = np.zeros(len(active), dtype=np.bool_)
        self._first = np.full(len(self._members), self._none)  # of the adapted modules that share an input
        self._count: Counter[int] = Counter()  # adapted modules by block
        self._lowest = self._none
        self.value = cost.constant
        for module in self._forward[active[self._forward]].tolist():
            self.add(module)

    def having(self, module: int) -> float:
        lowest, group, block = self._lowest, self._groups[module], self._blocks[module]
        if lowest == self._none or self._place[module] < self._place[lowest]:
            return self._with_lowest(module)
        price, first = self.value, int(self._first[group])
        if module < first and group != self._groups[lowest]:
            price += float(self._cost.extra[lowest, module])
            price -= float(self._cost.extra[lowest, first]) if first < self._none else 0.0
        if block == self._blocks[lowest] and self._count[block] == 1:
            price += float(self._cost.together[lowest])
        return price

    def add(self, module: int) -> None:
        self.value = self.having(module)
        group = self._groups[module]
        self._active[module] = True
        self._first[group] = min(module, int(self._first[group]))
        self._count[self._blocks[module]] += 1
        if self._lowest == self._none or self._place[module] < self._place[self._lowest]:
            self._lowest = module

    def remove(self, module: int) -> None:
        group = self._groups[module]
        self._active[module] = False
        self._first[group] = self._first_active(self._members[group])
        self._count[self._blocks[module]] -= 1
        if module == self._lowest:
            self._lowest = self._first_active(self._forward[self._place[module] :])
        self.value = self._cost.constant if self._lowest == self._none else self._with_lowest(self._lowest)

    def _first_active(self, among: IntArray) -> int:
        adapted = among[self._active[among]]
        return int(adapted[0]) if len(adapted) else self._none

    def _with_lowest(self, lowest: int) -> float:
        """The price with this module as the lowest one, added to those that are adapted."""
        counted = self._first < self._none
        counted[self._groups[lowest]] = False  # `chain` holds the lowest one's own input
        inputs = self._cost.extra[lowest].take(self._first[counted]).sum()
        others = self._count[self._blocks[lowest]] - int(self._active[lowest])
        beside = self._cost.together[lowest] if others else 0.0
        return float(self._cost.constant + self._cost.chain[lowest] + beside + inputs)
