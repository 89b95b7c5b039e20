"""Tests whether a step may run in parts: the gradient of some rows, as a whole and in parts.

Before training the test finds out what the losses of parts are multiplied with: a loss may be a sum over rows, a mean
over rows or one over tokens. It is no proof, since what is rare is in no test of a few rows. So a loss is known to be
such a sum (`known_losses.py`), or its user has asked for parts, and real batches are tested during the run
(`watched_parts.py`).
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

from ..cost.batch_shape import Batch
from ..cost.calibration import CUT_FAILS
from ..cost.model_states import trained_outside
from ..data.batches import IGNORED
from ..errors import UnsupportedError, first_line
from ..lora.targets import TargetModule
from .batch_rows import NEXT_TOKENS, ROWS, SHARES, TOKENS, BatchRows, Cuts
from .run import TrainingRun

TESTED_ROWS = 4
"""Examples of the test at most: two parts of two."""

TRIES = 4
"""Batches that are tried until one has a loss: all labels of a few rows may be masked."""

NOT_FINITE = "the loss of the first rows is not finite"

ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""The relative difference of two gradients that is rounding, by the lowest precision of the step: two last places of a
number. `FULL_ROUNDING` in full precision, where a gradient in parts differs by 4e-7 to 2e-6."""

SHAKEN, NUDGED = 0.1, 0.01
"""Standard deviations of what is added to adapters, before training and in tests of real batches: many of the rows of a
model that is shaken look alike."""

FULL_ROUNDING, TF32_ROUNDING = 1e-5, 2**-9


@dataclass(frozen=True)
class Exactness:
    """What a test has found.

    Attributes:
        kind: what the loss is of its rows, one of `SHARES`; empty where steps run as a whole.
        reason: why they do, for people.
        draws: whether the step draws numbers at random, as dropout does.
        packed: whether the rows of the test were texts of one packed row; else such a row is not split.
    """

    kind: str
    reason: str = ""
    draws: bool = False
    packed: bool = False


class _EqualDropout:
    """Has dropout draw the same numbers for each shape inside, and notes the precisions of all results.

    The mask of a call is that of its place among the calls of a pass, and of the last axis: all rows and tokens have
    the same. Copies of the rows side by side have masks of their own, since a loss may compare them (R-Drop, Liang et
    al., 2021, arXiv 2106.14448). Under a loss that is known, dropout is left out.

    A model in full precision is not under autocast inside: a small part of a loss would be lost in the rounding.

    Args:
        model: the PEFT model.
        known: whether the loss is known.

    Attributes:
        drew: whether any dropout drew numbers.
        dtypes: of what modules return.
        examples: of the batch that runs.
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
        """Begin a pass on a batch of so many examples, whose calls of dropout are counted anew."""
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
        """The relative difference that is rounding; see `ROUNDING`."""
        return max(map(rounding_of, self.dtypes), default=rounding_of(torch.float32))


def rounding_of(dtype: torch.dtype) -> float:
    """The relative difference that is rounding in results of this precision, or of products in it; see `ROUNDING`."""
    products = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    return max(ROUNDING.get(dtype, 0.0), TF32_ROUNDING if products else FULL_ROUNDING)


def _entered_off(autocast: Any, enter: Callable[[Any], Any]) -> Any:
    """Enter an autocast that is off this time."""
    before, autocast._enabled = autocast._enabled, False
    try:
        return enter(autocast)
    finally:
        autocast._enabled = before


def exactness_of(run: TrainingRun, targets: Sequence[TargetModule], seed: int, *, known: bool) -> Exactness:
    """Find out how losses of parts count, and whether a few rows have the same gradient in parts.

    Training goes on as if nothing had run. Adapters have random values meanwhile, and then the same ones with B of the
    other sign: where they change nothing yet, a part of the loss may be zero that is not zero later, as the divergence
    from the base model is under KTO.

    Args:
        run: the run.
        targets: the target modules of its model.
        seed: of the choice of rows, and of these values.
        known: whether the loss is known to be a sum over rows or tokens.
    """
    cuts = run.cuts

    def tested(count: int = TESTED_ROWS) -> Exactness:
        try:
            for batch in run.small_batches(TRIES, min(run.rows, count), seed):
                rows = BatchRows.of(batch, cuts, run.step.rows_per_example)
                if not known and rows.examples < TESTED_ROWS:
                    return Exactness("", f"a test of it takes {TESTED_ROWS} rows")
                with _shaken(targets, seed) as turn:
                    found = replace(_tested(run, rows, turn, known=known), packed=rows.packed)
                if found.reason != NOT_FINITE:
                    break
            return found
        except UnsupportedError as error:
            return Exactness("", str(error).rstrip("."))
        except torch.OutOfMemoryError:  # which holds the tensors of the step until it is left
            if run.replicas.sharded:  # and the other processes in the middle of the test
                raise
        except CUT_FAILS as error:
            return Exactness("", f"the loss does not take a part of a batch ({first_line(error)})")

        if count > 2:
            return tested(2)
        return Exactness("", f"{count} rows ran out of memory in the test of it")

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
    """Why a real batch in its real parts is not the whole batch, for people; empty where it is.

    The loop's own steps run, with what they do after the backward pass. Adapters have random values beside their own
    meanwhile: gradients of rows that are learned are rounding. Training goes on as if nothing had run.

    Args:
        run: the run.
        targets: the target modules of its model.
        rows: of the batch.
        parts: the places of their examples.
        kind: what the loss is of its rows, one of `SHARES`.
        seed: of these values.

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
        return f"the loss does not take a part of a batch ({first_line(error)})"
    if not (math.isfinite(loss) and bool(whole.isfinite().all())):
        return ""
    difference = _difference([1.0], [(each, sums)], whole, loss)
    return "" if difference <= found.rounding else _MEET.format(difference)


_MEET = "in parts the gradient of a step differs by {:.2g} of its size, since rows meet in it"


def _stepped(
    run: TrainingRun, dropout: _EqualDropout, whole: Batch, steps: Sequence[tuple[Batch, float, int]]
) -> tuple[torch.Tensor, float]:
    """The gradient and the loss that the loop's own steps leave together, of parts with their shares and examples."""
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
        for _ in range(2):
            found.begin(rows.examples)
            buffers = [(name, buffer, buffer.clone()) for name, buffer in run.model.named_buffers()]
            whole, loss = _gradient(run, partial(run.loss, rows.batch))
            now = dict(run.model.named_buffers())
            for name, buffer, before in buffers:
                if now.get(name) is not buffer or not torch.equal(buffer, before):
                    return Exactness("", f"a forward pass writes into {name}")
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
    kind = min(SHARES, key=lambda kind: (not differences[kind] <= found.rounding, SHARES.index(kind)))
    if differences[kind] <= found.rounding:
        return Exactness(kind, draws=found.drew)
    return Exactness("", _MEET.format(min(differences.values())))


@contextmanager
def _shaken(targets: Sequence[TargetModule], seed: int, by: float = SHAKEN) -> Iterator[Callable[[], None]]:
    """Add random values to the adapters inside; yields what gives B the other sign."""
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
    """The same rows with fewer counted labels in one, so that means over rows and over tokens are two numbers.

    That row counts its first token, which causal language models predict from nothing. In a packed row they would
    predict it from the text before. Labels of rows change only under a loss that is `known`, which counts no `IGNORED`.
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
    """The difference of the gradients' sum over the whole gradient, or of the losses if that is more."""
    total = sum(share * gradient for share, (gradient, _) in zip(shares, parts, strict=True))
    losses = sum(share * value for share, (_, value) in zip(shares, parts, strict=True))
    size = max(float(whole.norm()), 1e-30)
    return float(np.maximum(float((total - whole).norm()) / size, abs(losses - loss) / max(abs(loss), 1e-30)))


def _gradient(run: TrainingRun, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The gradient of a loss by all that trains, as one vector in fp32, and the loss; gradients are cleared."""
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
    """The rows of a batch; None where something in it belongs to no row, or where it is `packed` and may not be."""
    try:
        rows = BatchRows.of(batch, cuts, each)
    except UnsupportedError:
        return None
    return rows if packed or not rows.packed else None
