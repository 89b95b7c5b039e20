"""The state of each supported optimiser: which tensors are first or second moments, and how they are stored.

An optimiser that is not in the table is refused, because a moment that is mapped wrongly would do harm without an
error. Third-party optimisers are recognised by name, so none of them needs to be installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

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
        moment = optimizer._new_buffer(like, True)
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

_SUPPORTED = (
    "AdamW, Adam, NAdam, RMSprop, SGD and Adafactor of torch.optim, Adafactor of transformers, AdamW, Adam, Lion, SGD "
    "and RMSprop of bitsandbytes (8-bit, 32-bit, paged), AdamW and Adam of torchao.optim (8-bit, 4-bit, fp8), and "
    "lion_pytorch.Lion; in TrainingArguments for example optim='adamw_torch', 'adamw_bnb_8bit' or 'adafactor'"
)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def layout_of(optimizer: torch.optim.Optimizer) -> StateLayout:
    """The layout of this optimiser's state.

    Raises:
        UnsupportedError: the optimiser or one of its settings is not supported; the message lists what is.
    """
    inner = unwrap_optimizer(optimizer)
    layout = _find(inner)
    if layout is None:
        kind = type(inner)
        raise UnsupportedError(
            f"The state of {kind.__module__}.{kind.__name__} cannot be carried through a change of rank: "
            f"{_reason(inner)}. Supported: {_SUPPORTED}."
        )
    if isinstance(inner, torch.optim.RMSprop) and any(group["centered"] for group in inner.param_groups):
        # Its variance is a difference of the two moments, which could become negative after the map.
        raise UnsupportedError("RMSprop(centered=True) cannot be carried through a change of rank. Use centered=False.")
    return layout


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


def _reason(optimizer: torch.optim.Optimizer) -> str:
    name = type(optimizer).__name__
    if "ScheduleFree" in name:
        return "it keeps an average of past weights, which belongs to the old factors"
    if "Muon" in name:
        return "its updates mix the directions of a factor, so new ones would change the old ones"
    return "its layout is not known"
