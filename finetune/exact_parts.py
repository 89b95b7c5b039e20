"""Decides by test whether a step may run in parts: the gradient of a few rows, as a whole and in two parts.

Whether rows meet in a loss is no matter of its name: in-batch negatives, statistics of a batch, a balance loss of
experts. So the user's own loss is asked once, before training, and everything is put back. The test also finds out what
the losses of parts are multiplied with, since a loss may be a sum over rows, a mean over rows or one over tokens.
"""

from __future__ import annotations

import math
import re
from collections import deque
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
from .batch_rows import NEXT_TOKENS, ROWS, SHARES, TOKENS, BatchRows
from .run import TrainingRun

TESTED_ROWS = 4
"""Examples of the test at most: two parts of two."""

ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""The relative difference of two gradients that is rounding, by the lowest precision of the step: two last places of a
number. `FULL_ROUNDING` in full precision, where a gradient in parts differs by 4e-7 to 2e-6."""

SHAKEN = 0.1
"""The standard deviation of what is added to adapters in the test."""

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


class _WithoutDropout:
    """Leaves out dropout inside, which draws other numbers for each shape, and notes the precisions of all results.

    A model in full precision is not under autocast inside: a small part of a loss would be lost in the rounding.

    Args:
        model: the PEFT model.

    Attributes:
        drew: whether any dropout was left out.
        dtypes: of what modules return.
    """

    _DROPS = (
        *(f"{name}dropout" for name in ("", "alpha_", "feature_alpha_")),
        *(f"dropout{axes}d" for axes in (1, 2, 3)),
    )

    def __init__(self, model: nn.Module) -> None:
        self.drew = False
        self._full = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
        self.dtypes: set[torch.dtype] = set()
        self._undo = ExitStack()

    def __enter__(self) -> _WithoutDropout:
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

    def _kept(
        self, _: Any, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        self.drew |= training and p > 0
        return input

    def _attention(self, attend: Callable[..., torch.Tensor], *tensors: Any, **options: Any) -> torch.Tensor:
        self.drew |= bool(options.get("dropout_p"))
        return attend(*tensors, **{**options, **({"dropout_p": 0.0} if "dropout_p" in options else {})})

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


def exactness_of(run: TrainingRun, targets: Sequence[TargetModule], seed: int) -> Exactness:
    """Find out whether steps of a run may run in parts. Training goes on as if nothing had run.

    Adapters have random values meanwhile, and then the same ones with B of the other sign: where they change nothing
    yet, a part of the loss may be zero that is not zero later, as the divergence from the base model is under KTO.

    Args:
        run: the run.
        targets: the target modules of its model.
        seed: of the choice of rows, and of these values.
    """

    def tested(count: int = TESTED_ROWS) -> Exactness:
        (batch,) = run.small_batches(1, min(run.rows, count), seed)
        try:
            rows = BatchRows.of(batch, run.step.rows_per_example)
            with _shaken(targets, seed) as turn:
                return replace(_tested(run, rows, turn), packed=rows.packed)
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


def still_exact(run: TrainingRun, targets: Sequence[TargetModule], rows: BatchRows, kind: str, seed: int) -> Exactness:
    """Test the same again during a run, on some rows of its batch; training goes on as if nothing had run.

    Adapters have random values beside their own meanwhile, once: gradients of rows that are learned are rounding.

    Args:
        run: the run.
        targets: the target modules of its model.
        rows: of the test.
        kind: what the loss was of its rows. It stays where the test finds no number, or no memory.
        seed: of these values.
    """
    try:
        with _shaken(targets, seed) as turn:
            return _tested(run, rows, turn, kind)
    except torch.OutOfMemoryError:
        if run.replicas.sharded:
            raise
        return Exactness(kind)
    except (UnsupportedError, *CUT_FAILS) as error:
        return Exactness("", f"the loss does not take a part of a batch ({first_line(error)})")


NEAREST = 32
"""Operators that tell how a loss is computed."""

_LAYOUT = re.compile(r"(Unsafe|Reshape)?(View|Alias)|Reshape|Transpose|Permute|T|Clone|Expand|(Un)?[Ss]queeze")
"""Operators that compute nothing; torch takes one or another where it measures a step."""


def way_of(loss: torch.Tensor) -> int:
    """A number that tells how a loss is computed: by the names of the operators nearest to it in autograd's graph."""
    names, found = list[str](), deque([loss.grad_fn])
    while found and len(names) < NEAREST:
        if (node := found.popleft()) is not None:
            if not _LAYOUT.fullmatch(name := node.name().partition("Backward")[0]):
                names.append(name)
            found.extend(before for before, _ in node.next_functions)
    return hash(tuple(names))


def _tested(run: TrainingRun, rows: BatchRows, turn: Callable[[], None], before: str = "") -> Exactness:
    """The test on some rows; of what the loss was `before` it is still that, if it can be."""
    order = np.argsort(-rows.lengths, kind="stable")
    parts = [sorted(part.tolist()) for part in np.array_split(order, 2) if len(part)]
    rows = uneven(rows, parts)
    differences = dict.fromkeys(SHARES, 0.0)
    with _WithoutDropout(run.model) as found:
        for _ in range(1 if before else 2):
            whole, loss = _gradient(run, partial(run.loss, rows.batch))
            if not (math.isfinite(loss) and bool(whole.isfinite().all())):
                return Exactness(before, "" if before else "the loss of the first rows is not finite")
            each = [_gradient(run, partial(_part_loss, run, rows.part(part), rows.batch)) for part in parts]
            for kind in SHARES:
                differences[kind] = max(differences[kind], _difference(rows.shares(parts, kind), each, whole, loss))
            turn()
    kind = min(SHARES, key=lambda kind: (differences[kind] > found.rounding, kind != before, SHARES.index(kind)))
    if differences[kind] <= found.rounding:
        return Exactness(kind, draws=found.drew)
    nearest = min(differences.values())
    return Exactness("", f"in parts the gradient of a step differs by {nearest:.2g} of its size, since rows meet in it")


@contextmanager
def _shaken(targets: Sequence[TargetModule], seed: int) -> Iterator[Callable[[], None]]:
    """Add random values to the adapters inside; yields what gives B the other sign."""
    generator = torch.Generator().manual_seed(seed)
    before = [(weight, weight.detach().clone()) for t in targets for weight in (t.weight_a, t.weight_b)]
    try:
        with torch.no_grad():
            for weight, _ in before:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise, alpha=SHAKEN)

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


def uneven(rows: BatchRows, parts: Sequence[Sequence[int]]) -> BatchRows:
    """The same rows with fewer counted labels in one, so that means over rows and over tokens are two numbers.

    That row counts its first token, which causal language models predict from nothing. In a packed row they would
    predict it from the text before.
    """
    if rows.predicted is None or len(parts) < 2:
        return rows
    labels = rows.batch["labels"].clone()
    own = rows.of_example(labels, int(rows.predicted[1].argmax()))
    counted = (own != IGNORED).nonzero().flatten()
    if not len(counted):
        return rows
    if not rows.packed:
        own[:1] = own[counted[0]]
    kinds = (ROWS, TOKENS) if rows.packed else (ROWS, TOKENS, NEXT_TOKENS)
    found = BatchRows.of({**rows.batch, "labels": labels.clone()}, rows.each)
    for place in reversed(counted[1:].tolist()):
        if len({round(found.shares(parts, kind)[0], 3) for kind in kinds}) == len(kinds):
            break
        own[place] = IGNORED
        found = BatchRows.of({**rows.batch, "labels": labels.clone()}, rows.each)
    return found


def _difference(
    shares: Sequence[float], parts: Sequence[tuple[torch.Tensor, float]], whole: torch.Tensor, loss: float
) -> float:
    """The difference of the gradients' sum over the whole gradient, or of the losses if that is more."""
    total = sum(share * gradient for share, (gradient, _) in zip(shares, parts, strict=True))
    losses = sum(share * value for share, (_, value) in zip(shares, parts, strict=True))
    size = max(float(whole.norm()), 1e-30)
    return max(float((total - whole).norm()) / size, abs(losses - loss) / max(abs(loss), 1e-30))


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


def rows_of(batch: Batch, each: int, *, packed: bool = False) -> BatchRows | None:
    """The rows of a batch; None where something in it belongs to no row, or where it is `packed` and may not be."""
    try:
        rows = BatchRows.of(batch, each)
    except UnsupportedError:
        return None
    return rows if packed or not rows.packed else None
