"""Measures the bytes of real training steps, and makes plans and batches for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch import nn

RANKS = (1, 2, 3, 4, 8, 12)


def allocated_peak(profile: torch.profiler.profile) -> int:
    """The most bytes that the CPU's allocator gave at once under a profile with `profile_memory`."""
    level = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest


class KeepsOnContext(torch.autograd.Function):
    """Keeps tensors on its context, where autograd's hooks do not see them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.hidden = hidden
        ctx.more = {"list": [hidden * 2]}
        return hidden * hidden

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.more["list"][0]


class SavedBytes:
    """A context that counts the bytes that autograd saves inside it, each storage once, while their graph lives.

    Args:
        model: its parameters and buffers do not count.
        batch: its tensors do not count either.
    """

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        given = [*model.parameters(), *model.buffers(), *batch.values()]
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._tokens: list[weakref.ref[_Token]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda token: token.tensor)

    @property
    def bytes(self) -> int:
        """Bytes saved now."""
        tokens = [token for reference in self._tokens if (token := reference()) is not None]
        sizes = {t.tensor.untyped_storage()._cdata: t.tensor.untyped_storage().nbytes() for t in tokens}
        return sum(size for key, size in sizes.items() if key not in self._given)

    def _pack(self, tensor: torch.Tensor) -> _Token:
        token = _Token(tensor)
        self._tokens.append(weakref.ref(token))
        return token

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._hooks.__exit__(*details)


class _Token:
    def __init__(self, tensor: torch.Tensor) -> None:
        # A node that saved its own output with its grad_fn would keep itself alive for ever.
        self.tensor = tensor.data


def autocast(precision: str) -> AbstractContextManager[Any]:
    """The context of the forward pass: bf16 autocast, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()


def family_model(family: Any, precision: str = "fp32", checkpointing: bool | None = None, **options: Any) -> nn.Module:
    """A family's model, ready to train.

    Args:
        family: a row of the matrix.
        precision: "fp32" and "autocast" in single precision, "bf16" with frozen weights in half precision and adapters
            in single precision, as PEFT makes them, "bf16-all" with adapters in half precision too.
        checkpointing: `use_reentrant` of gradient checkpointing; None for none.
        options: of LoraConfig.
    """
    model = family.model(torch.bfloat16 if precision.startswith("bf16") else torch.float32, **options)
    if precision == "bf16":
        for target in find_target_modules(model):
            for parameter in target.parameters.values():
                parameter.data = parameter.data.float()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    return model.train()


def family_batch(family: Any, model: nn.Module, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random batch of this shape, in the form of a family's batches; images have no length."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for name, tensor in family.inputs(model).items():
        if tensor.is_floating_point():
            values = torch.randn(rows, *tensor.shape[1:], generator=generator).to(tensor.dtype)
        elif tensor.dim() == 1:
            values = torch.arange(rows) % 3
        elif name == "attention_mask":
            values = torch.ones(rows, length, dtype=torch.long)
        else:
            values = torch.randint(1, 48, (rows, length), generator=generator)
        batch[name] = values
    return batch


def random_plans(targets: Any, generator: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """Plans of all kinds: any density, one rank or many, the top layers only, one kind of module, one module."""
    most = np.array([target.max_rank for target in targets])
    blocks = np.array([target.block for target in targets])
    kinds = np.array([target.name.rpartition(".")[2] for target in targets])
    for index in range(count):
        ranks = generator.choice(RANKS, size=len(targets))
        if index % 2:
            ranks = np.full(len(targets), ranks[0])
        active = generator.random(len(targets)) < (0.1, 0.3, 0.6, 1.0)[index % 4]
        if index % 5 == 1:
            active &= blocks >= generator.integers(blocks.max() + 1)
        if index % 5 == 2:
            active = kinds == generator.choice(kinds)
        if index % 5 == 3 or not active.any():
            active = np.arange(len(targets)) == generator.integers(len(targets))
        yield np.where(active, np.minimum(ranks, most), 0)


@dataclass
class Run:
    """A model with an optimiser, on which plans can be tried."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    precision: str = "fp32"
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.targets = find_target_modules(self.model)

    def calibrated(self, batch: dict[str, torch.Tensor] | None = None, **options: Any) -> Any:
        """The memory model, calibrated on `batch` or the run's own."""
        with autocast(self.precision):
            return calibrate(
                self.model, self.targets, batch or self.batch, self.optimizer, signal_bytes=False, **options
            )

    def apply(self, ranks: np.ndarray) -> None:
        """Give the modules the ranks of a plan."""
        set_ranks(self.targets, {t.name: int(r) for t, r in zip(self.targets, ranks, strict=True)}, self.optimizer)
        assert [t.rank for t in self.targets] == ranks.tolist()

    def loss(self, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Run a forward pass and return the loss."""
        with autocast(self.precision):
            return self.model(**batch or self.batch).loss

    def saved(self, ranks: np.ndarray, batch: dict[str, torch.Tensor] | None = None) -> int:
        """Bytes that autograd holds at the end of the forward pass under a plan."""
        self.apply(ranks)
        with SavedBytes(self.model, batch or self.batch) as saved:
            loss = self.loss(batch)
        size = saved.bytes
        del loss
        return size

    def peak(self, ranks: np.ndarray, batch: dict[str, torch.Tensor] | None = None) -> int:
        """Bytes at the peak of a step under a plan; the optimiser has stepped before."""
        self.apply(ranks)
        self._step(batch)
        meter = PeakMeter()
        meter.begin(self.model, self.optimizer)
        self._step(batch)
        peak = meter.end(0)
        assert peak is not None
        return peak

    def _step(self, batch: dict[str, torch.Tensor] | None) -> None:
        self.loss(batch).backward()
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def adamw_run(model: nn.Module, batch: dict[str, torch.Tensor], precision: str = "fp32", **options: Any) -> Run:
    """A run with AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(model, batch, precision, torch.optim.AdamW(parameters, lr=1e-4, **options))
