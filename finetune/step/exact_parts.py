"""Tests of running a step in parts: the gradient of some rows, whole and in parts.

Before training, the test finds the factors of the losses of parts: a loss may be a sum over rows, or a mean over rows
or tokens. It proves nothing about rare cases, absent from a few rows: the loss must be known to be such a sum
(`known_losses.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from ...common.errors import UnsupportedError, first_line
from ...cost.batch_shape import Batch
from ...cost.record.calibration import CUT_FAILS
from ...cost.record.model_states import trained_outside
from ...data.batches import IGNORED
from ...lora.targets import TargetModule
from .batch_rows import NEXT_TOKENS, ROWS, SHARES, TOKENS, BatchRows, Cuts
from .run import TrainingRun

TESTED_ROWS = 4
"""Maximum number of examples in the test: two parts of two."""

TRIES = 4
"""Number of batches tried until one has a loss: all labels of a few rows may be masked."""

NOT_FINITE = "the loss on the first rows is not finite"

ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative difference of two gradients due to rounding, by the lowest precision of the step: two units in the last
place. `FULL_ROUNDING` in full precision, where a gradient in parts differs by 4e-7 to 2e-6."""

SHAKEN = 0.1
"""Standard deviation of the noise added to adapters in the test."""

FULL_ROUNDING, TF32_ROUNDING = 1e-5, 2**-9

MOVED_ROUNDING = 5e-5
"""The same if the tested parts lost padding on the left, which moves positions: the angles of rotary
embeddings round differently (1.7e-5 for SmolLM2-135M under GRPO)."""


@dataclass(frozen=True)
class Exactness:
    """Result of a test.

    Attributes:
        kind: how the loss combines its rows, one of `SHARES`; empty if steps run whole.
        reason: why they do, for people.
        draws: True if the step draws random numbers, as dropout does.
        packed: True if the rows of the test were texts of one packed row; otherwise such a row is not split.
    """

    kind: str
    reason: str = ""
    draws: bool = False
    packed: bool = False


class _WithoutDropout:
    """Skips dropout inside, whose masks differ with the shapes, and records the precisions of all results.

    A model in full precision runs without autocast: a small part of a loss would be lost in the rounding.

    Args:
        model: the PEFT model.

    Attributes:
        drew: True if any dropout would have drawn numbers.
        dtypes: dtypes of the modules' outputs.
    """

    _DROPS = (
        *(f"{name}dropout" for name in ("", "alpha_", "feature_alpha_")),
        *(f"dropout{axes}d" for axes in (1, 2, 3)),
    )

    def __init__(self, model: nn.Module) -> None:
        self.drew, self.dtypes = False, set[torch.dtype]()
        self._full = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
        self._undo = ExitStack()

    def __enter__(self) -> _WithoutDropout:
        functions: dict[str, Callable[..., torch.Tensor]] = dict.fromkeys(self._DROPS, self._kept)
        for name, function in {**functions, _ATTENTION: self._attention}.items():
            before = getattr(functional, name)
            setattr(functional, name, partial(function, before))
            self._undo.callback(setattr, functional, name, before)
        self._undo.callback(register_module_forward_hook(self._note).remove)
        if self._full:
            enter = torch.autocast.__enter__
            torch.autocast.__enter__ = partialmethod(_entered_off, enter)  # type: ignore[assignment,method-assign]
            self._undo.callback(setattr, torch.autocast, "__enter__", enter)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _kept(
        self, _: Any, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        self.drew |= training and p > 0
        return input

    def _attention(self, attend: Callable[..., torch.Tensor], *tensors: Any, **options: Any) -> torch.Tensor:
        self.drew |= bool(options.get("dropout_p"))
        return attend(*tensors, **{**options, "dropout_p": 0.0})

    def _note(self, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.dtypes.add(output.dtype)


_ATTENTION = "scaled_dot_product_attention"


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative difference due to rounding at this precision, or in its products; see `ROUNDING`."""
    products = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    return max(ROUNDING.get(dtype, 0.0), TF32_ROUNDING if products else FULL_ROUNDING)


def _entered_off(autocast: Any, enter: Callable[[Any], Any]) -> Any:
    """Enter an autocast context with autocast disabled."""
    before, autocast._enabled = autocast._enabled, False
    try:
        return enter(autocast)
    finally:
        autocast._enabled = before


def exactness_of(run: TrainingRun, targets: Sequence[TargetModule], seed: int) -> Exactness:
    """Find the factors of the losses of parts, and check whether a few rows have the same gradient in parts.

    Training is unaffected. Adapters hold random values during the test: while an adapter has no effect, a part of the
    loss may be zero that later is not.

    Args:
        run: the run, whose loss is known to be a sum over rows or tokens.
        targets: the target modules of its model.
        seed: seed of the choice of rows, and of these values.
    """
    cuts = run.cuts

    def tested(count: int = TESTED_ROWS) -> Exactness:
        try:
            for batch in run.small_batches(TRIES, min(run.rows, count), seed):
                rows = BatchRows.of(batch, cuts, run.step.rows_per_example)
                with _shaken(targets, seed):
                    found = replace(_tested(run, rows), packed=rows.packed)
                if found.reason != NOT_FINITE:
                    break
            return found
        except UnsupportedError as error:
            return Exactness("", str(error).rstrip("."))
        except torch.OutOfMemoryError:  # the exception holds the step's tensors until handled
            if run.replicas.sharded:  # other processes are in the middle of the test
                raise
        except CUT_FAILS as error:
            return Exactness("", f"the loss fails on part of a batch ({first_line(error)})")

        if count > 2:
            return tested(2)
        return Exactness("", f"{count} rows ran out of memory in the test")

    return run.measured(tested)


def _tested(run: TrainingRun, rows: BatchRows) -> Exactness:
    order = np.argsort(-rows.lengths, kind="stable")
    parts = [sorted(part.tolist()) for part in np.array_split(order, 2) if len(part)]
    rows = uneven(rows, parts, run.cuts)
    with _WithoutDropout(run.model) as found:
        whole, loss = _gradient(run, partial(run.loss, rows.batch))
        if not (math.isfinite(loss) and bool(whole.isfinite().all())):
            return Exactness("", NOT_FINITE)
        each = [_gradient(run, partial(_part_loss, run, rows.part(part), rows.batch)) for part in parts]
    differences = {kind: _difference(rows.shares(parts, kind), each, whole, loss) for kind in SHARES}
    most = max(map(rounding_of, found.dtypes), default=rounding_of(torch.float32))
    if any(rows.span(part).start for part in parts):
        most = max(most, MOVED_ROUNDING)
    for kind in SHARES:
        if differences[kind] <= most:
            return Exactness(kind, draws=found.drew)
    least = min(differences.values())
    return Exactness(
        "", f"in parts, a step's gradient differs by {least:.2g} of its size, because rows affect each other"
    )


@contextmanager
def _shaken(targets: Sequence[TargetModule], seed: int) -> Iterator[None]:
    """Add random values to the adapters inside."""
    generator = torch.Generator().manual_seed(seed)
    before = [(weight, weight.detach().clone()) for t in targets for weight in (t.weight_a, t.weight_b)]
    try:
        with torch.no_grad():
            for weight, _ in before:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight), alpha=SHAKEN)
        yield
    finally:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)


def _part_loss(run: TrainingRun, part: Batch, whole: Batch) -> torch.Tensor:
    return run.part_loss(part, whole) if run.part_loss else run.loss(part)


def uneven(rows: BatchRows, parts: Sequence[Sequence[int]], cuts: Cuts) -> BatchRows:
    """Return the same rows with fewer counted labels in one, so that means over rows and over tokens differ.

    That row counts its first token, which causal language models do not predict. In a packed row they would predict it
    from the previous text.
    """
    if rows.predicted is None or len(parts) < 2:
        return rows
    labels = rows.batch["labels"].clone()
    if labels.dim() == 1:
        counted = labels[labels != IGNORED]
        if len(parts[0]) > 1 and len(counted):
            labels[labels == IGNORED] = counted[0]
            labels[parts[0][0]] = IGNORED
        return rows.with_labels(labels, cuts)
    own = rows.of_example(labels, int(rows.predicted[1].argmax()))
    counted = (own != IGNORED).nonzero().flatten()
    if not len(counted):
        return rows
    if not rows.packed:
        own[:1] = own[counted[0]]
    kinds = (ROWS, TOKENS) if rows.packed else (ROWS, TOKENS, NEXT_TOKENS)
    found = rows.with_labels(labels.clone(), cuts)
    for place in reversed(counted[1:].tolist()):
        if len({round(found.shares(parts, kind)[0], 3) for kind in kinds}) == len(kinds):
            break
        own[place] = IGNORED
        found = rows.with_labels(labels.clone(), cuts)
    return found


def _difference(
    shares: Sequence[float], parts: Sequence[tuple[torch.Tensor, float]], whole: torch.Tensor, loss: float
) -> float:
    """Return the relative difference of the summed gradients from the whole one, or of the losses if larger."""
    total = sum(share * gradient for share, (gradient, _) in zip(shares, parts, strict=True))
    losses = sum(share * value for share, (_, value) in zip(shares, parts, strict=True))
    size = max(float(whole.norm()), 1e-30)
    return float(np.maximum(float((total - whole).norm()) / size, abs(losses - loss) / max(abs(loss), 1e-30)))


def _gradient(run: TrainingRun, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return a loss and its gradient over all trained tensors, as (fp32 vector, loss); restore gradients."""
    trains = [p for p in run.model.parameters() if p.requires_grad] + trained_outside(run.model, run.optimizer)
    before = [(parameter, parameter.grad) for parameter in trains]
    try:
        for parameter in trains:
            parameter.grad = None
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in trains]
        return torch.cat([gradient.detach().float().flatten() for gradient in gradients]), float(value.detach())
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def rows_of(batch: Batch, cuts: Cuts, each: int, *, packed: bool = False) -> BatchRows | None:
    """Return the rows of a batch; None if an entry belongs to no row, or if it is `packed` without permission."""
    try:
        rows = BatchRows.of(batch, cuts, each)
    except UnsupportedError:
        return None
    return rows if packed or not rows.packed else None
