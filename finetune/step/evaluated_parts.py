"""Evaluations in parts: an evaluation batch is split as in training, and its results are joined again.

Losses of a Trainer's evaluations need not be averaged as in its steps, and its results may take any form. So the first
batch is tested: some of its rows, whole and in two parts. If the results differ, batches run whole. Under an unknown
loss, whole batches are tested in their parts, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ...common.errors import first_line
from ...cost.batch_shape import Batch, tensors_of
from ...cost.record.calibration import CUT_FAILS
from ...data.batches import IGNORED
from .batch_rows import SHARES, BatchRows
from .exact_parts import TESTED_ROWS, rounding_of, rows_of, uneven
from .parts import StepParts
from .watched_parts import News

SMALLER = 4.0
"""Factor on the assumed bytes of parts after one ran out of memory; after a second error rows run alone."""

Result = tuple[torch.Tensor | None, Any, Any]
"""Result of `Trainer.prediction_step`: loss, predictions and labels, each tensors in any nesting, or None."""


class EvaluatedParts:
    """The evaluations of a run.

    Args:
        parts: the parts of the run's steps.
        tell: called with a line if batches run whole.

    Attributes:
        on: True if evaluation batches run in parts; None before the first.
    """

    def __init__(self, parts: StepParts, tell: Callable[[str], None]) -> None:
        self._parts, self._tell = parts, tell
        self.on: bool | None = None
        self._kind, self._token_bytes, self._share = "", 0.0, 1.0
        self._news: News | None = None
        self._batches = 0

    def run(self, evaluate: Callable[[Batch], Result], batch: Batch, whole: str, unknown: str) -> Result:
        """Evaluate a batch.

        Args:
            evaluate: runs the Trainer's step on a batch.
            batch: the Trainer's batch.
            whole: why batches run whole, for people; empty if nothing prevents parts.
            unknown: why the loss is not known; batches then run whole unless the user asks for parts.

        Raises:
            torch.OutOfMemoryError: a single row does not fit.
        """
        rows = rows_of(batch, self._parts.cuts, 1) if self._parts.on and self.on is not False else None
        if rows is None or rows.examples < 2:
            return evaluate(batch)
        if self.on is None:
            self._decide(evaluate, rows, whole, unknown)
            if not self.on:
                return evaluate(batch)
        for smaller in (1.0, SMALLER, math.inf):
            self._share *= smaller
            parts = [part.rows for part in self._parts.plans.of_evaluation(rows, self._token_bytes, self._share)]
            try:
                if len(parts) == 1 and rows.part(parts[0]) is batch:
                    return evaluate(batch)
                found = self._joined(rows, parts, [evaluate(rows.part(part)) for part in parts])
                return self._compared(evaluate, rows, parts, found)
            except torch.OutOfMemoryError:  # retried outside, since the exception holds the part's tensors
                if math.isinf(self._share):
                    raise
            except CUT_FAILS as error:
                self._stop(f"results of parts cannot be joined ({first_line(error)})")
                return evaluate(batch)
        raise AssertionError("the last parts are single rows")

    def _compared(
        self, evaluate: Callable[[Batch], Result], rows: BatchRows, parts: Sequence[Sequence[int]], found: Result
    ) -> Result:
        """Return the result of a batch in parts, or of the whole batch if it is tested and differs."""
        self._batches += 1
        if self._news is None or not self._news.due(self._batches, rows, parts):
            return found
        try:
            whole = evaluate(rows.batch)
        except torch.OutOfMemoryError:
            return found
        loss = (whole[0], found[0])
        rounding = max((rounding_of(tensor.dtype) for tensor in tensors_of(whole)), default=0.0)
        same = loss[0] is None or loss[1] is None or abs(float(loss[1] - loss[0])) <= rounding * abs(float(loss[0]))
        if same and all(map(partial(_close, rounding=rounding), tensors_of(found[1:]), tensors_of(whole[1:]))):
            return found
        self._stop("a later batch gave other results in parts")
        return whole

    def _stop(self, reason: str) -> None:
        self.on = False
        self._tell(f"Evaluation batches run whole, not in parts: {reason}.")

    def shrink(self, share: float) -> None:
        """Let parts take less, after an evaluation whose peak was this share of the budget."""
        self._share *= share

    def _decide(self, evaluate: Callable[[Batch], Result], rows: BatchRows, whole: str, unknown: str) -> None:
        """Test on some rows whether results of parts match those of a batch."""
        self._news = News(0) if unknown and self._parts.asked else None
        reason = whole or ("an example spans several rows" if self._parts.plans.each > 1 else "")
        reason = reason or (unknown if not self._news else "")
        if not reason:
            try:
                reason = self._tested(evaluate, rows, TESTED_ROWS)
            except torch.OutOfMemoryError:
                reason = "single rows run out of memory"
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                reason = f"the evaluation fails on part of a batch ({first_line(error)})"
        self.on = True
        if reason:
            self._stop(reason)

    def _tested(self, evaluate: Callable[[Batch], Result], rows: BatchRows, count: int) -> str:
        """Test the shortest rows, as many as fit in memory; return why batches run whole, or nothing."""
        order = np.argsort(rows.lengths, kind="stable")[:count]
        cuts = self._parts.cuts
        some = BatchRows.of(rows.part(sorted(order.tolist())), cuts)
        parts = [sorted(part.tolist()) for part in np.array_split(np.argsort(-some.lengths, kind="stable"), 2)]
        some = uneven(some, parts, cuts, known=self._news is None)
        try:
            whole, each = evaluate(some.batch), [evaluate(some.part(part)) for part in parts]
        except torch.OutOfMemoryError:
            if count <= 2:
                raise
            whole = None
        if whole is None:
            return self._tested(evaluate, rows, 2)
        rounding = max(rounding_of(tensor.dtype) for tensor in tensors_of(whole)) if tensors_of(whole) else 0.0
        if whole[0] is not None:
            losses = {kind: _loss(some, parts, kind, each) for kind in SHARES}
            size = max(abs(float(whole[0])), 1e-12)
            differences = {kind: abs(loss - float(whole[0])) / size for kind, loss in losses.items()}
            self._kind = min(SHARES, key=lambda kind: (not differences[kind] <= rounding, SHARES.index(kind)))
            if not differences[self._kind] <= rounding:
                return f"in parts the loss differs by {min(differences.values()):.2g}"
        found = self._joined(some, parts, each)
        outputs = sum(tensor.nbytes for tensor in tensors_of(whole[1:]))
        self._token_bytes = 2.0 * outputs / (some.examples * some.shape.length)
        pairs = zip(tensors_of(found[1:]), tensors_of(whole[1:]), strict=True)
        same = all(_close(one, other, rounding) for one, other in pairs)
        return "" if same else "predictions differ in parts"

    def _joined(self, rows: BatchRows, parts: Sequence[Sequence[int]], results: Sequence[Result]) -> Result:
        """Join the results of a batch's parts; unknown values of padding are `IGNORED`."""
        loss = None
        if (first := results[0][0]) is not None:
            loss = first.new_tensor(_loss(rows, parts, self._kind, results))
        spans = [rows.span(part) for part in parts]

        def join(values: Sequence[Any]) -> Any:
            one = values[0]
            if isinstance(one, Mapping):
                return {name: join([value[name] for value in values]) for name in one}
            if isinstance(one, list | tuple):
                return type(one)(map(join, zip(*values, strict=True)))
            return None if one is None else _placed(rows, parts, spans, values)

        return loss, join([result[1] for result in results]), join([result[2] for result in results])


def _loss(rows: BatchRows, parts: Sequence[Sequence[int]], kind: str, results: Sequence[Result]) -> float:
    """Return the loss of a batch; a part without predictions, whose mean is NaN, adds nothing."""
    shares = rows.shares(parts, kind)
    return sum(
        share * float(loss) for share, (loss, _, _) in zip(shares, results, strict=True) if share and loss is not None
    )


def _placed(
    rows: BatchRows, parts: Sequence[Sequence[int]], spans: Sequence[slice], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Merge tensors of parts into one of the batch, with rows and tokens in their original places."""
    length = rows.shape.length
    sizes = [value.shape[1] for value in values if value.dim() > 1]
    by_token = bool(sizes) and sizes == [span.stop - span.start for span in spans]
    shape = [rows.examples, *([length] if by_token else values[0].shape[1:2]), *values[0].shape[2:]]
    found = values[0].new_full(shape, IGNORED)
    for part, span, value in zip(parts, spans, values, strict=True):
        if value.shape[0] != len(part):
            raise ValueError(f"{value.shape[0]} results for {len(part)} rows")
        places = torch.as_tensor(part, device=value.device)
        if by_token:
            found[places, span] = value
        else:
            found[places] = value
    return found


def _close(one: torch.Tensor, other: torch.Tensor, rounding: float) -> bool:
    """True if predictions are the same, except for skipped padding."""
    if one.shape != other.shape:
        return False
    known = (one != IGNORED) | (other == IGNORED)
    most = float(other.float().abs().max()) if other.numel() else 0.0
    return bool(((one - other).float().abs()[known] <= rounding * most + 1e-7).all())
