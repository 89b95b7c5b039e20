"""One interface to adapters for decisions, for PEFT models and stacked adapters, and the signals of each module.

Signals estimate each target module's benefit from training, based on its LoRA pair and gradients. g is the gradient of
B at one optimizer step; means cover the steps between two decisions. The first three detect planted changes that plain
gradient norms miss (benchmarks/EXPERIMENTS.md):

* *component sensitivity*: mean over the components j of abs(b_j . G a_j), with the mean gradient G of delta W: the
  loss's dependence on one of the adapter's current components;
* *gradient signal-to-noise*: norm(mean g)^2 / mean norm(g)^2: agreement of the batches, from 0 to 1;
* *relative change*: norm(delta W) / norm(W): the module's change through training.

The last two serve other methods:

* *gradient norm*: root mean square of norm(g);
* *importance*: sum over the entries of B of abs(b * mean g), over its rank, as in AdaLoRA (Zhang et al., 2023, arXiv
  2303.10512).

Sensitivity, gradient norm and importance are normalised to the scaling of rank 8: gradients grow with the scaling
(`lora/peft_config.py`), so a module would otherwise seem worth less at higher rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..common.arrays import FloatArray, IntArray
from ..common.checks import counted
from ..common.devices import without_autocast
from .peft_config import sync_config
from .resize import non_finite, set_ranks
from .spec import REFERENCE_RANK
from .targets import TargetModule, base_norm

LEAST_PRECISION = torch.float32
"""Least precision of gradient sums: bfloat16 sums stop growing after some 256 terms, and squares of small gradients
vanish in float16.
"""

SIGNALS = ("sensitivity", "snr", "relative_change", "gradient_norm", "importance")


def base_norms(targets: Sequence[TargetModule]) -> torch.Tensor:
    """Return the Frobenius norm of each module's frozen weight, at least 1e-12, fp64 (modules,)."""
    return torch.tensor([base_norm(target.layer) for target in targets], dtype=torch.float64).clamp_min(1e-12)


def pair_signals(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scalings: Sequence[tuple[float, float]],
    sums: Sequence[torch.Tensor],
    squares: torch.Tensor,
    count: int,
    base_norms: torch.Tensor,
) -> torch.Tensor:
    """Return the signals of one interval, (modules, len(SIGNALS)).

    Args:
        factors: A (rank, d_in) and B (d_out, rank) of each module; for experts, one matrix each along a first axis.
        scalings: the scaling of each B A, and its value at `REFERENCE_RANK`.
        sums: gradient of each B, summed over the interval's steps, in the shape of B.
        squares: squared norm of the gradient of each B, summed over the steps, (modules,).
        count: number of steps in the interval.
        base_norms: norm of each frozen weight, fp64 (modules,).
    """
    snr = torch.stack(torch._foreach_norm(list(sums))).square() / (count * squares).clamp_min(1e-30)
    rows = []
    for (a, b), (scaling, _), total in zip(factors, scalings, sums, strict=True):
        a, b = a.to(total.dtype), b.to(total.dtype)
        products = b * total
        # norm(B A)^2 = trace((B^T B)(A A^T)), without forming the dense product.
        square = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
        rows.append(torch.stack([products.sum(dim=-2).abs().sum(), square.sqrt() * abs(scaling), products.abs().sum()]))
    sensitivity, change, importance = torch.stack(rows).unbind(dim=1)
    relative = change / base_norms.to(change)
    at_8 = change.new_tensor([reference / (now or 1.0) for now, reference in scalings])
    each = at_8 / (count * change.new_tensor([b.numel() // b.shape[-2] for _, b in factors]))
    norms = (squares / count).sqrt().to(change) * at_8
    return torch.stack([sensitivity * each, snr.to(change), relative, norms, importance * each], dim=1)


class Meter(ABC):
    """Averages the gradients of B over an interval, and computes the signals of one run at its end.

    Attributes:
        values: the latest signals, float64 (modules, len(SIGNALS)); NaN before the first read. A module at rank 0 keeps
            its last values.
        age: decisions since each module's values were fresh, int64 (modules,).
    """

    def __init__(self, modules: int) -> None:
        self.values: FloatArray = np.full((modules, len(SIGNALS)), np.nan)
        self.age: IntArray = np.zeros(modules, dtype=np.int64)
        self._count = 0  # steps in the interval
        self.restart()

    @abstractmethod
    def restart(self) -> None:
        """Begin a new interval and free the buffers of the old one; call after each change of rank."""

    def read(self) -> FloatArray:
        """Close the interval: update `values` and `age` from the accumulated gradients, and begin a new one."""
        self.age = self.age + 1
        if self._count:
            self.age[self._update()] = 0
        self.restart()
        return self.values

    @abstractmethod
    def _update(self) -> IntArray:
        """Update `values`, and return the indices of the modules with fresh ones."""


class SignalMeter(Meter):
    """Measures the signals of a PEFT model."""

    def __init__(self, targets: Sequence[TargetModule]) -> None:
        self.targets: list[TargetModule] = list(targets)
        self._base_norms = base_norms(targets)
        super().__init__(len(targets))

    def restart(self) -> None:
        """See `Meter`."""
        self._count = 0
        self._index = [i for i, target in enumerate(self.targets) if target.rank > 0]
        self._adapted = [self.targets[i] for i in self._index]
        self._sums: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []

    def accumulate(self) -> None:
        """Add the gradients of one optimizer step, before they are cleared. Ignores non-finite steps."""
        gradients = [g for target in self._adapted if (g := target.weight_b.grad) is not None]
        if not gradients or len(gradients) < len(self._adapted):
            return
        sums_in = torch.promote_types(gradients[0].dtype, LEAST_PRECISION)
        norms = torch.stack(torch._foreach_norm(gradients, dtype=sums_in))
        if not bool(torch.isfinite(norms).all()):
            return
        if not self._sums:
            self._sums = [torch.zeros_like(gradient, dtype=sums_in) for gradient in gradients]
            self._squares = [torch.zeros_like(norms)]
        torch._foreach_add_(self._sums, gradients)
        self._squares[0] += norms.square()
        self._count += 1

    @without_autocast()
    def _update(self) -> IntArray:
        factors = [(t.each_a(t.weight_a.detach()), t.each_b(t.weight_b.detach())) for t in self._adapted]
        sums = [t.each_b(total) for t, total in zip(self._adapted, self._sums, strict=True)]
        scalings = [(target.scaling, target.scaling_at(REFERENCE_RANK)) for target in self._adapted]
        norms = self._base_norms[self._index]
        signals = pair_signals(factors, scalings, sums, self._squares[0], self._count, norms)
        self.values[self._index] = signals.double().cpu().numpy()
        return np.array(self._index, dtype=np.int64)

    @property
    def buffer_bytes(self) -> int:
        """Return the current bytes of the buffers."""
        return sum(total.untyped_storage().nbytes() for total in self._sums)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything `load_state_dict` needs to continue within an interval, as tensors."""
        values, age = torch.from_numpy(self.values.copy()), torch.from_numpy(self.age.copy())
        state = {"values": values, "age": age, "count": torch.tensor([self._count])}
        if self._sums:
            state["squares"] = self._squares[0].cpu().clone()
            state |= {f"mean.{t.name}": m.cpu().clone() for t, m in zip(self._adapted, self._sums, strict=True)}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict`; the targets must have the ranks at which it was created.

        Raises:
            LookupError, TypeError, ValueError: the state is of other modules or ranks, or damaged.
        """
        self.restart()
        self.values = _stored(state["values"], self.values.shape, torch.float64).numpy().copy()
        self.age = _stored(state["age"], self.age.shape, torch.int64).numpy().copy()
        self._count = counted(int(state["count"]))
        if "squares" in state:
            device, weights = self._adapted[0].weight_b.device, [target.weight_b for target in self._adapted]
            sums_in = torch.promote_types(weights[0].dtype, LEAST_PRECISION)
            sums = [_stored(state[f"mean.{t.name}"], t.weight_b.shape, sums_in) for t in self._adapted]
            squares = _stored(state["squares"], (len(weights),), sums_in)
            self._squares, self._sums = [squares.to(device, copy=True)], [s.to(device, copy=True) for s in sums]


def _stored(tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of a state; raises ValueError unless it has this shape and type."""
    if tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}, not {tuple(shape)} and {dtype}")
    return tensor


def signal_buffer_bytes(targets: Sequence[TargetModule]) -> FloatArray:
    """Return the bytes of `SignalMeter`'s buffers per rank of each module: summed gradient of B, float64 (modules,)."""
    sizes = [torch.promote_types(target.weight_b.dtype, LEAST_PRECISION).itemsize for target in targets]
    return np.array([target.d_out * size for target, size in zip(targets, sizes, strict=True)], dtype=np.float64)


class Adapters(Protocol):
    """The adapters of one run."""

    @property
    def targets(self) -> Sequence[TargetModule]:
        """The target modules: names, shapes, scaling. Read ranks from `ranks`: stacked runs share these objects."""

    @property
    def meter(self) -> Meter:
        """The meter for the signals of these adapters."""

    @property
    def ranks(self) -> IntArray:
        """Current ranks, int64 (modules,)."""

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """Set new ranks, int64 (modules,), and map the optimizer state; stacked adapters ignore the optimizer.

        `seed` and `step`, the number of completed optimizer steps, determine fresh directions.
        """

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Return the names of modules with NaN or infinity in factors, gradients or optimizer state."""


class PeftAdapters:
    """The adapters of a PEFT model, on these target modules."""

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        self.model = model
        self.targets: list[TargetModule] = list(targets)
        self.meter: SignalMeter = SignalMeter(targets)

    @property
    def ranks(self) -> IntArray:
        """Current ranks, int64 (modules,)."""
        return np.array([target.rank for target in self.targets], dtype=np.int64)

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """See `Adapters`."""
        plan = {target.name: rank for target, rank in zip(self.targets, ranks.tolist(), strict=True)}
        set_ranks(self.targets, plan, optimizer, seed=seed, step=step)
        sync_config(self.model, self.targets)
        self.meter.restart()

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """See `Adapters`."""
        return non_finite(self.targets, optimizer)
