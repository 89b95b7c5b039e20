"""The cost of a plan as a function of its ranks: adapter parameters, or bytes at the peak of a training step.

`FixedCost` is the part that depends on the set of adapted modules, updated incrementally. The search for a plan
compares thousands of sets that differ by one module each and share most of their cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..lora.spec import ModuleSpec

CostUnit = Literal["bytes", "parameters"]

ModuleSet = int
"""A set of target modules as a bit mask: bit i is target module i. The bit after the last marks what always trains."""


@dataclass(frozen=True, eq=False)
class ParameterCost:
    """Counts adapter parameters: sum of rank x (d_in + d_out), with one moment and no groups.

    Attributes:
        per_rank: shape (1, modules). The other attributes are those of `ByteCost`.
    """

    unit: ClassVar[CostUnit] = "parameters"
    moments: ClassVar[tuple[str, ...]] = ("the adapter",)
    constant: ClassVar[FloatArray] = np.zeros(1)
    group_bytes: ClassVar[FloatArray] = np.zeros((1, 0))
    per_rank: FloatArray

    @classmethod
    def of(cls, modules: Sequence[ModuleSpec]) -> ParameterCost:
        """Return the cost of plans for these modules."""
        return cls(np.array([[module.d_in + module.d_out for module in modules]], dtype=np.float64))

    @property
    def needs(self) -> BoolArray:
        """Empty, shape (0, modules)."""
        return np.zeros((0, self.per_rank.shape[1]), dtype=np.bool_)

    @property
    def module_groups(self) -> BoolArray:
        """Empty, shape (modules, 0)."""
        return self.needs.T


@dataclass(frozen=True, eq=False)
class ByteCost:
    """Bytes at the peak of a training step, excluding the frozen model.

    The backward pass needs a tensor if *any* of certain modules is adapted: those from which a gradient flows through
    the operation that reads it. Tensors with the same set of modules form a group. The peak is the maximum over the
    candidate moments (the loss, the backward pass of a layer, ...); a different part of each group is in memory at each
    of them.

    Attributes:
        moments: display name of each moment.
        constant: bytes at each moment under any plan, shape (moments,).
        per_rank: bytes per rank of each module: weights, gradients, optimizer state, rank-wide hidden state, shape
            (moments, modules).
        group_bytes: bytes of each group at each moment, shape (moments, groups).
        needs: modules that need each group, bool (groups, modules).
    """

    unit: ClassVar[CostUnit] = "bytes"
    moments: tuple[str, ...]
    constant: FloatArray
    per_rank: FloatArray
    group_bytes: FloatArray
    needs: BoolArray

    @cached_property
    def module_groups(self) -> BoolArray:
        """`needs`, transposed and contiguous, bool (modules, groups)."""
        return np.ascontiguousarray(self.needs.T)


Cost = ParameterCost | ByteCost
"""The cost of any plan: its maximum over a few moments of a training step.

At each moment, a plan costs a constant, an amount per rank, and an amount per *group*, paid once if the plan adapts any
module that needs the group. All values are multiples of one number (1 for bytes and parameters), so sums are exact.
"""


def moment_costs(cost: Cost, plans: IntArray) -> FloatArray:
    """Return the cost of plans at each moment: ranks (..., modules) -> costs (..., moments)."""
    if plans.ndim == 1:
        needed = cost.module_groups[plans > 0].any(axis=0)
    else:
        needed = (plans > 0).astype(np.float64) @ cost.needs.T > 0
    result: FloatArray = cost.constant + needed @ cost.group_bytes.T + plans @ cost.per_rank.T
    return result


def plan_cost(cost: Cost, ranks: IntArray) -> float:
    """Return the cost of a plan at its most expensive moment; `ranks` has shape (modules,)."""
    return float(moment_costs(cost, ranks).max())


def cost_state(cost: Cost) -> dict[str, Any]:
    """Return everything `cost_from_state` needs, as arrays and JSON values."""
    state: dict[str, Any] = {"unit": cost.unit}
    for field in fields(cost):
        value = getattr(cost, field.name)
        state[field.name] = list(value) if isinstance(value, tuple) else value
    return state


def cost_from_state(state: Mapping[str, Any]) -> Cost:
    """Rebuild the cost described by `cost_state`; arrays may have become tensors in between."""
    if state["unit"] == "parameters" and "moments" not in state:
        return ParameterCost(np.asarray(state["per_rank"]))
    arrays = {name: np.asarray(state[name]) for name in ("constant", "per_rank", "group_bytes", "needs")}
    return ByteCost(tuple(state["moments"]), **arrays)


def check_cost(cost: Cost, modules: int) -> None:
    """Check that the arrays of a cost are consistent with each other and with the number of modules.

    Raises:
        ValueError: a shape, type or number is wrong.
    """
    moments, groups = len(cost.moments), len(cost.needs)
    shapes = {
        "constant": (moments,),
        "per_rank": (moments, modules),
        "group_bytes": (moments, groups),
        "needs": (groups, modules),
    }
    for name, shape in shapes.items():
        values = np.asarray(getattr(cost, name))
        if values.shape != shape or values.dtype != (np.bool_ if name == "needs" else np.float64):
            raise ValueError(f"{name} of the cost has shape {values.shape} and type {values.dtype}, not {shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of the cost contains NaN or infinity")
    if cost.unit not in get_args(CostUnit) or moments == 0 or not all(isinstance(name, str) for name in cost.moments):
        raise ValueError(f"the cost has {moments} moments, in {cost.unit!r}")


class FixedCost:
    """The cost of adapting a set of modules before their first rank; the set can change.

    Costs are whole numbers of bytes or parameters, so additions and subtractions are exact.

    Args:
        cost: the cost of plans.
        active: the initial set of modules, bool (modules,).

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
        """Return the cost with this module added to the set, (moments,)."""
        added = np.flatnonzero(self._module_groups[module] & ~self._paid)
        result: FloatArray = self.value + self._by_group[added].sum(axis=0)
        return result

    def add(self, module: int, value: FloatArray) -> None:
        """Add a module to the set; `value` is the result of `value_with` for it."""
        self.value = value
        self._paid |= self._module_groups[module]
        self.active[module] = True

    def remove_all(self, modules: IntArray) -> None:
        """Remove modules from the set."""
        self.active[modules] = False
        self._pay()

    def additions(self, modules: IntArray) -> FloatArray:
        """Return the extra cost of adding each of these modules alone, (moments, len(modules))."""
        unpaid = ~self._paid
        result: FloatArray = (self._module_groups[modules][:, unpaid].astype(np.float64) @ self._by_group[unpaid]).T
        return result

    def removals(self) -> FloatArray:
        """Return the saving from removing each module alone, 0 outside the set, (moments, modules)."""
        result = np.zeros((len(self.value), len(self.active)))
        single = np.flatnonzero(self._module_groups[self.active].sum(axis=0, dtype=np.int32) == 1)
        owners = (self._needs[single] & self.active).argmax(axis=1)
        for moment, sizes in enumerate(self._group_bytes):
            result[moment] = np.bincount(owners, weights=sizes[single], minlength=len(self.active))
        return result

    def _pay(self) -> None:
        """Find the groups that the set needs, and their cost."""
        self._paid = np.asarray(self._module_groups[self.active].any(axis=0))
        self.value = self._constant + self._group_bytes @ self._paid
