"""Carries an optimiser's state through a change of rank.

The gradient of a re-factored pair is a linear map of the old one: with A' = Q A and B' = B P, the chain rule gives
g_A' = P^T g_A and g_B' = g_B Q^T on the remaining directions. First moments take the same map, second moments the
map with squared entries, and the step count stays. Where a parameter is divided by a number because its scaling grows
by it, gradients grow by it too (`scale_state`).

A table has the layout of each known optimiser: which tensors are first or second moments, and how they are stored. A
moment that is mapped wrongly would do harm without an error, so under any other optimiser a parameter of a new shape
begins with new state. Third-party optimisers are recognised by name, so none of them needs to be installed.
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

from ..errors import UnsupportedError

Moment = Literal["first", "second", "direction", "change"]
"""What a state tensor is: an average of gradients, of their squares, of gradients without their size (divided by the
root of their squares), or of changes of the parameter."""

State = dict[str, torch.Tensor]

LOW_BIT_BLOCK = 256
"""Number of values that share one scale in the 8-bit states of bitsandbytes."""


class StateForm:
    """The form in which an optimiser stores a moment: an ordinary tensor, if no subclass says otherwise."""

    def read(self, parameter: torch.Tensor, state: State, key: str) -> torch.Tensor:
        """Return the moment `state[key]` as an ordinary float tensor."""
        return state[key]

    def write(self, optimizer: Any, parameter: torch.Tensor, state: State, key: str, value: torch.Tensor) -> None:
        """Store a moment of a new shape in the form that the optimiser would give it."""
        state[key] = value.to(state[key].dtype)

    def size(self, optimizer: Any, like: torch.Tensor) -> int:
        """Bytes of one moment of a parameter with the shape and dtype of `like`."""
        return like.nbytes


class TorchaoForm(StateForm):
    """torchao's low-bit tensor subclasses; small tensors and those of odd size stay ordinary."""

    def read(self, parameter: torch.Tensor, state: State, key: str) -> torch.Tensor:
        """Return the dequantised moment."""
        moment = state[key]
        return moment if type(moment) is torch.Tensor else moment.dequantize()

    def write(self, optimizer: Any, parameter: torch.Tensor, state: State, key: str, value: torch.Tensor) -> None:
        """Quantise the moment as the optimiser does."""
        state[key] = optimizer._new_buffer(torch.empty_like(value, dtype=parameter.dtype), key == "exp_avg")
        state[key].copy_(value)

    def size(self, optimizer: Any, like: torch.Tensor) -> int:
        """Bytes of codes and scales, and of the table of codes, of which each moment has one."""
        with torch.device("cpu" if like.is_meta else like.device):  # the table of codes has contents
            moment = optimizer._new_buffer(torch.empty(like.shape, dtype=like.dtype), True)
        if type(moment) is torch.Tensor:
            return like.nbytes
        return sum(getattr(moment, name).nbytes for name in moment.__tensor_flatten__()[0])


class BitsandbytesForm(StateForm):
    """bitsandbytes' states: fp32, or 8-bit codes in blocks with one scale each.

    Paged states become ordinary ones at the first change of rank, as they do when bitsandbytes loads a checkpoint.
    """

    def read(self, parameter: torch.Tensor, state: State, key: str) -> torch.Tensor:
        """Return the dequantised moment on the parameter's device; paged states report the CPU as theirs."""
        from bitsandbytes.functional import dequantize_blockwise

        moment = state[key].to(parameter.device)
        if moment.dtype != torch.uint8:
            return moment
        number = key[-1]
        value: torch.Tensor = dequantize_blockwise(
            moment, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=LOW_BIT_BLOCK
        )
        return value

    def write(self, optimizer: Any, parameter: torch.Tensor, state: State, key: str, value: torch.Tensor) -> None:
        """Quantise the moment to 8 bits, or store fp32 if it is too small for the optimiser to use 8 bits."""
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
        """Bytes of codes and scales, or of fp32 values."""
        count = like.numel()
        return count + 4 * -(-count // LOW_BIT_BLOCK) if self._low_bit(optimizer, like, count) else 4 * count

    @staticmethod
    def _low_bit(optimizer: Any, parameter: torch.Tensor, count: int) -> bool:
        settings = vars(optimizer.args) | optimizer.mng.pid2config.get(id(parameter), {})
        return bool(settings["optim_bits"] == 8 and count >= settings["min_8bit_size"])


def _nearest_codes(value: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and block scales of block-wise quantisation (Dettmers et al., 2022, arXiv:2110.02861)."""
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
    """The state that an optimiser keeps for one parameter.

    Attributes:
        moments: by key of the state, the moment that a tensor of the parameter's shape is.
        factored: by key, second moments averaged over one axis (Shazeer and Stern, 2018, arXiv:1804.04235): the axis
            of the parameter that remains, and the axis of the state tensor that it became.
        form: the form in which `moments` are stored.
        count: number of moments under the optimiser's settings; all of `moments` by default.
    """

    moments: Mapping[str, Moment]
    factored: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    form: StateForm = field(default_factory=StateForm)
    count: Callable[[Mapping[str, Any]], int] | None = None

    def bytes_of(self, optimizer: Any, like: torch.Tensor) -> int:
        """Bytes of state for a parameter with the shape and dtype of `like`."""
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
    """The optimiser inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def layout_of(optimizer: torch.optim.Optimizer) -> StateLayout | None:
    """The layout of this optimiser's state; None if it is not known."""
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
    """Whether a class defines `step` itself. Torch puts a wrapped copy of an inherited `step` into every class."""
    step = vars(kind).get("step")
    return step is not None and bool(inspect.unwrap(step).__qualname__ == f"{kind.__qualname__}.step")


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
    """Raise UnsupportedError if the optimiser can neither carry state through a change of rank nor begin with none."""
    inner = unwrap_optimizer(optimizer)
    device = next(parameter.device for group in inner.param_groups for parameter in group["params"])
    if layout_of(inner) is None and _after_a_step(inner, torch.empty(4, 4, device=device)) is None:
        raise UnsupportedError(
            f"{type(inner).__name__} cannot step on a parameter that it has no state of, as one has after a change of "
            "rank. Use another optimizer, such as AdamW (optim='adamw_torch')."
        )


def state_bytes_of(optimizer: torch.optim.Optimizer | None, like: torch.Tensor) -> int:
    """Bytes of optimiser state for a parameter with the shape and dtype of `like`; None counts as AdamW."""
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
"""Bytes of state that optimisers of unknown layout have made, by the shape and dtype of the parameter."""


def _after_a_step(optimizer: torch.optim.Optimizer, like: torch.Tensor) -> int | None:
    """Bytes of state after a step of a copy of this optimiser that has one new parameter; None if it cannot step.

    One that holds another optimiser, which the copy would step, or that ends what it holds outside of Python, has none.
    """
    held = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    if held or hasattr(type(optimizer), "__del__"):
        return None
    for device in ("meta", "cpu", like.device):  # on the meta device nothing is computed, and some read numbers
        parameter = nn.Parameter(torch.ones(like.shape, dtype=like.dtype, device=device))
        parameter.grad = torch.ones_like(parameter)
        probe = object.__new__(type(optimizer))
        groups = [{**optimizer.param_groups[0], "params": [parameter]}]
        vars(probe).update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(optimizer).items()})
        vars(probe).update(state=defaultdict(dict), param_groups=groups)
        vars(probe).update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
        try:  # methods of the class: those of the object may be a scheduler's, which step the original
            getattr(type(optimizer), "train", id)(probe)  # of schedule-free ones
            type(optimizer).step(probe)
        except Exception:  # whatever the step of a stranger raises
            continue
        tensors = [t for t in tree_leaves(dict(probe.state[parameter])) if isinstance(t, torch.Tensor) and t.dim()]
        return sum(tensor.nbytes for tensor in tensors)
    return None


def last_direction(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """Where the last step of one of Adam's kin came from: its mean gradient over its root mean square.

    The step went the opposite way, by the learning rate. None before a first step, and of optimizers without both.
    """
    inner = unwrap_optimizer(optimizer)
    layout, state = _find(inner), inner.state.get(parameter)
    keys = {kind: key for key, kind in layout.moments.items() if state and key in state} if layout else {}
    if not state or layout is None or not {"first", "second"} <= keys.keys():
        return None
    first, second = (layout.form.read(parameter, state, keys[kind]).float() for kind in ("first", "second"))
    return first / (second.sqrt() + 1e-8)


def map_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, change: StateMap) -> None:
    """Map the optimiser's state of `parameter`; call before the parameter itself gets its new shape.

    State that holds a tensor of the parameter's shape which is in no layout is deleted, so that it begins as new.
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
"""The power of the factor by which gradients grow, by which each moment grows."""


def scale_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, factor: float) -> None:
    """Let a parameter's state follow a division of the parameter by `factor`, by which its gradients grow."""
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
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        moments = [v for k, v in tensors.items() if (k in layout.moments if layout else v.dim() == len(shape))]
        averages = [(state[key], axes) for key, axes in (layout.factored if layout else {}).items() if key in state]
        fits = all(moment.shape == shape for moment in moments) and all(
            average.shape[axis] == shape[of] for average, (of, axis) in averages
        )
        if not fits:
            del inner.state[parameter]


class OptimizerSnapshot:
    """The state that parameters have now, which can be given back to them after any changes of rank.

    Tensors as large as the parameter wait in main memory, so that a smaller plan frees their bytes on the device.

    Args:
        optimizer: whose state it is; None for none.
        parameters: whose state is kept.
        steps: whether the optimizer steps in between, which writes into its state; changes of rank replace tensors.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter], *, steps: bool = False
    ) -> None:
        self._state: Any = unwrap_optimizer(optimizer).state if optimizer is not None else {}
        self._before: dict[nn.Parameter, dict[str, tuple[Any, torch.device | None]] | None] = {}
        for parameter in parameters:
            values = self._state.get(parameter)
            self._before[parameter] = (
                None if values is None else {k: _in_main_memory(v, parameter, steps) for k, v in values.items()}
            )

    def put_back(self) -> None:
        """Give it back; this can be done once."""
        for parameter, values in self._before.items():
            self._state.pop(parameter, None)
            if values is not None:
                self._state[parameter] = {k: v if at is None else v.to(at) for k, (v, at) in values.items()}

    def state_dict(self) -> dict[str, Any] | None:
        """What `load_state_dict` needs, as tensors and JSON values; None where the optimizer keeps something else."""
        every: dict[str, dict[str, Any] | None] = {
            str(i): None if values is None else {k: v for k, (v, _) in values.items()}
            for i, values in enumerate(self._before.values())
        }
        plain: tuple[type[Any], ...] = (torch.Tensor, int, float, type(None))
        return every if all(type(v) in plain for values in every.values() for v in (values or {}).values()) else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what `state_dict` told instead, on the devices on which such state lies now."""
        for index, (parameter, now) in enumerate(self._before.items()):
            values = state[str(index)]
            places = {k: at or getattr(v, "device", None) for k, (v, at) in (now or {}).items()}
            self._before[parameter] = values and {
                k: (v, places.get(k) if isinstance(v, torch.Tensor) else None) for k, v in values.items()
            }


def _in_main_memory(value: Any, parameter: nn.Parameter, copies: bool) -> tuple[Any, torch.device | None]:
    """A value of the state, and the device to which it belongs if it was moved from there."""
    if type(value) is torch.Tensor and value.numel() == parameter.numel():
        paged = getattr(value, "is_paged", False)  # bitsandbytes' memory of both, which says that it is the CPU's
        return value.to("cpu", copy=copies), parameter.device if paged else value.device
    return copy.deepcopy(value) if copies else value, None


def reset_state(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Delete the optimiser's state of these parameters, so that they start as new ones."""
    if optimizer is not None:
        for parameter in parameters:
            unwrap_optimizer(optimizer).state.pop(parameter, None)
