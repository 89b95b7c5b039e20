"""Carries an optimiser's state through a change of rank.

The gradient of a re-factored pair is a linear map of the old one: with A' = Q A and B' = B P, the chain rule gives
g_A' = P^T g_A and g_B' = g_B Q^T on the remaining directions. First moments take the same map, second moments the
map with squared entries, and the step count stays. Where a parameter is divided by a number because its scaling grows
by it, gradients grow by it too (`scale_state`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UnsupportedError
from .optimizer_layouts import Moment, StateLayout, layout_of, unwrap_optimizer

Fill = Literal["zero", "mean"]


@dataclass(frozen=True, eq=False)
class StateMap:
    """How the rank axis of a parameter's state changes.

    Attributes:
        axis: the parameter's rank axis, 0 for A and 1 for B.
        rank: the new rank.
        matrix: the map, shape (rank, old rank); None keeps all old directions and appends new ones.
        fresh: bool (rank,): directions that start anew in place of negligible ones; None if there are none.
        fill_second: initial second moment of new directions: "mean" is the mean over the old ones, which gives the
            first steps their usual size; "zero" is 0.
    """

    axis: Literal[0, 1]
    rank: int
    matrix: torch.Tensor | None = None
    fresh: torch.Tensor | None = None
    fill_second: Fill = "zero"

    def apply(self, state: torch.Tensor, *, second: bool, axis: int | None = None) -> torch.Tensor:
        """A first or `second` moment after the change, in its dtype.

        `state` has the parameter's shape, or is averaged over one axis; `axis` is its rank axis if not the parameter's.
        """
        axis = self.axis if axis is None else axis
        fill = state.mean(dim=axis, keepdim=True) if second and self.fill_second == "mean" else 0.0
        if self.matrix is None:
            shape, old = list(state.shape), state.shape[axis]
            shape[axis] = self.rank
            grown = state.new_empty(shape)
            grown.narrow(axis, 0, old).copy_(state)
            grown.narrow(axis, old, self.rank - old).copy_(torch.as_tensor(fill))
            return grown
        matrix = self.matrix.to(state.device, torch.float64 if state.dtype == torch.float64 else torch.float32)
        matrix = matrix.square() if second else matrix
        rows = state.to(matrix.dtype)
        mapped = matrix @ rows if axis == 0 else rows @ matrix.mT
        if self.fresh is not None and bool(self.fresh.any()):
            fresh = self.fresh.to(state.device)
            mapped = torch.where(fresh if axis or state.dim() == 1 else fresh[:, None], fill, mapped)
        return mapped.to(state.dtype)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedError if the optimiser's state cannot be carried through a change of rank."""
    layout_of(optimizer)


def state_bytes_of(optimizer: torch.optim.Optimizer | None, like: torch.Tensor) -> int:
    """Bytes of optimiser state for a parameter with the shape and dtype of `like`; None counts as AdamW."""
    if optimizer is None:
        return 2 * like.nbytes
    return layout_of(optimizer).bytes_of(unwrap_optimizer(optimizer), like)


def map_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, change: StateMap) -> None:
    """Map the optimiser's state of `parameter`; call before the parameter itself gets its new shape.

    Raises:
        UnsupportedError: the state holds a tensor of the parameter's shape that is not in the optimiser's layout.
    """
    if optimizer is None:
        return
    inner = unwrap_optimizer(optimizer)
    layout = layout_of(inner)
    state = inner.state.get(parameter, {})
    known = layout.moments.keys() | layout.factored.keys()
    for key, value in state.items():
        if key not in known and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            name = type(inner).__name__
            raise UnsupportedError(f"{name} keeps a state tensor {key!r} that cannot be mapped to a new rank.")
    for key, moment in layout.moments.items():
        if isinstance(state.get(key), torch.Tensor):  # SGD stores None before its first step
            mapped = change.apply(layout.form.read(parameter, state, key), second=moment == "second")
            layout.form.write(inner, parameter, state, key, mapped)
    _map_factored(layout, state, change)


_POWERS: dict[Moment, int] = {"first": 1, "second": 2, "direction": 0, "change": -1}
"""The power of the factor by which gradients grow, by which each moment grows."""


def scale_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, factor: float) -> None:
    """Let a parameter's state follow a division of the parameter by `factor`, by which its gradients grow."""
    if optimizer is None or factor == 1:
        return
    inner = unwrap_optimizer(optimizer)
    layout, state = layout_of(inner), inner.state.get(parameter, {})
    for key, moment in layout.moments.items():
        if isinstance(state.get(key), torch.Tensor) and _POWERS[moment]:
            scaled = layout.form.read(parameter, state, key) * factor ** _POWERS[moment]
            layout.form.write(inner, parameter, state, key, scaled)
    for key in layout.factored.keys() & state.keys():  # u and v stand for u v^T / mean(u)
        state[key] = state[key] * factor**2


def _map_factored(layout: StateLayout, state: dict[str, torch.Tensor], change: StateMap) -> None:
    """Map a second moment that is stored as two averages u and v, and stands for u v^T / mean(u)."""
    # A zero average would make the first steps of new directions huge.
    change = replace(change, fill_second="mean")
    for key, (parameter_axis, axis) in layout.factored.items():
        if parameter_axis != change.axis or key not in state:
            continue
        before, state[key] = state[key], change.apply(state[key], second=True, axis=axis)
        if change.matrix is not None:  # the other average is taken over the rank axis, so it changes in proportion
            other = next(name for name in layout.factored if name != key)
            ratio = state[key].mean() / before.mean()
            state[other] = torch.where(before.mean() > 0, state[other] * ratio, state[other])


def drop_foreign_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Delete the state of parameters that have other shapes than when it was made, as after a load of other ranks.

    torch's fused AdamW would read beyond its end without an error.
    """
    inner = unwrap_optimizer(optimizer)
    layout = layout_of(inner)
    for parameter in parameters:
        state, shape = inner.state.get(parameter, {}), parameter.shape
        moments = [state[key] for key in layout.moments if isinstance(state.get(key), torch.Tensor)]
        averages = [(state[key], axes) for key, axes in layout.factored.items() if key in state]
        fits = all(moment.shape == shape for moment in moments) and all(
            average.shape[axis] == shape[of] for average, (of, axis) in averages
        )
        if not fits:
            del inner.state[parameter]


def kept_state(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """A function that gives parameters back the state that they have now, after any changes of rank.

    Those replace its tensors and write into none; steps of the optimiser do write. Tensors as large as the parameter
    wait in main memory, so that a smaller plan frees their bytes on the device.
    """
    state = unwrap_optimizer(optimizer).state if optimizer is not None else {}
    before: dict[nn.Parameter, dict[str, tuple[Any, torch.device | None]] | None] = {}
    for parameter in parameters:
        values = state.get(parameter)
        before[parameter] = None if values is None else {k: _in_main_memory(v, parameter) for k, v in values.items()}

    def put_back() -> None:
        for parameter, values in before.items():
            state.pop(parameter, None)
            if values is not None:
                state[parameter] = {k: v if device is None else v.to(device) for k, (v, device) in values.items()}

    return put_back


def _in_main_memory(value: Any, parameter: nn.Parameter) -> tuple[Any, torch.device | None]:
    """A value of the state, and the device to which it belongs if it was moved from there."""
    if type(value) is torch.Tensor and value.numel() == parameter.numel():
        return value.cpu(), value.device
    return value, None


def reset_state(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Delete the optimiser's state of these parameters, so that they start as new ones."""
    if optimizer is not None:
        for parameter in parameters:
            unwrap_optimizer(optimizer).state.pop(parameter, None)
