"""Carry an optimiser's state through a change of rank.

The gradient of a re-factored pair is a linear map of the old one: with A' = Q A and B' = B P, chain rule gives
g_A' = P^T g_A and g_B' = g_B Q^T on the kept directions. First moments take the same map, second moments the
map with squared entries, and the step count stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..errors import UnsupportedError

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg"})
SUPPORTED = (
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)


@dataclass(frozen=True)
class StateMap:
    """How the rank axis of a parameter's state changes.

    Attributes:
        axis: the rank axis, 0 for A and 1 for B.
        matrix: shape (new rank, old rank); rows of fresh directions are ignored.
        fresh: bool of shape (new rank,): directions without a past, whose state starts at zero.
        fill_second: "mean" starts the second moment of fresh directions at the mean of the old ones, which keeps
            their first steps of the usual size; "zero" does not.
    """

    axis: Literal[0, 1]
    matrix: torch.Tensor
    fresh: torch.Tensor
    fill_second: Literal["zero", "mean"] = "zero"

    def apply(self, state: torch.Tensor, *, second: bool) -> torch.Tensor:
        """The mapped state tensor, in the dtype that it came in."""
        matrix = self.matrix.to(state.device)
        rows = state.double().movedim(self.axis, 0)
        mapped = (matrix.square() if second else matrix) @ rows
        fill = rows.mean(dim=0) if second and self.fill_second == "mean" else torch.zeros_like(rows[0])
        mapped[self.fresh.to(state.device)] = fill
        return mapped.movedim(0, self.axis).to(state.dtype).contiguous()


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose state is not understood.

    Raises:
        UnsupportedError: with the ones that are.
    """
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, torch.optim.RMSprop) and any(group["centered"] for group in inner.param_groups):
        # Its variance is a difference of the two moments, which the maps would let become negative.
        raise UnsupportedError("RMSprop(centered=True) cannot be carried through a change of rank. Use centered=False.")
    if not isinstance(inner, SUPPORTED):
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise UnsupportedError(
            f"The state of {type(inner).__name__} cannot be carried through a change of rank. Supported: {names} of "
            "torch.optim (in TrainingArguments: optim='adamw_torch', 'adamw_torch_fused' or 'sgd')."
        )


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def state_tensors_per_parameter(optimizer: torch.optim.Optimizer | None) -> int:
    """How many tensors of a parameter's own shape the optimiser keeps for it (2 for AdamW)."""
    if optimizer is None:
        return 2
    inner = unwrap_optimizer(optimizer)
    defaults = inner.defaults
    if isinstance(inner, torch.optim.SGD):
        return int(defaults["momentum"] != 0)
    if isinstance(inner, torch.optim.RMSprop):
        return 1 + int(defaults["momentum"] != 0)
    return 2 + int(bool(defaults.get("amsgrad")))


def map_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, change: StateMap) -> None:
    """Map every state tensor of `parameter`; call before the parameter itself gets its new shape.

    Raises:
        UnsupportedError: a state tensor of the parameter's shape whose meaning is unknown.
    """
    if optimizer is None:
        return
    state = unwrap_optimizer(optimizer).state.get(parameter, {})
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            continue
        if key not in FIRST_MOMENTS | SECOND_MOMENTS:
            kind = type(unwrap_optimizer(optimizer)).__name__
            raise UnsupportedError(f"{kind} keeps a state tensor {key!r} that cannot be mapped to a new rank.")
        state[key] = change.apply(value, second=key in SECOND_MOMENTS)


def reset_state(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Forget the state of parameters that lose or regain all their directions: they start like new."""
    if optimizer is not None:
        for parameter in parameters:
            unwrap_optimizer(optimizer).state.pop(parameter, None)
