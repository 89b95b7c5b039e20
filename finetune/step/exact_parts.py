"""Tests of running a step in parts: the gradient of some rows, whole and in parts.

Before training, the test finds the factors of the losses of parts: a loss may be a sum over rows, or a mean over rows
or tokens. It proves nothing about rare cases, absent from a few rows. So the loss must be known to be such a sum
(`known_losses.py`), or the user asks for parts, and real batches are tested during the run (`watched_parts.py`).
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

SHAKEN, NUDGED = 0.1, 0.01
"""Standard deviations of the noise added to adapters, before training and in tests of real batches: with much noise,
many rows look alike to a model."""

FULL_ROUNDING, TF32_ROUNDING = 1e-5, 2**-9

MOVED_ROUNDING = 5e-5
"""The same under a known loss if the tested parts lost padding on the left, which moves positions: the angles of rotary
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


class _EqualDropout:
    """Makes dropout draw the same numbers for every shape inside, and records the precisions of all results.

    The mask of a call depends on its index among the calls of a pass, and on the last axis: all rows and tokens share
    it. Copies of the rows side by side have their own masks, since a loss may compare them (R-Drop, Liang et al., 2021,
    arXiv 2106.14448). Under a known loss, dropout is skipped.

    A model in full precision runs without autocast: a small part of a loss would be lost in the rounding.

    Args:
        model: the PEFT model.
        known: True if the loss is known.

    Attributes:
        drew: True if any dropout drew numbers.
        dtypes: dtypes of the modules' outputs.
        examples: examples of the current batch.
    """

    _DROPS = (
        *(f"{name}dropout" for name in ("", "alpha_", "feature_alpha_")),
        *(f"dropout{axes}d" for axes in (1, 2, 3)),
    )

    def __init__(self, model: nn.Module, *, known: bool) -> None:
        self.drew, self.examples, self._known, self._calls = False, 1, known, 0
        self._full = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
        self.dtypes: set[torch.dtype] = set()
        self._undo = ExitStack()

    def __enter__(self) -> _EqualDropout:
        for name in self._DROPS:
            self._replace(name, self._kept)
        self._replace("scaled_dot_product_attention", self._attention)
        self._undo.callback(register_module_forward_hook(self._note).remove)
        if self._full:
            enter = torch.autocast.__enter__
            torch.autocast.__enter__ = partialmethod(_entered_off, enter)  # type: ignore[assignment,method-assign]
            self._undo.callback(setattr, torch.autocast, "__enter__", enter)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        before = getattr(functional, name)
        setattr(functional, name, partial(function, before))
        self._undo.callback(setattr, functional, name, before)

    def begin(self, examples: int) -> None:
        """Begin a pass on a batch of this many examples, and reset the count of dropout calls."""
        self.examples, self._calls = examples, 0

    def _kept(
        self, _: Any, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p <= 0:
            return input
        self.drew, self._calls = True, self._calls + 1
        if self._known or not input.dim():
            return input
        copies = len(input) // self.examples if not len(input) % self.examples else 1
        axis = 1 if input.dim() == 4 else input.dim() - 1  # the last axis of attention is tokens, whose number changes
        shape = [copies, *(size if at == axis else 1 for at, size in enumerate(input.shape) if at)]
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(self._calls)).to(input.device)
        mask = (drawn >= p).to(input.dtype) / (1 - p)
        return input * mask.repeat_interleave(len(input) // copies, dim=0)

    def _attention(self, attend: Callable[..., torch.Tensor], *tensors: Any, **options: Any) -> torch.Tensor:
        if not (share := options.get("dropout_p")):
            return attend(*tensors, **options)
        return self._kept(None, attend(*tensors, **{**options, "dropout_p": 0.0}), share)

    def _note(self, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.dtypes.add(output.dtype)

    @property
    def rounding(self) -> float:
        """Relative difference due to rounding; see `ROUNDING`."""
        return max(map(rounding_of, self.dtypes), default=rounding_of(torch.float32))


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


def exactness_of(run: TrainingRun, targets: Sequence[TargetModule], seed: int, *, known: bool) -> Exactness:
    """Find the factors of the losses of parts, and check whether a few rows have the same gradient in parts.

    Training is unaffected. Adapters hold random values during the test; under an unknown loss, then the same ones with
    the sign of B flipped: while an adapter has no effect, a part of the loss may be zero that later is not, such as
    KTO's divergence from the base model.

    Args:
        run: the run.
        targets: the target modules of its model.
        seed: seed of the choice of rows, and of these values.
        known: True if the loss is known to be a sum over rows or tokens.
    """
    cuts = run.cuts

    def tested(count: int = TESTED_ROWS) -> Exactness:
        try:
            for batch in run.small_batches(TRIES, min(run.rows, count), seed):
                rows = BatchRows.of(batch, cuts, run.step.rows_per_example)
                if not known and rows.examples < TESTED_ROWS:
                    return Exactness("", f"testing it needs {TESTED_ROWS} rows")
                with _shaken(targets, seed) as turn:
                    found = replace(_tested(run, rows, turn, known=known), packed=rows.packed)
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


def difference_of(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    rows: BatchRows,
    parts: Sequence[Sequence[int]],
    *,
    kind: str,
    seed: int,
) -> str:
    """Return why a real batch in its real parts differs from the whole batch, for people; empty if it does not.

    This runs the loop's own steps, including their work after the backward pass. Random values are added to the
    adapters for the test: gradients of learned rows are mere rounding. Training is unaffected.

    Args:
        run: the run.
        targets: the target modules of its model.
        rows: the rows of the batch.
        parts: the indices of their examples.
        kind: how the loss combines its rows, one of `SHARES`.
        seed: seed of these values.

    Raises:
        torch.OutOfMemoryError: the whole batch does not fit.
    """
    steps = list(zip(map(rows.part, parts), rows.shares(parts, kind), map(len, parts), strict=True))
    try:
        with _shaken(targets, seed, NUDGED), _EqualDropout(run.model, known=False) as found:
            whole, loss = _stepped(run, found, rows.batch, [(rows.batch, 1.0, rows.examples)])
            each, sums = _stepped(run, found, rows.batch, [step for step in steps if step[1]])
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedError, *CUT_FAILS) as error:
        return f"the loss fails on part of a batch ({first_line(error)})"
    if not (math.isfinite(loss) and bool(whole.isfinite().all())):
        return ""
    difference = _difference([1.0], [(each, sums)], whole, loss)
    return "" if difference <= found.rounding else _MEET.format(difference)


_MEET = "in parts, a step's gradient differs by {:.2g} of its size, because rows affect each other"


def _stepped(
    run: TrainingRun, dropout: _EqualDropout, whole: Batch, steps: Sequence[tuple[Batch, float, int]]
) -> tuple[torch.Tensor, float]:
    """Return the total gradient and loss of the loop's own steps on parts, given with their shares and examples."""
    trains = [p for p in run.model.parameters() if p.requires_grad] + trained_outside(run.model, run.optimizer)
    loss = 0.0
    with run.aside() as backward:
        for parameter in trains:
            parameter.grad = None
        for part, share, examples in steps:
            dropout.begin(examples)
            loss += share * float(backward(part, whole, share).detach())
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in trains]
        found = torch.cat([gradient.detach().float().flatten() for gradient in gradients])
        for parameter in trains:
            parameter.grad = None
    return found, loss


def _tested(run: TrainingRun, rows: BatchRows, turn: Callable[[], None], *, known: bool) -> Exactness:
    order = np.argsort(-rows.lengths, kind="stable")
    parts = [sorted(part.tolist()) for part in np.array_split(order, 2) if len(part)]
    rows = uneven(rows, parts, run.cuts, known=known)
    differences = dict.fromkeys(SHARES, 0.0)
    with _EqualDropout(run.model, known=known) as found:
        for _ in range(1 if known else 2):
            found.begin(rows.examples)
            buffers = [(name, buffer, buffer.clone()) for name, buffer in run.model.named_buffers()]
            whole, loss = _gradient(run, partial(run.loss, rows.batch))
            now = dict(run.model.named_buffers())
            for name, buffer, before in buffers:
                if now.get(name) is not buffer or not torch.equal(buffer, before):
                    return Exactness("", f"a forward pass modifies {name}")
            if not (math.isfinite(loss) and bool(whole.isfinite().all())):
                return Exactness("", NOT_FINITE)
            each = []
            for part in parts:
                found.begin(len(part))
                each.append(_gradient(run, partial(_part_loss, run, rows.part(part), rows.batch)))
            for kind in SHARES:
                own = _difference(rows.shares(parts, kind), each, whole, loss)
                differences[kind] = float(np.maximum(differences[kind], own))
            turn()
    moved = known and any(rows.span(part).start for part in parts)
    most = max(found.rounding, MOVED_ROUNDING) if moved else found.rounding
    kind = min(SHARES, key=lambda kind: (not differences[kind] <= most, SHARES.index(kind)))
    if differences[kind] <= most:
        return Exactness(kind, draws=found.drew)
    return Exactness("", _MEET.format(min(differences.values())))


@contextmanager
def _shaken(targets: Sequence[TargetModule], seed: int, by: float = SHAKEN) -> Iterator[Callable[[], None]]:
    """Add random values to the adapters inside; yield a function that flips the sign of B."""
    generator = torch.Generator().manual_seed(seed)
    before = [(weight, weight.detach().clone()) for t in targets for weight in (t.weight_a, t.weight_b)]
    try:
        with torch.no_grad():
            for weight, _ in before:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise, alpha=by)

        def turn() -> None:
            with torch.no_grad():
                for target in targets:
                    target.weight_b.neg_()

        yield turn
    finally:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)


def _part_loss(run: TrainingRun, part: Batch, whole: Batch) -> torch.Tensor:
    return run.part_loss(part, whole) if run.part_loss else run.loss(part)


def uneven(rows: BatchRows, parts: Sequence[Sequence[int]], cuts: Cuts, *, known: bool) -> BatchRows:
    """Return the same rows with fewer counted labels in one, so that means over rows and over tokens differ.

    That row counts its first token, which causal language models do not predict. In a packed row they would predict it
    from the previous text. Labels of rows change only under a `known` loss, one that ignores `IGNORED`.
    """
    if rows.predicted is None or len(parts) < 2:
        return rows
    labels = rows.batch["labels"].clone()
    if labels.dim() == 1:
        counted = labels[labels != IGNORED]
        if known and len(parts[0]) > 1 and len(counted):
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
