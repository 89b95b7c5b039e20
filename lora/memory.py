"""What a plan costs: bytes at the peak of a training step, predicted for any plan after a few forward passes.

At the start of the backward pass a step holds the adapter's weights, gradients and optimiser state, and the
tensors that autograd saved. The last part is the bulk, and rank hardly moves it; which modules carry an adapter does:

* everything above the lowest adapted module in the forward order is saved, because gradients must flow down to it;
* an adapted module saves its input (shared by q, k and v; free where something else saves it anyway) and its
  rank-wide hidden state.

`calibrate` measures these on the user's own model and batch: one forward pass for each possible lowest module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import UnsupportedError
from .factors import write_in_place
from .ladder import IntArray
from .optimizer_layouts import unwrap_optimizer
from .optimizer_state import state_bytes_of
from .targets import TargetModule, other_trainable

FloatArray = NDArray[np.float64]
Batch = Mapping[str, torch.Tensor]


class Cost(Protocol):
    """Price of a plan, linear in the ranks once it is known which modules are adapted."""

    @property
    def per_rank(self) -> FloatArray:
        """Price of one more rank on each module, shape (modules,)."""

    def fixed(self, active: NDArray[np.bool_]) -> float:
        """Price of adapting exactly these modules, before the first rank; `active` has shape (modules,)."""


def total_cost(cost: Cost, ranks: IntArray) -> float:
    """Price of a plan; `ranks` has shape (modules,)."""
    return cost.fixed(ranks > 0) + float(cost.per_rank @ ranks)


@dataclass(frozen=True)
class ParameterCost:
    """Counts adapter parameters: sum of rank x (d_in + d_out)."""

    per_rank: FloatArray

    @classmethod
    def of(cls, targets: Sequence[TargetModule]) -> ParameterCost:
        """The cost of these target modules."""
        return cls(np.array([t.d_in + t.d_out for t in targets], dtype=np.float64))

    def fixed(self, active: NDArray[np.bool_]) -> float:
        """Nothing: only ranks count."""
        return 0.0


@dataclass(frozen=True)
class ByteCost:
    """Bytes at the peak of a training step.

    Attributes:
        per_rank: weights, gradients, optimiser state, signal buffers and saved hidden state of one rank, (modules,).
        constant: bytes of everything else that trains (a classifier in `modules_to_save`), and of whatever the
            model saves with no adapter at all.
        order: position of each module in the forward pass, (modules,).
        chain: saved bytes when this module is the lowest one, its own input included, (modules,).
        extra: extra[e, m]: bytes that adapting m adds when e is the lowest, (modules, modules).
        together: bytes more when this module is the lowest one and others of its layer are adapted too, (modules,).
        shared: modules with the same number save the same input once, (modules,).
        block: layer index of each module, (modules,).
    """

    per_rank: FloatArray
    constant: float
    order: IntArray
    chain: FloatArray
    extra: FloatArray
    together: FloatArray
    shared: IntArray
    block: IntArray

    def fixed(self, active: NDArray[np.bool_]) -> float:
        """Saved bytes that depend on which modules are adapted, and the constant."""
        if not active.any():
            return self.constant
        chosen = np.flatnonzero(active)
        lowest = chosen[np.argmin(self.order[chosen])]
        inputs: dict[int, float] = {int(self.shared[lowest]): 0.0}
        for module in chosen:
            inputs.setdefault(int(self.shared[module]), float(self.extra[lowest, module]))
        beside = self.together[lowest] * (np.count_nonzero(self.block[chosen] == self.block[lowest]) > 1)
        return float(self.constant + self.chain[lowest] + beside + sum(inputs.values()))


class SavedTensors:
    """Counts the distinct storages that autograd saves for backward, parameters and buffers excluded.

    A context manager around a forward pass.

    Attributes:
        sizes: bytes by storage address.
    """

    def __init__(self, model: nn.Module) -> None:
        kept: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        self._known = {_storage(tensor)[0] for tensor in kept}
        self.sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _same)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        # Checkpointing runs layers again during the backward pass, when what they save replaces what was freed.
        in_backward = torch._C._current_graph_task_id() != -1
        address, size = _storage(tensor)
        if size and address not in self._known and not in_backward:
            self.sizes[address] = size
        return tensor

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(self.sizes.values())

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._hooks.__exit__(*details)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes that training holds between steps beside the frozen model: live storages of weights, state, gradients.

    Gradients count as large as their parameter, whether they are allocated at this moment or not.
    """
    total = 0
    state = unwrap_optimizer(optimizer).state if optimizer else {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            total += 2 * _storage(parameter)[1]
            tensors = [v for v in state.get(parameter, {}).values() if isinstance(v, torch.Tensor) and v.dim()]
            total += sum(_storage(tensor)[1] for tensor in tensors)
    return total


@contextmanager
def _only(targets: Sequence[TargetModule], active: Iterable[TargetModule]) -> Iterator[None]:
    """Give the chosen modules one rank and all others none for a while; values are put back afterwards."""
    chosen = {id(target) for target in active}
    saved = []
    try:
        for target in targets:
            rank = 1 if id(target) in chosen else 0
            saved += [(p, p.detach(), p.grad, p.requires_grad) for p in target.parameters.values()]
            write_in_place(target.weight_a, target.weight_a.new_zeros(rank, target.d_in))
            write_in_place(target.weight_b, target.weight_b.new_zeros(target.d_out, rank))
            for parameter in target.parameters.values():
                parameter.requires_grad_(rank > 0)
        yield
    finally:
        for parameter, value, gradient, trained in saved:
            write_in_place(parameter, value)
            parameter.requires_grad_(trained)
            parameter.grad = gradient


class _Inputs:
    """Records, in one forward pass, the order of the target modules and the storage of each one's input."""

    def __init__(self, targets: Sequence[TargetModule]) -> None:
        self.address = np.zeros(len(targets), dtype=np.int64)
        self.size = np.zeros(len(targets), dtype=np.float64)
        self.hidden = np.zeros(len(targets), dtype=np.float64)
        self.order = np.full(len(targets), -1, dtype=np.int64)
        self._alive: list[torch.Tensor] = []  # so that no address is used twice
        self._count = 0
        self._handles = [
            (target.layer if target.embedding else target.layer.lora_A[target.adapter]).register_forward_pre_hook(
                self._hook(index, target)
            )
            for index, target in enumerate(targets)
        ]

    def _hook(self, index: int, target: TargetModule) -> Any:
        def record(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            tensor = arguments[0]
            self._alive.append(tensor.detach())
            self.address[index], self.size[index] = _storage(tensor)
            # An embedding's input holds one token id a position, any other a vector.
            positions = tensor.numel() if target.embedding else tensor.numel() / tensor.shape[-1]
            self.hidden[index] = positions * (target.weight_a if target.embedding else tensor).element_size()
            if torch.is_autocast_enabled(tensor.device.type):  # which saves copies of the factors
                copied = torch.get_autocast_dtype(tensor.device.type).itemsize
                self.hidden[index] += (target.d_in + target.d_out) * copied
            self.order[index] = self._count
            self._count += 1

        return record

    def __enter__(self) -> _Inputs:
        return self

    def __exit__(self, *details: Any) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class _Measured:
    """What the probes found at one number of rows; fields as in `ByteCost`, `bare` with no adapter at all."""

    bare: float
    order: IntArray
    chain: FloatArray
    extra: FloatArray
    together: FloatArray
    hidden: FloatArray
    shared: IntArray


def _probe(
    model: nn.Module, targets: Sequence[TargetModule], active: Sequence[TargetModule], batch: Batch
) -> tuple[int, set[int], _Inputs]:
    """One forward pass with one rank on the `active` modules: bytes saved, addresses saved, inputs seen."""
    with _only(targets, active), _Inputs(targets) as inputs, SavedTensors(model) as saved:
        loss = model(**batch).loss  # noqa: F841  (holds the graph, so that no storage address is used twice)
        return saved.total, set(saved.sizes), inputs


def _measure(
    model: nn.Module, targets: Sequence[TargetModule], batch: Batch, interacting: NDArray[np.bool_] | None = None
) -> _Measured:
    """Probe each module as the lowest one; `interacting` says for which to look at their whole layer (None: all)."""
    bare, _, _ = _probe(model, targets, (), batch)
    count = len(targets)
    chain, extra = np.zeros(count), np.zeros((count, count))
    for index, target in enumerate(targets):
        total, addresses, inputs = _probe(model, targets, (target,), batch)
        chain[index] = total - bare - inputs.hidden[index]
        extra[index] = np.where(np.isin(inputs.address, list(addresses)), 0.0, inputs.size)
    if (inputs.order < 0).any():
        absent = [t.name for t, position in zip(targets, inputs.order, strict=True) if position < 0]
        raise UnsupportedError(f"{absent[0]!r} took no part in the forward pass. Leave it out of `target_modules`.")
    _, shared = np.unique(inputs.address, return_inverse=True)
    found = _Measured(bare, inputs.order, chain, extra, np.zeros(count), inputs.hidden, shared.astype(np.int64))
    for index in range(count) if interacting is None else np.flatnonzero(interacting).tolist():
        found.together[index] = _interaction(model, targets, batch, found, index)
    return found


def _interaction(
    model: nn.Module, targets: Sequence[TargetModule], batch: Batch, found: _Measured, lowest: int
) -> float:
    """Bytes that the additive model misses when all of the lowest layer's modules from `lowest` up are adapted.

    Inside the lowest layer modules interact: attention saves the keys only if the queries need gradients.
    """
    block, order, shared = targets[lowest].block, found.order, found.shared
    above = [m for m, t in enumerate(targets) if t.block == block and order[m] > order[lowest]]
    if not above:
        return 0.0
    total, _, _ = _probe(model, targets, [targets[m] for m in (lowest, *above)], batch)
    inputs = {int(shared[m]): found.extra[lowest, m] for m in above if shared[m] != shared[lowest]}
    additive = found.bare + found.chain[lowest] + sum(inputs.values()) + found.hidden[[lowest, *above]].sum()
    return float(max(0.0, total - additive))


def calibrate(
    model: nn.Module,
    targets: Sequence[TargetModule],
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    signal_bytes: bool = True,
) -> ByteCost:
    """Measure what plans cost on this model and this batch shape.

    Runs a few forward passes for each target module (as the lowest one) on the first two and three rows of the batch,
    in the model's current mode, and extrapolates to all rows: what is saved grows linearly with them. Weights,
    gradients and ranks are as before afterwards; random state is left alone.

    Args:
        model: the PEFT model, on its device.
        targets: its target modules.
        batch: keyword arguments of the model, as large as the largest batch that training will see.
        optimizer: decides the bytes of state; AdamW's two tensors without one.
        signal_bytes: count the buffers in which `SignalMeter` averages gradients.

    Raises:
        UnsupportedError: a target module takes no part in the forward pass.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    rows = next(iter(batch.values())).shape[0]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        few = _measure(model, targets, _first_rows(batch, 2))
        more = _measure(model, targets, _first_rows(batch, 3), few.together > 0) if rows > 2 else few

    def at_rows(field: str) -> Any:
        low, high = getattr(few, field), getattr(more, field)
        return low + (rows - 2) * (high - low)

    per_rank = _parameter_bytes(targets, optimizer) + at_rows("hidden")
    rest = sum(_training_bytes(p.detach(), optimizer) for p in other_trainable(model, targets))
    return ByteCost(
        per_rank=per_rank + signal_buffer_bytes(targets) if signal_bytes else per_rank,
        constant=float(at_rows("bare") + rest),
        order=more.order,
        block=np.array([target.block for target in targets], dtype=np.int64),
        chain=at_rows("chain"),
        extra=at_rows("extra"),
        together=at_rows("together"),
        shared=more.shared,
    )


def _first_rows(batch: Batch, count: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:count] for name, tensor in batch.items()}


def _training_bytes(parameter: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of a parameter, its gradient and its optimiser state."""
    return 2 * parameter.numel() * parameter.element_size() + state_bytes_of(optimizer, parameter)


def _parameter_bytes(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None) -> FloatArray:
    """Bytes of weights, gradients and optimiser state of one rank on each module."""
    rows = [
        sum(_training_bytes(t.weight_a.new_empty(width), optimizer) for width in (t.d_in, t.d_out)) for t in targets
    ]
    return np.array(rows, dtype=np.float64)


def signal_buffer_bytes(targets: Sequence[TargetModule]) -> FloatArray:
    """Bytes that `SignalMeter` holds for one rank on each module: a mean gradient of B."""
    return np.array([t.d_out * t.weight_b.element_size() for t in targets], dtype=np.float64)
