"""What an adapter and its optimizer hold between steps: weights, gradients, optimizer state, signal buffers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from ..common.arrays import FloatArray
from ..lora.adapters import signal_buffer_bytes
from ..lora.optimizer_state import state_bytes_of, unwrap_optimizer
from ..lora.spec import RankLadder
from ..lora.targets import TargetModule
from .live_storages import device_kind, storages


@dataclass(frozen=True, eq=False)
class ModelStates:
    """What an adapter and its optimizer hold between steps.

    Attributes:
        weights: bytes of one rank's weights on each module, (modules,); its gradients take as much.
        optimizer: bytes of one rank's optimizer state on each module, (modules,).
        scratch: bytes of one rank that the optimizer takes for the time of its step, (modules,).
        signals: bytes of one rank that `SignalMeter` holds on each module, (modules,).
        fixed: bytes of an adapted module that do not depend on its rank: gradients and state of biases and magnitudes,
            (modules,).
        others: bytes of weights and state of everything else that trains, such as a classifier.
        other_gradients: bytes of its gradients, and of what the optimizer takes beside them for the time of its step.
        buckets: bytes of one rank's further copies of its gradients, which are sent to other processes, (modules,).
            Those of biases and magnitudes are in `fixed`, those of everything else in `others`.
    """

    weights: FloatArray
    optimizer: FloatArray
    scratch: FloatArray
    signals: FloatArray
    fixed: FloatArray
    others: float
    other_gradients: float
    buckets: FloatArray = field(default_factory=lambda: np.zeros(1))

    @property
    def between_steps(self) -> FloatArray:
        """Bytes of one rank on each module that are there all the time, (modules,)."""
        held: FloatArray = self.weights + self.optimizer + self.signals + self.buckets
        return held


def with_buckets(states: ModelStates, model: nn.Module, targets: Sequence[TargetModule], copies: float) -> ModelStates:
    """The same states, where all gradients are held so many times more, in buckets that are sent to other processes."""
    adapter = {id(p) for target in targets for p in target.parameters.values()}
    others = sum(p.nbytes for p in model.parameters() if p.requires_grad and id(p) not in adapter)
    unranked = [sum(p.nbytes for p in (t.bias, t.magnitude) if p is not None) for t in targets]
    return replace(
        states,
        buckets=np.ceil(copies * states.weights),
        fixed=states.fixed + np.ceil(copies * np.array(unranked, dtype=np.float64)),
        others=states.others + float(np.ceil(copies * others)),
    )


def model_states(
    model: nn.Module, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None, signal_bytes: bool
) -> ModelStates:
    """The bytes that adapters and their optimizer hold between steps; without one, AdamW's two tensors count."""
    weights = np.array(
        [t.d_in * t.weight_a.element_size() + t.d_out * t.weight_b.element_size() for t in targets], dtype=np.float64
    )
    states = [_state_line(target, optimizer) for target in targets]
    adapter = {id(p) for target in targets for p in target.parameters.values()}
    others = [p.detach() for p in trained_by(model, optimizer) if id(p) not in adapter]
    unranked = [[p for p in (t.bias, t.magnitude) if p is not None] for t in targets]
    sizes = [p.nbytes for p in others]
    copies = _steps_with_copies(optimizer, model)
    fused = optimizer is None or unwrap_optimizer(optimizer).defaults.get("fused")
    # An optimizer that takes one parameter at a time makes up to three temporary copies of it.
    copied = sum(sizes) if copies else 0 if fused else 3 * max(sizes, default=0)
    fixed = [sum(p.nbytes + state_bytes_of(optimizer, p.detach()) for p in group) for group in unranked]
    outside = sum(p.nbytes + state_bytes_of(optimizer, p) for p in others) + sum(p.nbytes for g in unranked for p in g)
    return ModelStates(
        weights=weights,
        optimizer=np.array([slope for slope, _ in states]),
        scratch=weights * copies,
        signals=signal_buffer_bytes(targets) * signal_bytes,
        fixed=np.array([size + start for size, (_, start) in zip(fixed, states, strict=True)], dtype=np.float64),
        others=float(outside),
        other_gradients=float(sum(sizes) + copied),
    )


def _state_line(target: TargetModule, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """Bytes of optimizer state as a straight line over the rank, nowhere below the true size: slope and start."""
    # Most states grow along such a line. Factored ones start above zero, and small 8-bit states are fp32.
    ranks = [rank for rank in RankLadder().ranks if 0 < rank <= target.max_rank]
    factors = [target.zeros(rank) for rank in ranks]
    sizes = [sum(state_bytes_of(optimizer, factor) for factor in pair) for pair in factors]
    slope = -(-sizes[-1] // ranks[-1])
    if len(ranks) > 1:
        slope = -((sizes[-2] - sizes[-1]) // (ranks[-1] - ranks[-2]))
    start = max(size - slope * rank for size, rank in zip(sizes, ranks, strict=True))
    return float(slope), float(max(start, 0))


def excess_of_state(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None) -> float:
    """Bytes of optimizer state that `model_states` counts at the present ranks and that are not there.

    States are counted along a straight line that is nowhere too low. Low-bit ones do not grow along a line: those of
    fewer than 4096 values are fp32.

    Args:
        targets: the target modules; those at rank 0 have no state.
        optimizer: whose state counts; None for AdamW's two tensors.
    """
    excess = 0.0
    for target in targets:
        if target.rank:
            slope, start = _state_line(target, optimizer)
            pair = target.weight_a.detach(), target.weight_b.detach()
            excess += slope * target.rank + start - sum(state_bytes_of(optimizer, factor) for factor in pair)
    return excess


def _steps_with_copies(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> bool:
    """Whether the optimizer works on all parameters at once, with a temporary copy of each."""
    settings = unwrap_optimizer(optimizer).defaults if optimizer else {}
    if "foreach" not in settings or settings.get("fused"):
        return False
    foreach = settings["foreach"]
    return bool(device_kind(next(model.parameters())) == "cuda" if foreach is None else foreach)


def trained_by(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """The parameters that train.

    Args:
        model: those of its parameters count that require gradients.
        optimizer: what it trains beside them counts as well, such as a head that the loss applies; None for nothing.
    """
    inside = list(model.parameters())
    return [p for p in inside if p.requires_grad] + _outside(inside, optimizer)


def trained_outside(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """The parameters that an optimizer trains beside those of a model, such as of a head that the loss applies."""
    return _outside(list(model.parameters()), optimizer)


def _outside(inside: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    known = set(map(id, inside))
    groups = unwrap_optimizer(optimizer).param_groups if optimizer else []
    return [p for group in groups for p in group["params"] if p.requires_grad and id(p) not in known]


def gradients_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """The gradients that are allocated, of the parameters that train."""
    return [parameter.grad for parameter in trained_by(model, optimizer) if parameter.grad is not None]


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None, *, gradients: bool = True) -> int:
    """Bytes that training holds between steps beside the frozen model: weights, optimizer state and gradients.

    Args:
        model: the PEFT model.
        optimizer: whose state counts; None counts no state.
        gradients: count a gradient for each parameter that trains, even if it is not allocated at this moment;
            otherwise only allocated gradients count.
    """
    total, held = 0, dict[int, int]()
    state = unwrap_optimizer(optimizer).state if optimizer else {}
    for parameter in trained_by(model, optimizer):
        size = parameter.untyped_storage().nbytes()
        tensors = [v for v in state.get(parameter, {}).values() if isinstance(v, torch.Tensor) and v.dim()]
        # Tables of bitsandbytes' codes are shared.
        held |= {storage._cdata: storage.nbytes() for storage in storages(tensors)}
        total += size
        if gradients or parameter.grad is not None:
            total += size
    return total + sum(held.values())
