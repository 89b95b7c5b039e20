"""The blocks of an unmodified transformer, run from any block on, with runs that join the batch on the way.

Below its lowest adapter a run computes what the frozen model computes. So it need not be there: `Blocks.frozen` gives
the hidden states that enter a block, once for all runs with the same inputs, and `Blocks.joined` lets each run join the
batch at its block with them. They require no gradient, so the backward pass of a run ends at its block.

The products of one module with the factors of the runs in a batch, each at about its own width.

The buffers give all runs one width, zero beyond each rank. But zeros cost as much as other numbers: so neighbours in
the batch that have about the same width share their products (a segment), and runs without an adapter take no part.
What is left out are products of zeros, and widths are multiples of 16: so results are those of the whole width, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...common.arrays import IntArray
from ...errors import UnsupportedError
from ..spec import ModuleSpec
from .adapters import WIDTH_STEP, Pair

FORWARD_TOKENS = 4096
"""Tokens of a forward pass without gradients."""

States = Mapping[int, torch.Tensor]
"""Hidden states that enter a block, (rows, length, width), by block."""


class _Reached(Exception):
    """The last block that is wanted has been entered."""


class Blocks:
    """The list of blocks that holds all target modules of a model.

    Args:
        model: takes `input_ids`. Its blocks take hidden states (rows, length, width) first, and what else they take
            fits any number of rows.
        targets: modules of it.

    Raises:
        UnsupportedError: there is no such list.
    """

    def __init__(self, model: nn.Module, targets: Sequence[ModuleSpec]) -> None:
        self._model = model
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        prefixes = [name for name in lists if all(t.name.startswith(f"{name}.{t.block}.") for t in targets)]
        if not prefixes:
            raise UnsupportedError(
                "Stacked runs need a model whose target modules lie in one list of blocks, such as `model.layers.3.`; "
                f"got {targets[0].name!r} among them."
            )
        parent, _, self._name = prefixes[0].rpartition(".")
        self._parent = model.get_submodule(parent)
        self._all: nn.ModuleList = getattr(self._parent, self._name)
        self._numbers = np.array([target.block for target in targets])
        self._states: States = {}
        self._seen: dict[int, torch.Tensor] | None = None
        self._last = 0
        for block, module in enumerate(self._all):
            module.register_forward_pre_hook(self._hook(block))

    def _hook(self, block: int) -> Callable[..., tuple[Any, ...] | None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._seen is not None:
                self._seen[block] = args[0]
                if block == self._last:
                    raise _Reached
            if block not in self._states:
                return None
            new = self._states[block]
            return (new if block == min(self._states) else torch.cat([args[0], new]), *args[1:])

        return enter

    def entries(self, ranks: IntArray) -> list[int]:
        """The block of each run's lowest adapter, the last one of runs without any.

        Args:
            ranks: (runs, modules).
        """
        last = len(self._all) - 1
        lowest: list[int] = np.where(ranks > 0, self._numbers, last).min(axis=1).tolist()
        return lowest

    @torch.no_grad()
    def frozen(self, tokens: torch.Tensor, blocks: Sequence[int]) -> States:
        """The hidden states of the frozen model that enter some blocks.

        Args:
            tokens: int64 (rows, length).
            blocks: numbers from 0, at least one.
        """
        parts = []
        for part in torch.split(tokens, max(1, FORWARD_TOKENS // tokens.shape[1])):
            self._seen, self._last = {}, max(blocks)
            try:
                self._model(input_ids=part)
            except _Reached:
                parts.append(self._seen)
            finally:
                self._seen = None
        return {block: torch.cat([seen[block] for seen in parts]) for block in blocks}

    @contextmanager
    def joined(self, states: States) -> Iterator[torch.Tensor]:
        """Let rows join the batch, those of each block behind all that came before.

        Args:
            states: with which they enter each block; the model starts with the lowest one.

        Yields:
            Token ids (1, length) to call the model with; they give the length alone.
        """
        first = min(states)
        self._states = states
        setattr(self._parent, self._name, self._all[first:])
        try:
            yield torch.zeros(1, states[first].shape[1], dtype=torch.int64, device=states[first].device)
        finally:
            self._states = {}
            setattr(self._parent, self._name, self._all)


OVERHEAD = 3e6
"""What the calls of a segment, forward and backward, cost in multiplications and additions (60 us on one CPU core)."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbours in a batch that share the products of a module.

    Attributes:
        place: of the runs in the batch.
        scaling: of each run, (runs, 1, 1).
        weights: A and B^T of all runs at the width of the segment, views of the buffers.
        gradients: theirs.
        rows: of the runs in the buffers: a slice if they are neighbours there too, else int64 (runs,).
    """

    place: slice
    scaling: torch.Tensor
    weights: Pair
    gradients: Pair
    rows: slice | torch.Tensor

    def factors(self) -> Pair:
        """A (runs, width, d_in) and B^T (runs, width, d_out) now."""
        a, b = self.weights
        return a[self.rows], b[self.rows]


def cut(ranks: Sequence[int], operations: float) -> list[tuple[int, int, int]]:
    """The segments with the lowest cost: start, end and width of each; runs of rank 0 may be outside of all.

    Args:
        ranks: of the runs in the batch.
        operations: multiplications and additions of one run and one component, forward and backward.
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
    """The segments of a module.

    Args:
        rows: of the runs in the batch, in the buffers.
        ranks: theirs in this module.
        tokens: of each run.
        scalings: of the runs in the batch, (runs, 1, 1).
        weights: A and B^T of all runs, views of the buffers.
        gradients: theirs.
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


def add_deltas(y: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Add s * x A^T B^T to y in place; y is (runs, tokens, d_out), x is (runs, tokens, d_in)."""
    for segment in segments:
        a, b = segment.factors()
        y[segment.place].baddbmm_(torch.bmm(x[segment.place], a.mT).mul_(segment.scaling), b)
    return y


class AddDeltas(torch.autograd.Function):
    """`add_deltas`; the backward pass writes the gradients of A and B into their buffers."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment], anchor: torch.Tensor
    ) -> torch.Tensor:
        """The anchor requires a gradient, so that autograd calls `backward` even if y and x do not."""
        del anchor
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
        """The gradients of y and x."""
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
