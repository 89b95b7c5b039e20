"""The part of a plan's cost that depends on which modules are adapted, updated when that changes.

To find a plan, thousands of sets of modules are compared that differ by one module each. Most of their cost is the
same, so it is not computed anew, as `moment_costs` does.
"""

from __future__ import annotations

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..memory.cost import Cost


class FixedCost:
    """What adapting a set of modules costs before their first rank; the set can change.

    Costs are whole numbers of bytes or parameters, so adding and subtracting them is exact.

    Args:
        cost: the cost of plans.
        active: the modules in the set at first, bool (modules,).

    Attributes:
        value: the cost at each moment, (moments,); a new array after each change.
        active: the modules in the set, bool (modules,).
    """

    def __init__(self, cost: Cost, active: BoolArray) -> None:
        self._constant, self._group_bytes, self._needs = cost.constant, cost.group_bytes, cost.needs
        self._module_groups = cost.module_groups
        self._by_group = np.ascontiguousarray(cost.group_bytes.T)
        self.active: BoolArray = active.copy()
        self.value: FloatArray
        self._pay()

    def value_with(self, module: int) -> FloatArray:
        """The cost with this module in the set as well, (moments,)."""
        added = np.flatnonzero(self._module_groups[module] & ~self._paid)
        result: FloatArray = self.value + self._by_group[added].sum(axis=0)
        return result

    def add(self, module: int, value: FloatArray) -> None:
        """Add a module that is not in the set; `value` is what `value_with` returned for it."""
        self.value = value
        self._paid |= self._module_groups[module]
        self.active[module] = True

    def remove_all(self, modules: IntArray) -> None:
        """Remove modules that are in the set."""
        self.active[modules] = False
        self._pay()

    def additions(self, modules: IntArray) -> FloatArray:
        """What adding each of these modules alone would add to the cost, (moments, len(modules))."""
        unpaid = ~self._paid
        result: FloatArray = (self._module_groups[modules][:, unpaid].astype(np.float64) @ self._by_group[unpaid]).T
        return result

    def removals(self) -> FloatArray:
        """What removing each module of the set alone would take off the cost, 0 for the others, (moments, modules)."""
        result = np.zeros((len(self.value), len(self.active)))
        single = np.flatnonzero(self._module_groups[self.active].sum(axis=0, dtype=np.int32) == 1)
        owners = (self._needs[single] & self.active).argmax(axis=1)
        for moment, sizes in enumerate(self._group_bytes):
            result[moment] = np.bincount(owners, weights=sizes[single], minlength=len(self.active))
        return result

    def _pay(self) -> None:
        """Find the groups that the set needs, and what they cost."""
        self._paid = np.asarray(self._module_groups[self.active].any(axis=0))
        self.value = self._constant + self._group_bytes @ self._paid
