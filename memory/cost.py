"""What a plan costs, as a function of its ranks: adapter parameters, or bytes at the peak of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..lora.module_spec import ModuleSpec

CostUnit = Literal["bytes", "parameters"]


@dataclass(frozen=True, eq=False)
class ParameterCost:
    """Counts adapter parameters: sum of rank x (d_in + d_out). There is one moment, and no group.

    Attributes:
        per_rank: shape (1, modules). The other attributes are those of `ByteCost`.
    """

    unit: ClassVar[CostUnit] = "parameters"
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
        per_rank: bytes of one rank on each module: weights, gradients, optimiser state, rank-wide hidden state, shape
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


Cost = ParameterCost | ByteCost
"""What any plan costs: the highest of its costs at a few moments of a training step.

At each moment, a plan costs a constant, something for each rank, and something for each *group*. A group is paid once
as soon as the plan adapts any of the modules that need it. All values are whole numbers, so sums are exact.
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


def cost_state(cost: Cost) -> dict[str, Any]:
    """All that `cost_from_state` needs, as arrays and JSON values."""
    state: dict[str, Any] = {"unit": cost.unit}
    for field in fields(cost):
        value = getattr(cost, field.name)
        state[field.name] = value if isinstance(value, np.ndarray) else list(value)
    return state


def cost_from_state(state: Mapping[str, Any]) -> Cost:
    """The cost that `cost_state` described; arrays may have become tensors in between."""
    if state["unit"] == "parameters":
        return ParameterCost(np.asarray(state["per_rank"]))
    arrays = {name: np.asarray(state[name]) for name in ("constant", "per_rank", "group_bytes", "needs")}
    return ByteCost(tuple(state["moments"]), **arrays)
