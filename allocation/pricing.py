"""The part of a plan's price that depends on which modules are adapted, kept up to date as they come and go.

`Cost.fixed` prices one set of modules. A plan is built from thousands of sets that differ by one module each, and
most of what they cost is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import ConfigError
from ..memory.cost import ByteCost, Cost


@dataclass(frozen=True, eq=False)
class Coverage:
    """A cost's groups in the two orders in which they are read.

    Attributes:
        constant: price of no module at all at each moment, (moments,).
        held: price of each group at each moment, (moments, groups).
        needs: whether a group is paid as soon as a module is adapted, (groups, modules).
        by_module: the same, transposed and contiguous, (modules, groups).
    """

    constant: FloatArray
    held: FloatArray
    needs: BoolArray
    by_module: BoolArray


_COVERAGE: WeakKeyDictionary[Cost, Coverage] = WeakKeyDictionary()
"""A run prices thousands of plans with one cost, which never changes."""


def coverage_of(cost: Cost) -> Coverage:
    """The groups of a cost; none where its fixed price does not depend on the modules.

    Raises:
        ConfigError: the fixed price depends on the modules in a way of its own.
    """
    found = _COVERAGE.get(cost)
    if found is None:
        found = _COVERAGE[cost] = _coverage(cost)
    return found


def _coverage(cost: Cost) -> Coverage:
    if isinstance(cost, ByteCost):
        needs = np.ascontiguousarray(cost.needs)
        return Coverage(cost.constant, cost.held, needs, np.ascontiguousarray(needs.T))
    moments, modules = cost.per_rank.shape
    constant = cost.fixed(np.zeros(modules, dtype=np.bool_))
    if (cost.fixed(np.ones(modules, dtype=np.bool_)) != constant).any():
        raise ConfigError(f"Plans are priced with ByteCost or without fixed prices, not with {type(cost).__name__}.")
    empty = np.zeros((0, modules), dtype=np.bool_)
    return Coverage(constant, np.zeros((moments, 0)), empty, empty.T)


def price_of(cost: Cost, ranks: IntArray) -> FloatArray:
    """Price of a plan at each moment, (moments,); `ranks` has shape (modules,)."""
    table = coverage_of(cost)
    result: FloatArray = table.constant + table.held @ table.by_module[ranks > 0].any(axis=0) + cost.per_rank @ ranks
    return result


class FixedPrice:
    """What `Cost.fixed` says of a set of modules that changes one by one.

    Prices are whole numbers (bytes or parameters), so their running sums are exact.

    Args:
        cost: the cost.
        active: the modules that are adapted at first, bool (modules,).

    Attributes:
        value: the price now, (moments,); a new array after each change.
        active: the modules that are adapted now, bool (modules,).
    """

    def __init__(self, cost: Cost, active: BoolArray) -> None:
        self._table = coverage_of(cost)
        self._by_group = np.ascontiguousarray(self._table.held.T)
        self._counts = self._table.by_module[active].sum(axis=0, dtype=np.int32)  # adapted modules of each group
        self.active = active.copy()
        self.value = self._revalued()

    def having(self, module: int) -> FloatArray:
        """The price if this module, adapted or not, were so, (moments,)."""
        fresh = np.flatnonzero(self._table.by_module[module] & (self._counts == 0))
        result: FloatArray = self.value + self._by_group[fresh].sum(axis=0)
        return result

    def add(self, module: int, value: FloatArray) -> None:
        """Adapt a module that is not adapted; `value` is the price `having` it."""
        self.value = value
        self._counts += self._table.by_module[module]
        self.active[module] = True

    def add_all(self, modules: IntArray) -> None:
        """Adapt several modules that are not adapted."""
        self._counts += self._table.by_module[modules].sum(axis=0, dtype=np.int32)
        self.active[modules] = True
        self.value = self._revalued()

    def remove_all(self, modules: IntArray) -> None:
        """Stop adapting several modules that are adapted."""
        self._counts -= self._table.by_module[modules].sum(axis=0, dtype=np.int32)
        self.active[modules] = False
        self.value = self._revalued()

    def additions(self, modules: IntArray) -> FloatArray:
        """What each of these modules, adapted or not, would add alone, (moments, len(modules))."""
        free = self._counts == 0
        result: FloatArray = (self._table.by_module[modules][:, free].astype(np.float64) @ self._by_group[free]).T
        return result

    def removals(self) -> FloatArray:
        """What each adapted module would free if it alone were dropped, 0 for the others, (moments, modules)."""
        result = np.zeros((len(self.value), len(self.active)))
        single = np.flatnonzero(self._counts == 1)
        owners = (self._table.needs[single] & self.active).argmax(axis=1)
        for moment, held in enumerate(self._table.held):
            result[moment] = np.bincount(owners, weights=held[single], minlength=len(self.active))
        return result

    def _revalued(self) -> FloatArray:
        result: FloatArray = self._table.constant + self._table.held @ (self._counts > 0)
        return result
