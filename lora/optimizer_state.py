"""Carry optimizer state through a change of rank.

The gradient of a re-factored pair is a linear map of the old one: with A' = Q A and B' = B P, the chain rule gives g_A'
= P^T g_A and g_B' = g_B Q^T on the remaining directions. First moments follow the same map, second moments the map with
squared entries, and the step count stays. Where a growing scaling divides a parameter by a factor, its gradients grow
by that factor too (`scale_state`).

A table holds the layout of each known optimizer: its first and second moments, and their storage. A wrongly mapped
moment would cause silent harm, so parameters of a new shape start with new state under any other optimizer. Third-party
optimizers are recognised by name, so they need not be installed.
"""

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..common.errors import UnsupportedError

Moment = Literal["first", "second", "direction", "change"]
"""Meaning of a state tensor: an average of gradients, of their squares, of normalised gradients (divided by the root of
their squares), or of parameter changes.
"""

State = dict[str, torch.Tensor]

LOW_BIT_BLOCK = 256
"""Number of values per scale in bitsandbytes' 8-bit states."""


class StateForm:
    """Storage of a moment in an optimizer: an ordinary tensor, unless a subclass differs."""

    def read(self, parameter: torch.Tensor, state: State, key: str) -> torch.Tensor:
        """Return the moment `state[key]` as an ordinary float tensor."""
        return state[key]

    def write(self, optimizer: Any, parameter: torch.Tensor, state: State, key: str, value: torch.Tensor) -> None:
        """Store a moment of a new shape in the optimizer's own format."""
        state[key] = value.to(state[key].dtype)

    def size(self, optimizer: Any, like: torch.Tensor) -> int:
        """Return the bytes of one moment of a parameter with the shape and dtype of `like`."""
        return like.nbytes


class TorchaoForm(StateForm):
    """torchao's low-bit tensor subclasses; small tensors and those of odd size stay ordinary."""

    def read(self, parameter: torch.Tensor, state: State, key: str) -> torch.Tensor:
        """Return the dequantised moment."""
        moment = state[key]
        return moment if type(moment) is torch.Tensor else moment.dequantize()

    def write(self, optimizer: Any, parameter: torch.Tensor, state: State, key: str, value: torch.Tensor) -> None:
        """Quantise the moment as the optimizer does."""
        state[key] = optimizer._new_buffer(torch.empty_like(value, dtype=parameter.dtype), key == "exp_avg")
        state[key].copy_(value)

    def size(self, optimizer: Any, like: torch.Tensor) -> int:
        """Return the bytes of codes, scales, and the code table of each moment."""
        with torch.device("cpu" if like.is_meta else like.device):  # the code table has contents
            moment = optimizer._new_buffer(torch.empty(like.shape, dtype=like.dtype), True)
        if type(moment) is torch.Tensor:
            return like.nbytes
        return sum(getattr(moment, name).nbytes for name in moment.__tensor_flatten__()[0])


class BitsandbytesForm(StateForm):
    """bitsandbytes' states: fp32, or 8-bit codes in blocks with one scale each.

    Paged states become ordinary at the first change of rank, as when bitsandbytes loads a checkpoint.
    """

    def read(self, parameter: torch.Tensor, state: State, key: str) -> torch.Tensor:
        """Return the dequantised moment on the parameter's device; paged states claim to be on the CPU."""
        from bitsandbytes.functional import dequantize_blockwise

        moment = state[key].to(parameter.device)
        if moment.dtype != torch.uint8:
            return moment
        scales, codes = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
        value: torch.Tensor = dequantize_blockwise(moment, absmax=scales, code=codes, blocksize=LOW_BIT_BLOCK)
        return value

    def write(self, optimizer: Any, parameter: torch.Tensor, state: State, key: str, value: torch.Tensor) -> None:
        """Quantise the moment to 8 bits, or store fp32 if it is below the optimizer's 8-bit threshold."""
        paged = optimizer.page_mng.paged_tensors
        paged[:] = [tensor for tensor in paged if tensor is not state[key]]
        scales, codes = f"absmax{key[-1]}", f"qmap{key[-1]}"
        if not self._low_bit(optimizer, parameter, value.numel()):
            state[key] = value.float()
            state.pop(scales, None)
            state.pop(codes, None)
            return
        if "dynamic" not in optimizer.name2qmap:
            optimizer.fill_qmap()
        state[codes] = optimizer.name2qmap["udynamic" if key == "state2" else "dynamic"].to(value.device)
        state[key], state[scales] = _nearest_codes(value.float(), state[codes])

    def size(self, optimizer: Any, like: torch.Tensor) -> int:
        """Return the bytes of codes and scales, or of fp32 values."""
        count = like.numel()
        return count + 4 * -(-count // LOW_BIT_BLOCK) if self._low_bit(optimizer, like, count) else 4 * count

    @staticmethod
    def _low_bit(optimizer: Any, parameter: torch.Tensor, count: int) -> bool:
        settings = vars(optimizer.args) | optimizer.mng.pid2config.get(id(parameter), {})
        return bool(settings["optim_bits"] == 8 and count >= settings["min_8bit_size"])


def _nearest_codes(value: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (uint8) and scales of block-wise quantisation (Dettmers et al., 2022, arXiv:2110.02861)."""
    # The library's CPU kernel turns an exact 0 into a small number, but the state of a new direction must be 0.
    blocks = nn.functional.pad(value.flatten(), (0, -value.numel() % LOW_BIT_BLOCK)).view(-1, LOW_BIT_BLOCK)
    scales = blocks.amax(dim=1).clamp_min(0)
    if code[0] < 0:  # signed codes end at -0.993: a negative extreme would shrink at each quantisation
        scales = torch.maximum(scales, blocks.amin(dim=1) / code[0])
    middles = (code[1:] + code[:-1]) / 2
    relative = blocks / scales[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(relative, middles).to(torch.uint8)
    return codes.flatten()[: value.numel()].view(value.shape), scales


@dataclass(frozen=True)
class StateLayout:
    """The optimizer state of one parameter.

    Attributes:
        moments: the kind of moment in each tensor of the parameter's shape, by state key.
        factored: second moments averaged over one axis, by key (Shazeer and Stern, 2018, arXiv:1804.04235): the
            remaining axis of the parameter, and its axis in the state tensor.
        form: storage format of `moments`.
        count: number of moments under the optimizer's settings; all of `moments` by default.
    """

    moments: Mapping[str, Moment]
    factored: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    form: StateForm = field(default_factory=StateForm)
    count: Callable[[Mapping[str, Any]], int] | None = None

    def bytes_of(self, optimizer: Any, like: torch.Tensor) -> int:
        """Return the bytes of state for a parameter with the shape and dtype of `like`."""
        count = self.count(optimizer.defaults) if self.count else len(self.moments)
        if not self.factored or like.dim() < 2:
            return count * self.form.size(optimizer, like)
        averages = sum(like.shape[axis] for axis, _ in self.factored.values()) * like.element_size()
        return (count - 1) * self.form.size(optimizer, like) + averages


_ADAM: dict[str, Moment] = {"exp_avg": "first", "exp_avg_sq": "second", "max_exp_avg_sq": "second"}


def _adam_count(settings: Mapping[str, Any]) -> int:
    return 2 + bool(settings.get("amsgrad"))


_LAYOUTS = {
    **dict.fromkeys(("torch.Adam", "torch.AdamW", "torch.NAdam"), StateLayout(_ADAM, count=_adam_count)),
    "torch.RMSprop": StateLayout(
        {"square_avg": "second", "momentum_buffer": "direction"}, count=lambda settings: 1 + (settings["momentum"] != 0)
    ),
    "torch.SGD": StateLayout({"momentum_buffer": "first"}, count=lambda settings: int(settings["momentum"] != 0)),
    "torch.Adafactor": StateLayout({"variance": "second"}, {"row_var": (0, 0), "col_var": (1, 1)}),
    "transformers.Adafactor": StateLayout(
        {"exp_avg": "change", "exp_avg_sq": "second"},
        {"exp_avg_sq_row": (0, 0), "exp_avg_sq_col": (1, 0)},
        count=lambda settings: 1 + (settings["beta1"] is not None),
    ),
    "lion_pytorch.Lion": StateLayout({"exp_avg": "first"}),
    "torchao._AdamBase": StateLayout(_ADAM, form=TorchaoForm(), count=_adam_count),
}
_BITSANDBYTES: dict[str, dict[str, Moment]] = {
    "adam": {"state1": "first", "state2": "second"},
    "lion": {"state1": "first"},
    "momentum": {"state1": "first"},
    "rmsprop": {"state1": "second"},
}


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def layout_of(optimizer: torch.optim.Optimizer) -> StateLayout | None:
    """Return the layout of this optimizer's state; None if unknown."""
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, torch.optim.RMSprop) and any(group["centered"] for group in inner.param_groups):
        return None  # its variance is a difference of two moments, which the map could make negative
    return _find(inner)


def _find(optimizer: torch.optim.Optimizer) -> StateLayout | None:
    for kind in type(optimizer).__mro__:
        name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        if name in ("bitsandbytes.Optimizer1State", "bitsandbytes.Optimizer2State"):
            moments = _BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""))
            return StateLayout(moments, form=BitsandbytesForm()) if moments else None
        if name in _LAYOUTS:
            return _LAYOUTS[name]
        if _defines_step(kind):  # a subclass with another update rule may keep other state
            return None
    return None


def _defines_step(kind: type) -> bool:
    """True if a class defines `step` itself. Torch wraps an inherited `step` into every class."""
    step = vars(kind).get("step")
    return step is not None and bool(inspect.unwrap(step).__qualname__ == f"{kind.__qualname__}.step")


Fill = Literal["zero", "mean"]


@dataclass(frozen=True, eq=False)
class StateMap:
    """The change of the rank axis in a parameter's state.

    Attributes:
        axis: the parameter's rank axis, 0 for A and 1 for B.
        rank: the new rank.
        matrix: the map, shape (rank, old rank); None keeps all old directions and appends new ones.
        fresh: directions that restart in place of negligible ones, bool (rank,); None if there are none.
        fill_second: initial second moment of new directions: "mean" is the mean over the old ones, which keeps the
            first steps at their usual size; "zero" is 0.
    """

    axis: Literal[0, 1]
    rank: int
    matrix: torch.Tensor | None = None
    fresh: torch.Tensor | None = None
    fill_second: Fill = "zero"

    def apply(self, state: torch.Tensor, *, second: bool, axis: int | None = None) -> torch.Tensor:
        """Return a first or `second` moment after the change, in its dtype.

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
    """Raise UnsupportedError if the optimizer can neither carry state through a rank change nor start without it."""
    inner = unwrap_optimizer(optimizer)
    device = next(parameter.device for group in inner.param_groups for parameter in group["params"])
    if layout_of(inner) is None and _after_a_step(inner, torch.empty(4, 4, device=device)) is None:
        raise UnsupportedError(
            f"{type(inner).__name__} cannot step on a parameter without state, such as one whose rank has "
            "changed. Use another optimizer, such as AdamW (optim='adamw_torch')."
        )


def state_bytes_of(optimizer: torch.optim.Optimizer | None, like: torch.Tensor) -> int:
    """Return the bytes of state for a parameter with the shape and dtype of `like`; None counts as AdamW."""
    if optimizer is None:
        return 2 * like.nbytes
    inner, layout = unwrap_optimizer(optimizer), layout_of(optimizer)
    if layout is not None:
        return layout.bytes_of(inner, like)
    measured, key = _MEASURED.setdefault(inner, {}), (like.shape, like.dtype)
    if key not in measured:
        found = _after_a_step(inner, like)
        measured[key] = 2 * like.nbytes if found is None else found
    return measured[key]


_MEASURED: WeakKeyDictionary[torch.optim.Optimizer, dict[Any, int]] = WeakKeyDictionary()
"""Measured bytes of state of optimizers with unknown layout, by the parameter's shape and dtype."""


def _after_a_step(optimizer: torch.optim.Optimizer, like: torch.Tensor) -> int | None:
    """Return the bytes of state after a step of a copy of this optimizer on one new parameter; None if it fails.

    Also None if it wraps another optimizer, which the copy would step, or resources outside Python.
    """
    held = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    if held or hasattr(type(optimizer), "__del__"):
        return None
    for device in ("meta", "cpu", like.device):  # the meta device computes nothing, but some optimizers read values
        parameter = nn.Parameter(torch.ones(like.shape, dtype=like.dtype, device=device))
        parameter.grad = torch.ones_like(parameter)
        probe = object.__new__(type(optimizer))
        groups = [{**optimizer.param_groups[0], "params": [parameter]}]
        vars(probe).update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(optimizer).items()})
        vars(probe).update(state=defaultdict(dict), param_groups=groups)
        vars(probe).update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
        try:  # methods of the class: a scheduler may have patched the instance's, which step the original
            getattr(type(optimizer), "train", id)(probe)  # of schedule-free optimizers
            type(optimizer).step(probe)
        except Exception:  # any error of a third-party step
            continue
        tensors = [t for t in tree_leaves(dict(probe.state[parameter])) if isinstance(t, torch.Tensor) and t.dim()]
        return sum(tensor.nbytes for tensor in tensors)
    return None


def last_direction(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the direction of an Adam-like optimizer's last step: mean gradient over root mean square.

    The step was the negative direction times the learning rate. None before a first step, and for other optimizers.
    """
    inner = unwrap_optimizer(optimizer)
    layout, state = _find(inner), inner.state.get(parameter)
    keys = {kind: key for key, kind in layout.moments.items() if state and key in state} if layout else {}
    if not state or layout is None or not {"first", "second"} <= keys.keys():
        return None
    first, second = (layout.form.read(parameter, state, keys[kind]).float() for kind in ("first", "second"))
    return first / (second.sqrt() + 1e-8)


def map_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, change: StateMap) -> None:
    """Map the optimizer state of `parameter`; call before the parameter itself gets its new shape.

    State is deleted, and starts anew, if it contains a tensor of the parameter's shape outside any layout.
    """
    if optimizer is None:
        return
    inner = unwrap_optimizer(optimizer)
    layout, state = layout_of(inner), inner.state.get(parameter, {})
    known = layout.moments.keys() | layout.factored.keys() if layout else set()
    shaped = {key for key, value in state.items() if getattr(value, "shape", None) == parameter.shape}
    if layout is None or not shaped <= known:
        reset_state(inner, [parameter])
        return
    for key, moment in layout.moments.items():
        if isinstance(state.get(key), torch.Tensor):  # SGD stores None before its first step
            mapped = change.apply(layout.form.read(parameter, state, key), second=moment == "second")
            layout.form.write(inner, parameter, state, key, mapped)
    _map_factored(layout, state, change)


_POWERS: dict[Moment, int] = {"first": 1, "second": 2, "direction": 0, "change": -1}
"""Power with which each moment scales if gradients grow by a factor."""


def scale_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, factor: float) -> None:
    """Adjust a parameter's state after division of the parameter by `factor`, which scales up its gradients."""
    if optimizer is None or factor == 1:
        return
    inner = unwrap_optimizer(optimizer)
    layout, state = layout_of(inner), inner.state.get(parameter, {})
    if layout is None:
        reset_state(inner, [parameter])
        return
    for key, moment in layout.moments.items():
        if isinstance(state.get(key), torch.Tensor) and _POWERS[moment]:
            scaled = layout.form.read(parameter, state, key) * factor ** _POWERS[moment]
            layout.form.write(inner, parameter, state, key, scaled)
    for key in layout.factored.keys() & state.keys():  # u and v represent u v^T / mean(u)
        state[key] = state[key] * factor**2


def _map_factored(layout: StateLayout, state: dict[str, torch.Tensor], change: StateMap) -> None:
    """Map a factored second moment, stored as two averages u and v that represent u v^T / mean(u)."""
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
    """Delete the state of parameters whose shape has changed since, as after loading other ranks.

    torch's fused AdamW would silently read out of bounds.
    """
    inner = unwrap_optimizer(optimizer)
    layout = layout_of(inner)
    for parameter in parameters:
        state, shape = inner.state.get(parameter, {}), parameter.shape
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        moments = [v for k, v in tensors.items() if (k in layout.moments if layout else v.dim() == len(shape))]
        averages = [(state[key], axes) for key, axes in (layout.factored if layout else {}).items() if key in state]
        whole = all(moment.shape == shape for moment in moments)
        if not whole or any(average.shape[axis] != shape[of] for average, (of, axis) in averages):
            del inner.state[parameter]


class OptimizerSnapshot:
    """A snapshot of optimizer state, restorable after any changes of rank.

    Tensors as large as the parameter move to main memory, so a smaller plan frees their bytes on the device.

    Args:
        optimizer: the optimizer with the state; None for none.
        parameters: parameters whose state is kept.
        steps: whether the optimizer steps in between, modifying its state in place; changes of rank replace tensors.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter], *, steps: bool = False
    ) -> None:
        self._state: Any = unwrap_optimizer(optimizer).state if optimizer is not None else {}
        self._before: dict[nn.Parameter, dict[str, tuple[Any, torch.device | None]] | None] = {}
        for parameter in parameters:
            values = self._state.get(parameter)
            kept = {k: _in_main_memory(v, parameter, steps) for k, v in (values or {}).items()}
            self._before[parameter] = None if values is None else kept

    def put_back(self) -> None:
        """Restore the state; works once."""
        for parameter, values in self._before.items():
            self._state.pop(parameter, None)
            if values is not None:
                self._state[parameter] = {k: v if at is None else v.to(at) for k, (v, at) in values.items()}

    def state_dict(self) -> dict[str, Any] | None:
        """Return what `load_state_dict` needs, as tensors and JSON values; None if the state holds anything else."""
        every: dict[str, dict[str, Any] | None] = {
            str(i): None if values is None else {k: v for k, (v, _) in values.items()}
            for i, values in enumerate(self._before.values())
        }
        plain: tuple[type[Any], ...] = (torch.Tensor, int, float, type(None))
        return every if all(type(v) in plain for values in every.values() for v in (values or {}).values()) else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the snapshot by that of `state_dict`, on the devices that hold such state now."""
        for index, (parameter, now) in enumerate(self._before.items()):
            values = state[str(index)]
            places = {k: at or getattr(v, "device", None) for k, (v, at) in (now or {}).items()}
            self._before[parameter] = values and {
                k: (v, places.get(k) if isinstance(v, torch.Tensor) else None) for k, v in values.items()
            }


def _in_main_memory(value: Any, parameter: nn.Parameter, copies: bool) -> tuple[Any, torch.device | None]:
    """Return a state value in main memory, and its original device if it was moved."""
    if type(value) is torch.Tensor and value.numel() == parameter.numel():
        paged = getattr(value, "is_paged", False)  # bitsandbytes' unified memory, which claims to be on the CPU
        return value.to("cpu", copy=copies), parameter.device if paged else value.device
    return copy.deepcopy(value) if copies else value, None


def reset_state(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Delete the optimizer state of these parameters, so they start as new ones."""
    if optimizer is not None:
        for parameter in parameters:
            unwrap_optimizer(optimizer).state.pop(parameter, None)
