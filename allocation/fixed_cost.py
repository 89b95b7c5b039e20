"""The part of a plan's cost that depends on which modules are adapted, kept up to date as they come and go.

`moment_costs` looks at the whole plan. A planner looks at thousands of sets of modules that differ by one module each,
and most of what they cost is the same.
"""

from __future__ import annotations

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..memory.cost import Cost


class FixedCost:
    """Cost of adapting a set of modules, before their first rank. The set changes module by module.

    Costs are whole numbers (bytes or parameters), so their running sums are exact.

    Args:
        cost: the cost of plans.
        active: the modules that are adapted at first, bool (modules,).

    Attributes:
        value: the cost of the present set at each moment, (moments,); a new array after each change.
        active: the modules that are adapted now, bool (modules,).
    """

    def __init__(self, cost: Cost, active: BoolArray) -> None:
        self._constant, self._group_bytes, self._needs = cost.constant, cost.group_bytes, cost.needs
        self._module_groups = cost.module_groups
        self._by_group = np.ascontiguousarray(cost.group_bytes.T)
        self._counts = self._module_groups[active].sum(axis=0, dtype=np.int32)  # adapted modules of each group
        self.active = active.copy()
        self.value = self._evaluate()

    def value_with(self, module: int) -> FloatArray:
        """The cost if this module were adapted as well, (moments,)."""
        added = np.flatnonzero(self._module_groups[module] & (self._counts == 0))
        result: FloatArray = self.value + self._by_group[added].sum(axis=0)
        return result

    def add(self, module: int, value: FloatArray) -> None:
        """Adapt a module that is not adapted; `value` is `value_with` it."""
        self.value = value
        self._counts += self._module_groups[module]
        self.active[module] = True

    def add_all(self, modules: IntArray) -> None:
        """Adapt several modules that are not adapted."""
        self._counts += self._module_groups[modules].sum(axis=0, dtype=np.int32)
        self.active[modules] = True
        self.value = self._evaluate()

    def remove_all(self, modules: IntArray) -> None:
        """Stop adapting several modules that are adapted."""
        self._counts -= self._module_groups[modules].sum(axis=0, dtype=np.int32)
        self.active[modules] = False
        self.value = self._evaluate()

    def additions(self, modules: IntArray) -> FloatArray:
        """What each of these modules, adapted or not, would add alone, (moments, len(modules))."""
        unpaid = self._counts == 0
        result: FloatArray = (self._module_groups[modules][:, unpaid].astype(np.float64) @ self._by_group[unpaid]).T
        return result

    def removals(self) -> FloatArray:
        """What each adapted module would free if it alone were dropped, 0 for the others, (moments, modules)."""
        result = np.zeros((len(self.value), len(self.active)))
        single = np.flatnonzero(self._counts == 1)
        owners = (self._needs[single] & self.active).argmax(axis=1)
        for moment, sizes in enumerate(self._group_bytes):
            result[moment] = np.bincount(owners, weights=sizes[single], minlength=len(self.active))
        return result

    def _evaluate(self) -> FloatArray:
        result: FloatArray = self._constant + self._group_bytes @ (self._counts > 0)
        return result
