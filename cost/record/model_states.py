"""State of a model between steps: frozen weights, adapters, their gradients and optimizer state."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import nn

from ...lora.adapters import signal_buffer_bytes
from ...lora.optimizer_state import state_bytes_of, unwrap_optimizer
from ...lora.spec import RankLadder
from ...lora.targets import TargetModule, scale_tensors
from ..model import ModelStates
from .live_storages import device_kind, storages


def model_states(
    model: nn.Module, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None, signal_bytes: bool
) -> ModelStates:
    """Return the bytes held by adapters and their optimizer between steps; None means AdamW's two tensors."""
    weights = np.array(
        [t.d_in * t.weight_a.element_size() + t.d_out * t.weight_b.element_size() for t in targets], dtype=np.float64
    )
    states = [_state_line(target, optimizer) for target in targets]
    adapter = {id(p) for target in targets for p in target.parameters.values()}
    others = [p.detach() for p in trained_by(model, optimizer) if id(p) not in adapter]
    unranked = [[p for p in (t.bias, t.magnitude) if p is not None] for t in targets]
    inside = sum(p.nbytes for p in model.parameters() if p.requires_grad and id(p) not in adapter)
    sizes = [p.nbytes for p in others]
    copies = _steps_with_copies(optimizer, model)
    fused = optimizer is None or unwrap_optimizer(optimizer).defaults.get("fused")
    # An optimizer that updates one parameter at a time makes up to three temporary copies of it.
    copied = sum(sizes) if copies else 0 if fused else 3 * max(sizes, default=0)
    fixed = [sum(p.nbytes + state_bytes_of(optimizer, p.detach()) for p in group) for group in unranked]
    outside = sum(p.nbytes + state_bytes_of(optimizer, p) for p in others) + sum(p.nbytes for g in unranked for p in g)
    return ModelStates(
        weights=weights,
        unranked=np.array([sum(p.nbytes for p in group) for group in unranked], dtype=np.float64),
        other_weights=float(inside),
        optimizer=np.array([slope for slope, _ in states]),
        scratch=weights * copies,
        signals=signal_buffer_bytes(targets) * signal_bytes,
        fixed=np.array([size + start for size, (_, start) in zip(fixed, states, strict=True)], dtype=np.float64),
        others=float(outside),
        other_gradients=float(sum(sizes) + copied),
    )


def _state_line(target: TargetModule, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """Bound optimizer state from above by a line over the rank: return slope and intercept."""
    # Most states grow along such a line. Factored ones have an intercept, and small 8-bit states are fp32.
    ranks = [rank for rank in RankLadder().ranks if 0 < rank <= target.max_rank]
    factors = [target.zeros(rank) for rank in ranks]
    sizes = [sum(state_bytes_of(optimizer, factor) for factor in pair) for pair in factors]
    slope = -(-sizes[-1] // ranks[-1])
    if len(ranks) > 1:
        slope = -((sizes[-2] - sizes[-1]) // (ranks[-1] - ranks[-2]))
    start = max(size - slope * rank for size, rank in zip(sizes, ranks, strict=True))
    return float(slope), float(max(start, 0))


def excess_of_state(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None) -> float:
    """Return the bytes of optimizer state that `model_states` overestimates at the current ranks.

    States are counted along a linear upper bound. Low-bit ones are not linear: below 4096 values they are fp32.

    Args:
        targets: the target modules; those at rank 0 have no state.
        optimizer: the optimizer with the state; None for AdamW's two tensors.
    """
    excess = 0.0
    for target in targets:
        if target.rank:
            slope, start = _state_line(target, optimizer)
            pair = target.weight_a.detach(), target.weight_b.detach()
            excess += slope * target.rank + start - sum(state_bytes_of(optimizer, factor) for factor in pair)
    return excess


def _steps_with_copies(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> bool:
    """True if the optimizer updates all parameters at once, with a temporary copy of each."""
    settings = unwrap_optimizer(optimizer).defaults if optimizer else {}
    if "foreach" not in settings or settings.get("fused"):
        return False
    foreach = settings["foreach"]
    return bool(device_kind(next(model.parameters())) == "cuda" if foreach is None else foreach)


def trained_by(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """Return the trained parameters.

    Args:
        model: the model; its parameters count if they require gradients.
        optimizer: adds parameters outside the model, such as a head applied by the loss; None for none.
    """
    inside = list(model.parameters())
    return [p for p in inside if p.requires_grad] + _outside(inside, optimizer)


def trained_outside(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """Return the parameters an optimizer trains outside a model, such as a head applied by the loss."""
    return _outside(list(model.parameters()), optimizer)


def _outside(inside: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    known = set(map(id, inside))
    groups = unwrap_optimizer(optimizer).param_groups if optimizer else []
    return [p for group in groups for p in group["params"] if p.requires_grad and id(p) not in known]


def gradients_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """Return the allocated gradients of trained parameters."""
    return [parameter.grad for parameter in trained_by(model, optimizer) if parameter.grad is not None]


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None, *, gradients: bool = True) -> int:
    """Return the bytes held between steps beyond the frozen model: weights, optimizer state and gradients.

    Args:
        model: the PEFT model.
        optimizer: the optimizer with the state; None counts no state.
        gradients: count a gradient for each trained parameter, even if it is not allocated yet; otherwise only
            allocated ones.
    """
    total, held = 0, dict[int, int]()
    state = unwrap_optimizer(optimizer).state if optimizer else {}
    for parameter in trained_by(model, optimizer):
        size = parameter.untyped_storage().nbytes()
        tensors = [v for v in state.get(parameter, {}).values() if isinstance(v, torch.Tensor) and v.dim()]
        # bitsandbytes' code tables are shared.
        held |= {storage._cdata: storage.nbytes() for storage in storages(tensors)}
        total += size
        if gradients or parameter.grad is not None:
            total += size
    return total + sum(held.values())


def frozen_bytes(model: nn.Module) -> int:
    """Return the stored bytes of the loaded model's frozen weights and buffers; see `frozen_sizes`."""
    return sum(frozen_sizes(model))


def frozen_sizes(model: nn.Module) -> list[int]:
    """Return the bytes of each frozen storage of the loaded model, in module order; shared ones count once.

    Quantised weights include their scales.
    """
    scales = chain.from_iterable(scale_tensors(module) for module in model.modules())
    tensors = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers(), *scales]
    return list({storage._cdata: storage.nbytes() for storage in storages(tensors)}.values())
