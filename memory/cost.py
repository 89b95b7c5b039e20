"""What a plan costs, as a function of its ranks: adapter parameters, or bytes at the peak of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..lora.targets import TargetModule

CostUnit = Literal["bytes", "parameters"]


class Cost(Protocol):
    """Price of a plan: the highest of its prices at a few moments, each linear in the ranks of the adapted modules."""

    @property
    def unit(self) -> CostUnit:
        """What is counted."""

    @property
    def per_rank(self) -> FloatArray:
        """Price of one more rank on each module at each moment, shape (moments, modules)."""

    def fixed(self, active: BoolArray) -> FloatArray:
        """Price of adapting exactly these modules, before the first rank, shape (moments,).

        Args:
            active: which modules are adapted, shape (modules,).
        """


def total_cost(cost: Cost, ranks: IntArray) -> float:
    """Price of a plan; `ranks` has shape (modules,)."""
    return float((cost.fixed(ranks > 0) + cost.per_rank @ ranks).max())


@dataclass(frozen=True, eq=False)
class ParameterCost:
    """Counts adapter parameters: sum of rank x (d_in + d_out). There is one moment.

    Attributes:
        per_rank: shape (1, modules).
    """

    unit: ClassVar[CostUnit] = "parameters"
    per_rank: FloatArray

    @classmethod
    def of(cls, targets: Sequence[TargetModule]) -> ParameterCost:
        """The cost of these target modules."""
        return cls(np.array([[t.d_in + t.d_out for t in targets]], dtype=np.float64))

    def fixed(self, active: BoolArray) -> FloatArray:
        """Nothing: only ranks count."""
        return np.zeros(1)


@dataclass(frozen=True, eq=False)
class ByteCost:
    """Bytes at the peak of a training step, the frozen model excluded.

    A tensor is held for the backward pass if *any* of certain modules is adapted: those from which a gradient flows
    through the operation that needs it. Tensors of one such set of modules are a group. The peak is the highest of
    the moments that can be one (the loss, the backward pass of a layer, ...), and each moment holds its own part of
    each group.

    All values are whole numbers of bytes.

    Attributes:
        moments: what each moment is, for people.
        constant: bytes held at each moment whatever the plan, shape (moments,).
        per_rank: bytes of one rank on each module: weights, gradients, optimiser state, rank-wide hidden state, shape
            (moments, modules).
        held: bytes of each group at each moment, shape (moments, groups).
        needs: whether a group is held as soon as a module is adapted, bool (groups, modules).
    """

    unit: ClassVar[CostUnit] = "bytes"
    moments: tuple[str, ...]
    constant: FloatArray
    per_rank: FloatArray
    held: FloatArray
    needs: BoolArray

    def fixed(self, active: BoolArray) -> FloatArray:
        """Bytes that depend on which modules are adapted and not on their ranks, and the constant, (moments,)."""
        result: FloatArray = self.constant + self.held @ self.needs[:, active].any(axis=1)
        return result

    def prices(self, plans: IntArray) -> FloatArray:
        """Bytes of several plans at each moment, (plans, modules) -> (plans, moments)."""
        held = (plans > 0).astype(np.float64) @ self.needs.T > 0
        result: FloatArray = self.constant + held @ self.held.T + plans @ self.per_rank.T
        return result


def cost_state(cost: Cost) -> dict[str, Any]:
    """All that `cost_from_state` needs, as tensors and JSON values."""
    state: dict[str, Any] = {"unit": cost.unit}
    for field in fields(cost):  # type: ignore[arg-type]  # both kinds of cost are dataclasses
        value = getattr(cost, field.name)
        state[field.name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else list(value)
    return state


def cost_from_state(state: Mapping[str, Any]) -> Cost:
    """The cost that `cost_state` described."""
    kind: type[Any] = {"bytes": ByteCost, "parameters": ParameterCost}[state["unit"]]
    values = {field.name: state[field.name] for field in fields(kind)}
    cost: Cost = kind(**{n: v.numpy() if isinstance(v, torch.Tensor) else tuple(v) for n, v in values.items()})
    return cost
