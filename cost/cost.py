"""What a plan costs, as a function of its ranks: adapter parameters, or bytes at the peak of a training step.

`FixedCost` is the part that depends on which modules are adapted, updated when that changes: to find a plan, thousands
of sets of modules are compared that differ by one module each, and most of their cost is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..lora.spec import ModuleSpec

CostUnit = Literal["bytes", "parameters"]

ModuleSet = int
"""A set of target modules as a bit mask: bit i is target module i. The bit after the last is what always trains."""


@dataclass(frozen=True, eq=False)
class ParameterCost:
    """Counts adapter parameters: sum of rank x (d_in + d_out). There is one moment, and no group.

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
        """The cost of plans for these modules."""
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
    """Bytes at the peak of a training step, the frozen model excluded.

    The backward pass needs a tensor if *any* of certain modules is adapted: those from which a gradient flows through
    the operation that reads it. Tensors with one such set of modules are a group. The peak is the highest of the
    moments that can be one (the loss, the backward pass of a layer, ...); at each of them another part of each group
    is in memory.

    Attributes:
        moments: what each moment is, for people.
        constant: bytes at each moment whatever the plan, shape (moments,).
        per_rank: bytes of one rank on each module: weights, gradients, optimizer state, rank-wide hidden state, shape
            (moments, modules).
        group_bytes: bytes of each group at each moment, shape (moments, groups).
        needs: which modules need each group, bool (groups, modules).
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


TIME = "the time of a step"
"""What the last moment of a `TimedCost` is, for people."""


@dataclass(frozen=True, eq=False)
class TimedCost:
    """Another cost, with the time of a step as its last moment; `SecondsRow.added_to` makes it.

    The unit of time is such that its limit and the limit of the other moments are one number. So whatever chooses plans
    keeps both limits as it keeps one.

    Attributes:
        unit: of the other moments.
        moments: what each moment is, for people, `TIME` last.
        constant: see `ByteCost`, as the arrays below.
        per_rank: for each rank, (moments, modules).
        group_bytes: of each group, (moments, groups).
        needs: which modules need each group, bool (groups, modules).
        unit_per_second: how much of the unit stands for one second.
    """

    unit: CostUnit
    moments: tuple[str, ...]
    constant: FloatArray
    per_rank: FloatArray
    group_bytes: FloatArray
    needs: BoolArray
    unit_per_second: float

    @cached_property
    def module_groups(self) -> BoolArray:
        """`needs`, transposed and contiguous, bool (modules, groups)."""
        return np.ascontiguousarray(self.needs.T)


UntimedCost = ParameterCost | ByteCost
Cost = UntimedCost | TimedCost
"""What any plan costs: the highest of its costs at a few moments of a training step.

At each moment, a plan costs a constant, something for each rank, and something for each *group*. A group is paid once
as soon as the plan adapts any of the modules that need it. All values are multiples of one number (1 for bytes and
parameters), so sums are exact.
"""


def moment_costs(cost: Cost, plans: IntArray) -> FloatArray:
    """What plans cost at each moment: ranks of shape (..., modules) -> costs of shape (..., moments)."""
    if plans.ndim == 1:
        needed = cost.module_groups[plans > 0].any(axis=0)
    else:
        needed = (plans > 0).astype(np.float64) @ cost.needs.T > 0
    result: FloatArray = cost.constant + needed @ cost.group_bytes.T + plans @ cost.per_rank.T
    return result


def plan_cost(cost: Cost, ranks: IntArray) -> float:
    """What a plan costs, at the moment when it costs most; `ranks` has shape (modules,)."""
    return float(moment_costs(cost, ranks).max())


def unit_costs(cost: Cost, plans: IntArray) -> FloatArray:
    """As `moment_costs`, without the time of a step."""
    costs = moment_costs(cost, plans)
    return costs[..., :-1] if isinstance(cost, TimedCost) else costs


def unit_cost(cost: Cost, ranks: IntArray) -> float:
    """What a plan costs in the unit of its cost, whatever time it takes; `ranks` has shape (modules,)."""
    return float(unit_costs(cost, ranks).max())


def cost_state(cost: Cost) -> dict[str, Any]:
    """All that `cost_from_state` needs, as arrays and JSON values."""
    state: dict[str, Any] = {"unit": cost.unit}
    for field in fields(cost):
        value = getattr(cost, field.name)
        state[field.name] = list(value) if isinstance(value, tuple) else value
    return state


def cost_from_state(state: Mapping[str, Any]) -> Cost:
    """The cost that `cost_state` described; arrays may have become tensors in between."""
    if state["unit"] == "parameters" and "moments" not in state:
        return ParameterCost(np.asarray(state["per_rank"]))
    arrays = {name: np.asarray(state[name]) for name in ("constant", "per_rank", "group_bytes", "needs")}
    moments = tuple(state["moments"])
    if "unit_per_second" in state:
        return TimedCost(state["unit"], moments, **arrays, unit_per_second=float(state["unit_per_second"]))
    return ByteCost(moments, **arrays)


def check_cost(cost: Cost, modules: int) -> None:
    """Refuse a cost whose arrays do not fit one another, or so many modules.

    Raises:
        ValueError: a shape, a type or a number is wrong.
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
            raise ValueError(f"{name} of the cost holds NaN or infinity")
    if cost.unit not in get_args(CostUnit) or moments == 0 or not all(isinstance(name, str) for name in cost.moments):
        raise ValueError(f"the cost is of {moments} moments, in {cost.unit!r}")
    if isinstance(cost, TimedCost) and not (moments > 1 and 0 < cost.unit_per_second < math.inf):
        raise ValueError(f"the cost of time is of {moments} moments, {cost.unit_per_second} for a second")


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
