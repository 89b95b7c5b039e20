"""The LoRA pairs and Adam states of many runs, trained together on one frozen, unmodified model.

The batches of the runs are concatenated: x has shape (runs * rows, length, d). Each target module has stacked factors
A (runs, width, d_in) and B^T (runs, width, d_out), zero beyond the rank of each run, and a forward hook adds
s * x A^T B^T, with a scaling s per run and module. A component with both factors zero has zero gradients, so Adam
leaves it at zero: no masks are needed, and each run computes the same result as on its own.

All factors of a run form one row of a flat buffer, as do their gradients and both Adam moments. Widths are multiples
of 16: oneMKL matrix products of such widths do not depend on the width, so a run's result is bit-identical regardless
of the other runs.

Multiplying by zeros is not free. Batch neighbors of similar width share their products (a segment), and runs without
an adapter are skipped. Only products of zeros are left out, so results are bit-identical to those at full width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.adamw import adamw

from ...common.arrays import FloatArray, IntArray
from ...common.errors import UnsupportedError
from ...lora.targets import TargetModule

WIDTH_STEP = 16
"""Widths are multiples of this; see the module docstring of `env/stack/adapters.py`."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B^T of one module, (runs, width, d_in) and (runs, width, d_out)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of all factors in a row of a buffer: A of all modules, then B^T of all modules.

    Attributes:
        widths: number of components allocated for each module, int64 (modules,).
        d_in: input width of each module, int64 (modules,).
        d_out: output width of each module, int64 (modules,).
    """

    widths: IntArray
    d_in: IntArray
    d_out: IntArray

    @property
    def size(self) -> int:
        """Number of elements in a row."""
        return int(self.widths @ (self.d_in + self.d_out))

    @property
    def bounds(self) -> IntArray:
        """Start of each factor in a row, A of all modules then B^T of all, and the row's end, (2 * modules + 1,)."""
        sizes = np.concatenate([self.widths * self.d_in, self.widths * self.d_out])
        return np.concatenate([[0], np.cumsum(sizes)])

    def pairs(self, flat: torch.Tensor) -> list[Pair]:
        """Views of a buffer (runs, size), one pair per module."""
        starts, widths = self.bounds.tolist(), self.widths.tolist()
        dims = [*self.d_in.tolist(), *self.d_out.tolist()]
        views = [
            torch.unflatten(flat[:, start:end], 1, (width, d))
            for start, end, width, d in zip(starts, starts[1:], widths * 2, dims, strict=False)
        ]
        return list(zip(views[: len(widths)], views[len(widths) :], strict=True))


OVERHEAD = 3e6
"""Call overhead of a segment, forward and backward, in multiply and add operations (60 us on one CPU core)."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Batch neighbors sharing the products of a module.

    Attributes:
        place: position of the runs in the batch.
        scaling: scaling of each run, (runs, 1, 1).
        weights: A and B^T of all runs at the width of the segment, views of the buffers.
        gradients: gradients of `weights`.
        rows: rows of the runs in the buffers: a slice if contiguous, else int64 (runs,).
    """

    place: slice
    scaling: torch.Tensor
    weights: Pair
    gradients: Pair
    rows: slice | torch.Tensor

    def factors(self) -> Pair:
        """Current A (runs, width, d_in) and B^T (runs, width, d_out)."""
        a, b = self.weights
        return a[self.rows], b[self.rows]


def cut(ranks: Sequence[int], operations: float) -> list[tuple[int, int, int]]:
    """Return the cheapest segments as (start, end, width); runs of rank 0 may belong to none.

    Args:
        ranks: ranks of the runs in the batch.
        operations: multiplications and additions per run and component, forward and backward.
    """
    widths = [-(-rank // WIDTH_STEP) * WIDTH_STEP for rank in ranks]
    if len(set(widths)) == 1:
        return [(0, len(widths), widths[0])] if widths[0] else []
    costs: list[float] = [0.0]
    last: list[tuple[int, int] | None] = [None]
    for end, width in enumerate(widths, start=1):
        best, segment, widest = (costs[-1], None, 0) if not width else (float("inf"), None, 0)
        for start in range(end - 1, -1, -1) if width else ():
            widest = max(widest, widths[start])
            cost = costs[start] + OVERHEAD + operations * widest * (end - start)
            if cost < best:
                best, segment = cost, (start, widest)
        costs.append(best)
        last.append(segment)
    segments, end = [], len(widths)
    while end:
        found = last[end]
        if found:
            segments.append((found[0], end, found[1]))
        end = found[0] if found else end - 1
    return segments[::-1]


def make_segments(
    rows: Sequence[int], ranks: Sequence[int], tokens: int, scalings: torch.Tensor, weights: Pair, gradients: Pair
) -> list[Segment]:
    """Build the segments of a module.

    Args:
        rows: buffer rows of the runs in the batch.
        ranks: their ranks in this module.
        tokens: tokens per run.
        scalings: scalings of the runs in the batch, (runs, 1, 1).
        weights: A and B^T of all runs, views of the buffers.
        gradients: gradients of `weights`.
    """
    a, b = weights
    segments = []
    for start, end, width in cut(ranks, 6.0 * tokens * (a.shape[2] + b.shape[2])):
        own = list(rows[start:end])
        neighbours = own == list(range(own[0], own[0] + len(own)))
        index = slice(own[0], own[-1] + 1) if neighbours else torch.tensor(own, device=a.device)
        views = [(pair[0][:, :width], pair[1][:, :width]) for pair in (weights, gradients)]
        segments.append(Segment(slice(start, end), scalings[start:end], views[0], views[1], index))
    return segments


class AddDeltas(torch.autograd.Function):
    """Add s * x A^T B^T to y in place; the backward pass writes the gradients of A and B into their buffers.

    y is (runs, tokens, d_out), x is (runs, tokens, d_in).
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment], anchor: torch.Tensor
    ) -> torch.Tensor:
        """Return y; the anchor requires grad, so autograd calls `backward` even if y and x do not."""
        kept = []
        for segment in segments:
            a, b = segment.factors()
            hidden = torch.bmm(x[segment.place], a.mT).mul_(segment.scaling)
            y[segment.place].baddbmm_(hidden, b)
            kept += [hidden, a, b]
        ctx.save_for_backward(x, *kept)
        ctx.segments = segments
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of y and x."""
        x, *kept = ctx.saved_tensors
        (grad_y,) = outputs
        grad_x = None
        if ctx.needs_input_grad[1]:
            covered = sum(segment.place.stop - segment.place.start for segment in ctx.segments)
            grad_x = torch.empty_like(x) if covered == len(x) else torch.zeros_like(x)
        for number, segment in enumerate(ctx.segments):
            hidden, a, b = kept[3 * number : 3 * number + 3]
            upper, grad = grad_y[segment.place], segment.gradients
            grad_hidden = torch.bmm(upper, b.mT).mul_(segment.scaling)
            grad[0][segment.rows] = torch.bmm(grad_hidden.mT, x[segment.place])
            grad[1][segment.rows] = torch.bmm(hidden.mT, upper)
            if grad_x is not None:
                torch.bmm(grad_hidden, a, out=grad_x[segment.place])
        return grad_y, grad_x, None, None


SHRINK_BELOW = 0.75
"""Buffers shrink only if their new size is at most this share of the old one."""

_ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
"""Settings of `adamw`: the defaults of transformers' Trainer, with no weight decay."""


@dataclass(frozen=True, eq=False)
class RunCopy:
    """Factors and Adam states of one run, as copied by `StackedAdapters.copy_run`.

    Attributes:
        ranks: int64 (modules,).
        ages: int64 (modules,).
        parts: weights, first moments and second moments in turn, A and B^T of each adapted module.
    """

    ranks: IntArray
    ages: IntArray
    parts: list[torch.Tensor]


class StackedAdapters:
    """Adapters and Adam states of several runs on one frozen model.

    Args:
        model: a plain model whose linear layers (or Conv1D) are named as the targets. It is frozen. It must have no
            active dropout and must process each row independently.
        targets: target modules, with names, shapes and scaling.
        runs: number of runs.

    Attributes:
        ranks: int64 (runs, modules); changed by `env/stack/runs.py`.
        scalings: factor of each product, float64 (runs, modules); changes with the ranks.
        ages: Adam steps of each pair since it was created or grew from rank 0, int64 (runs, modules).
        layout: positions of the factors in a row of a buffer.
        weights: the factors, (runs, layout.size).
        gradients: gradients of the latest `backward`, (runs, layout.size); zero beyond the rank of each run.
        first: Adam's first moments, (runs, layout.size).
        second: Adam's second moments, (runs, layout.size).
        sums: gradients of B summed since the last decision, for signals, (runs, layout.size); zero for A.

    Raises:
        UnsupportedError: a target is an embedding, or trains a bias or a magnitude.
    """

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule], runs: int) -> None:
        for target in targets:
            if target.embedding or len(target.parameters) > 2:
                raise UnsupportedError(
                    f"Target module {target.name!r} cannot be stacked: only plain LoRA pairs on linear layers can, "
                    "without bias, DoRA or embeddings."
                )
        self.model: nn.Module = model.requires_grad_(False)
        self.targets: list[TargetModule] = list(targets)
        self.ranks: IntArray = np.zeros((runs, len(targets)), dtype=np.int64)
        self.scalings: FloatArray = np.ones((runs, len(targets)))
        self.ages: IntArray = np.zeros((runs, len(targets)), dtype=np.int64)
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._rows: list[int] = []
        self._entries: list[int] | None = None
        d_in, d_out = np.array([(target.d_in, target.d_out) for target in targets], dtype=np.int64).T
        self.layout: Layout = Layout(np.zeros(len(targets), dtype=np.int64), d_in, d_out)
        self._piece = WIDTH_STEP * int(np.gcd.reduce(np.concatenate([d_in, d_out])))
        self._slices: dict[int, list[tuple[int, int, int]]] = {}
        self._allocate()
        for index, target in enumerate(targets):
            model.get_submodule(target.name).register_forward_hook(self._hook(index))

    def _allocate(self) -> None:
        shape = (len(self.ranks), self.layout.size)
        buffers = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(5)]
        self.weights, self.gradients, self.first, self.second, self.sums = buffers
        # Block (module and side) of each piece of a row.
        blocks = np.repeat(np.arange(2 * len(self.targets)), np.diff(self.layout.bounds) // self._piece)
        self._blocks = torch.from_numpy(blocks).to(self.device)
        self._views = {id(buffer): self.layout.pairs(buffer) for buffer in buffers}
        self.forget_slices()

    def _index(self, rows: Sequence[int]) -> slice | list[int]:
        """Return an index of these rows; a slice, which copies nothing, if they are all rows."""
        return slice(None) if list(rows) == list(range(len(self.ranks))) else list(rows)

    def pairs(self, buffer: torch.Tensor) -> list[Pair]:
        """Views of one of the buffers, one pair per module; cached per layout."""
        return self._views[id(buffer)]

    def forget_slices(self) -> None:
        """Drop cached slices; call after each change of ranks or ages."""
        self._slices = {}
        self._segments: dict[tuple[int, ...], list[Segment]] = {}
        self.gradients.zero_()

    @property
    def _buffers(self) -> tuple[torch.Tensor, ...]:
        """Buffers kept from step to step."""
        return self.weights, self.first, self.second, self.sums

    def make_room(self, ranks: IntArray) -> None:
        """Resize every module's width to fit these ranks, (runs, modules); clear gradients if any width changes.

        Widths shrink only if that saves a lot of memory; components beyond the new width must then be zero.
        """
        widths = -(-ranks.max(axis=0) // WIDTH_STEP) * WIDTH_STEP
        old, new = self.layout, Layout(widths, self.layout.d_in, self.layout.d_out)
        if bool((widths <= old.widths).all()) and new.size > SHRINK_BELOW * old.size:
            return
        old_buffers = [self.pairs(buffer) for buffer in self._buffers]
        self.layout = new
        self._allocate()
        common = np.minimum(widths, old.widths).tolist()
        for old_pairs, buffer in zip(old_buffers, self._buffers, strict=True):
            for width, old_pair, pair in zip(common, old_pairs, self.pairs(buffer), strict=True):
                for old_side, side in zip(old_pair, pair, strict=True):
                    side[:, :width] = old_side[:, :width]

    # Forward and backward ---------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, rows: Sequence[int], entries: Sequence[int] | None = None) -> Iterator[nn.Module]:
        """Yield the model, ready for batches of these runs in this order.

        Args:
            rows: the runs.
            entries: block where each run joins the batch, in increasing order (see `Blocks.joined`); None if all runs
                start at the first block.
        """
        self._rows, self._entries = list(rows), None if entries is None else list(entries)
        try:
            yield self.model
        finally:
            self._rows, self._entries = [], None

    def _hook(self, index: int) -> Callable[..., torch.Tensor]:
        d_in, d_out, block = self.targets[index].d_in, self.targets[index].d_out, self.targets[index].block

        def add_delta(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            runs = len(self._rows) if self._entries is None else bisect_right(self._entries, block)
            if not runs:
                return output
            x, y = args[0].reshape(runs, -1, d_in), output.reshape(runs, -1, d_out)
            segments = self._segments_of(index, runs, x.shape[1])
            if not segments:
                return output
            return AddDeltas.apply(y, x, segments, self._anchor).view(output.shape)  # type: ignore[no-any-return, no-untyped-call]

        return add_delta

    def _segments_of(self, index: int, runs: int, tokens: int) -> list[Segment]:
        """Segments of a module for the first runs of the batch."""
        rows = self._rows[:runs]
        key = (index, tokens, *rows)
        if key not in self._segments:
            pairs, ranks = (self.pairs(each)[index] for each in (self.weights, self.gradients)), self.ranks[rows, index]
            scalings = torch.from_numpy(self.scalings[rows, index]).to(self.device, self.dtype)[:, None, None]
            self._segments[key] = make_segments(rows, ranks.tolist(), tokens, scalings, *pairs)
        return self._segments[key]

    def backward(self, losses: torch.Tensor) -> None:
        """Compute `gradients` of the runs in the batch from their losses, (runs,); call within `running`."""
        if losses.requires_grad:  # at least one run has an adapter
            losses.sum().backward()  # type: ignore[no-untyped-call]

    # Adam -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def square_norms(self, rows: Sequence[int]) -> torch.Tensor:
        """Squared norm of the gradient of each A, then of each B, fp64 (len(rows), 2 * modules).

        The order of summation, and so the result, depends neither on the width nor on the other runs.
        """
        gradients = self.gradients[self._index(rows)]
        pieces = torch.linalg.vector_norm(torch.unflatten(gradients, 1, (-1, self._piece)), dim=-1).double().square()
        sums: torch.Tensor = pieces.new_zeros(len(rows), 2 * len(self.targets))
        return sums.index_add_(1, self._blocks, pieces)

    @torch.no_grad()
    def clip(self, rows: Sequence[int], max_norm: float) -> FloatArray:
        """Clip the gradients of each run to a norm; return squared norms of B's gradients, (len(rows), modules)."""
        squares = self.square_norms(rows)
        shares = (max_norm / (squares.sum(dim=1).sqrt() + 1e-6)).clamp(max=1.0)
        if not bool((shares == 1).all()):
            self.gradients[self._index(rows)] *= shares[:, None].to(self.dtype)
        return (squares[:, len(self.targets) :] * shares[:, None].square()).cpu().numpy()

    @torch.no_grad()
    def alignments(self, rows: Sequence[int]) -> FloatArray:
        """Cosine between each run's last step and its current descent direction, (len(rows),); 0 before the first step.

        Summed in the same order as `square_norms`.
        """
        index = self._index(rows)
        steps = self.first[index] / (self.second[index].sqrt() + _ADAMW["eps"])
        gradients = self.gradients[index]
        sums = []
        for product in (steps * gradients, steps * steps, gradients * gradients):
            pieces = torch.unflatten(product, 1, (-1, self._piece)).sum(dim=-1).double()
            sums.append(pieces.new_zeros(len(rows), 2 * len(self.targets)).index_add_(1, self._blocks, pieces))
        dot, *squares = (each.sum(dim=1) for each in sums)
        return (dot / (squares[0] * squares[1]).sqrt().clamp(min=1e-30)).cpu().numpy()

    @torch.no_grad()
    def copy_run(self, row: int) -> RunCopy:
        """Copy the factors and Adam states of a run, for `put_back_run`."""
        adapted = np.flatnonzero(self.ranks[row]).tolist()
        parts = [
            side[row, : int(self.ranks[row, module])].clone()
            for buffer in (self.weights, self.first, self.second)
            for module in adapted
            for side in self.pairs(buffer)[module]
        ]
        return RunCopy(self.ranks[row].copy(), self.ages[row].copy(), parts)

    @torch.no_grad()
    def put_back_run(self, row: int, copy: RunCopy) -> None:
        """Restore a run from a `copy_run` copy; its ranks must match the copy's."""
        assert np.array_equal(copy.ranks, self.ranks[row]), "ranks have changed since"
        self.ages[row] = copy.ages
        parts = iter(copy.parts)
        for buffer in (self.weights, self.first, self.second):
            for module in np.flatnonzero(copy.ranks).tolist():
                for side in self.pairs(buffer)[module]:
                    side[row, : int(copy.ranks[module])] = next(parts)
        self.forget_slices()

    @torch.no_grad()
    def step(self, rows: Sequence[int], rates: Sequence[float]) -> None:
        """Take one Adam step in these runs, each at its learning rate."""
        self.ages[list(rows)] += 1
        by_rate: dict[float, list[tuple[int, int, int, int]]] = {}
        for row, rate in zip(rows, rates, strict=True):
            oldest, slices = int(self.ages[row].max()), by_rate.setdefault(rate, [])
            slices += ((row, start, end, oldest - lag) for start, end, lag in self._slices_of(row))
        for rate, slices in by_rate.items():
            buffers = (self.weights, self.gradients, self.first, self.second)
            weights, gradients, first, second = ([buffer[row, a:b] for row, a, b, _ in slices] for buffer in buffers)
            ages = list(torch.tensor([age - 1.0 for *_, age in slices], device=self.device).unbind())
            adamw(weights, gradients, first, second, [], ages, fused=True, lr=rate, **_ADAMW)  # type: ignore[arg-type]

    def _slices_of(self, row: int) -> list[tuple[int, int, int]]:
        """Slices of a row whose adapted pairs share one age: start, end, and steps behind the oldest pair."""
        if row not in self._slices:
            adapted, bounds = np.tile(self.ranks[row] > 0, 2), self.layout.bounds
            lags = np.tile(self.ages[row].max() - self.ages[row], 2)
            blocks = np.stack([bounds[:-1], bounds[1:], lags], axis=1)[adapted].tolist()
            groups = [(lag, list(group)) for lag, group in groupby(blocks, key=lambda block: block[2])]
            self._slices[row] = [(group[0][0], group[-1][1], lag) for lag, group in groups]
        return self._slices[row]

    def add_to_sums(self, rows: Sequence[int]) -> None:
        """Add the gradients of B of these runs to `sums`."""
        index, start = self._index(rows), int(self.layout.bounds[len(self.targets)])  # A of all modules comes first
        self.sums[index, start:] += self.gradients[index, start:]
