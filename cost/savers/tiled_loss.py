"""Tiled loss of a causal language model: no tensor of all logits is kept for the backward pass.

transformers' loss stores all log-probabilities in addition to the logits, and its backward pass two more tensors of
that size. Here they exist one tile at a time. The operators are torch's own, row by row.

With a frozen output layer, as under LoRA, tiles include its product (`cost/savers/later_logits.py`): the full logits
never exist, and the forward pass computes the gradient of the last hidden states tile by tile. Otherwise the logits
exist once, and their gradient overwrites them in the backward pass. A product of fewer rows may round differently from
one of all rows.

TRL tiles its own loss: `trl.kernels.chunked_logprob` multiplies the last hidden states with the output layer in tiles
of `TOKEN_CHUNK_SIZE` tokens, 4,096, forward and backward. Many batches are smaller, so their logits form one tile. With
a frozen output layer, tokens are independent: tiles of our size give the same losses and gradients in less memory
(`use_own_tiles`).

A small recorded step would fill part of one tile, and a run's batch fills several: the prediction would merge them into
one large tile. `scaled` therefore gives small steps small tiles, and records the number of tokens they divide.
`cost/tile_size.py` defines tile sizes.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from ...common.devices import autocast_dtype
from ...common.errors import UnsupportedError
from ..recording import BatchShape
from ..tile_size import RECORDED_TILES, LossTiles, TileSize, loss_tokens, recorded_tile

RECORDING: ContextVar[bool] = ContextVar("RECORDING", default=False)
"""True while recording a small step, which always has `RECORDED_TILES` tiles."""

_REDUCTIONS = {"mean": 1, "sum": 2}


@dataclass
class Expected:
    """The initial gradient of the last backward pass, expected again in the next one.

    The forward pass uses it for gradients of hidden states. If the actual one differs, they are computed again.
    """

    gradient: float = 1.0


@dataclass(frozen=True, eq=False)
class Product:
    """The product of hidden states and the output layer, followed by elementwise operations.

    Attributes:
        head: the output layer.
        expected: see `Expected`.
        autocast: precision of the product under autocast; None without.
        steps: elementwise functions of a tensor.
    """

    head: nn.Linear
    expected: Expected
    autocast: torch.dtype | None
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()

    def weight(self) -> torch.Tensor:
        """Return the layer's weight, (vocabulary, width), in the product's precision: one copy for all tiles."""
        weight: torch.Tensor = self.head.weight
        return weight if self.autocast is None else weight.to(self.autocast)

    def of(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the logits, (..., vocabulary), of hidden states, (..., width)."""
        bias: torch.Tensor | None = self.head.bias
        if self.autocast is not None:  # replicates autocast outside its context
            hidden, bias = hidden.to(self.autocast), None if bias is None else bias.to(self.autocast)
        return self.after(nn.functional.linear(hidden, weight, bias))

    def after(self, product: torch.Tensor) -> torch.Tensor:
        """Apply the elementwise operations to the product."""
        for step in self.steps:
            product = step(product)
        return product

    def then(self, step: Callable[[torch.Tensor], torch.Tensor]) -> Product:
        """Append an elementwise operation."""
        return replace(self, steps=(*self.steps, step))


_NONE = -100
"""Target of ignored tokens in the one-class view: the loss's own `ignore_index` may be 0."""


class TiledCrossEntropy(torch.autograd.Function):
    """The cross entropy of rows of logits, float32 (tokens, vocabulary), and targets, int64 (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        """Return the loss, a scalar."""
        place = torch.where(target == ignore_index, 0, target)
        found = logits.new_empty(len(target))
        for tile in _tiles(len(target)):
            picked = _picked(torch.log_softmax(tile.of(logits), 1), tile.of(place))
            tile.of(found).copy_(picked)
        zero = torch.where(target == ignore_index, _NONE, 0)
        # `data` holds the values without the graph, so other holders can be detected.
        ctx.logits, ctx.target, ctx.place, ctx.found = logits.data, target, place, found
        ctx.settings = ignore_index, reduction
        return nn.functional.nll_loss(found[:, None], zero, ignore_index=_NONE, reduction=reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return the gradient of the logits.

        Raises:
            UnsupportedError: the logits changed since the forward pass.
        """
        logits, target, place = ctx.logits, ctx.target, ctx.place
        ignore_index, reduction = ctx.settings
        weight = (target != ignore_index).sum().to(logits.dtype)
        result = logits if _held_once(logits) else torch.empty_like(logits)
        found = torch.empty_like(ctx.found)
        for tile in _tiles(len(target)):
            logarithms = torch.log_softmax(tile.of(logits), 1)
            tile.fresh(tile.of(found)).copy_(tile.fresh(_picked(logarithms, tile.of(place))))
            of_logarithms = torch.ops.aten.nll_loss_backward(
                gradient, logarithms, tile.of(target), None, _REDUCTIONS[reduction], ignore_index, weight
            )
            of_logits = torch.ops.aten._log_softmax_backward_data(of_logarithms, logarithms, 1, logits.dtype)
            tile.fresh(tile.of(result)).copy_(tile.fresh(of_logits))
            del logarithms, of_logarithms, of_logits  # before those of the next tile are created
        same = torch.isclose(found, ctx.found, rtol=0, atol=0, equal_nan=True).all()
        if not same.is_meta and not bool(same):
            raise UnsupportedError(
                "The logits were modified between the loss and its backward pass, or the backward pass ran "
                "twice. The tiled loss needs them unchanged and overwrites them with their gradient. Modify a "
                "copy of them, or pass exact_savers=False."
            )
        return result, None, None, None


@dataclass(frozen=True, eq=False)
class HeadLoss:
    """A cross entropy of rows of hidden states, with logits computed tile by tile.

    Attributes:
        product: computes logits from hidden states.
        target: int64 (tokens,).
        ignore_index: target of tokens without a loss.
        reduction: "mean" or "sum" over tokens.
        divisor: divides the loss; None for none.
        with_gradient: whether to compute the gradient of the hidden states too.
    """

    product: Product
    target: torch.Tensor
    ignore_index: int
    reduction: str
    divisor: torch.Tensor | int | None
    with_gradient: bool

    def run(
        self, hidden: torch.Tensor, gradient: float, result: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the logits of each tile.

        Args:
            hidden: rows of hidden states, (tokens, width).
            gradient: gradient of the loss.
            result: receives the gradient of the hidden states, in their shape; a new tensor by default.

        Returns:
            The log-probability of each target, (tokens,), and the gradient, if requested.
        """
        target, ignore, tokens = self.target, self.ignore_index, len(self.target)
        weight, place = self.product.weight(), torch.where(target == ignore, 0, target)
        found, of_loss, precise = None, None, autocast_dtype(hidden) is not None
        if self.with_gradient and result is None:
            result = torch.empty_like(hidden)
        for tile in _tiles(tokens):
            rows = tile.of(hidden).detach().requires_grad_(self.with_gradient)
            with torch.set_grad_enabled(self.with_gradient), _own_graph():
                logits = self.product.of(rows, weight)
                logits = logits.float() if precise else logits
            edge = get_gradient_edge(logits) if result is not None else None  # it holds no values
            values = torch.log_softmax(logits.detach(), 1)
            del logits
            if found is None or of_loss is None:
                found, of_loss = values.new_empty(tokens), values.new_full((), gradient)
                of_loss = of_loss if self.divisor is None else of_loss / self.divisor
                count = (target != ignore).sum().to(values.dtype)
            tile.of(found).copy_(_picked(values, tile.of(place)))
            if result is not None and edge is not None:
                of_logits = torch.ops.aten.nll_loss_backward(
                    of_loss, values, tile.of(target), None, _REDUCTIONS[self.reduction], ignore, count
                )
                torch.ops.aten._log_softmax_backward_data.out(of_logits, values, 1, values.dtype, out=of_logits)
                del values
                with torch.autocast(_autocast_kind(hidden), enabled=False):
                    (of_rows,) = torch.autograd.grad([edge], [rows], [of_logits])
                tile.fresh(tile.of(result)).copy_(tile.fresh(of_rows))
                del of_logits, of_rows
            del edge, rows  # before those of the next tile are created
        assert found is not None, "there is always a tile"
        return found, result


class TiledHeadLoss(torch.autograd.Function):
    """A `HeadLoss` of rows of hidden states, (tokens, width).

    The forward pass computes the gradient of the hidden states from the expected gradient of the loss.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: HeadLoss) -> torch.Tensor:
        """Return the loss, a scalar."""
        lower = autocast_dtype(hidden)
        ctx.loss, ctx.expected = loss, loss.product.expected.gradient
        ctx.autocast = partial(torch.autocast, _autocast_kind(hidden), lower, enabled=lower is not None)
        found, ctx.result = loss.run(hidden, ctx.expected)
        if loss.with_gradient:
            ctx.save_for_backward(hidden)
        zero = torch.where(loss.target == loss.ignore_index, _NONE, 0)
        value = nn.functional.nll_loss(found[:, None], zero, ignore_index=_NONE, reduction=loss.reduction)
        return value if loss.divisor is None else value / loss.divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        """Return the gradient of the hidden states."""
        result, ctx.result = ctx.result, None  # the context lives as long as the loss
        value = ctx.expected if gradient.is_meta else float(gradient)
        if result is None or value != ctx.expected:
            (hidden,) = ctx.saved_tensors
            with ctx.autocast():
                _, result = ctx.loss.run(hidden, value, result)
            if math.isfinite(value):
                ctx.loss.product.expected.gradient = value
        return result, None


def _own_graph() -> AbstractContextManager[None]:
    """Hide saved tensors from hooks, such as offloading to the CPU: a tile's graph is short-lived."""
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()  # a node holding its own output with its graph would keep itself alive


def _autocast_kind(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.is_meta else tensor.device.type


@dataclass(frozen=True)
class _Tile:
    """A tile: its first row, its number of rows, and the rows shared with an earlier tile.

    Uses `narrow`, the same operator for any rows, so steps of all sizes look alike.
    """

    start: int
    size: int
    done: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of the tile."""
        return tensor.narrow(0, self.start, self.size)

    def fresh(self, rows: torch.Tensor) -> torch.Tensor:
        """Return its rows not covered by an earlier tile."""
        return rows.narrow(0, self.done, self.size - self.done)


def _tiles(tokens: int) -> Iterator[_Tile]:
    """Yield equally sized tiles of the tokens; the last ones may overlap or contain nothing new."""
    recorded = RECORDING.get()
    size = recorded_tile(tokens) if recorded else TileSize().of(tokens)
    for number in range(RECORDED_TILES if recorded else -(-tokens // size)):
        start = min(number * size, tokens - size)
        yield _Tile(start, size, min(number * size - start, size))


def _picked(logarithms: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return logarithms.gather(1, place[:, None])[:, 0]


def _held_once(tensor: torch.Tensor) -> bool:
    """True if no other tensor shares the storage; the tensor and its query count as two."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) <= 2


MODULE, FUNCTION, TILE = "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", "TOKEN_CHUNK_SIZE"

_HEADS: list[Any] = []
"""References to output layers for which TRL's tiles get our size, a one-element tuple per run."""

_SIZERS: list[Any] = []
"""Stack of functions for TRL's tile size in recorded steps, from all tokens and the real tile size, in one-element
tuples.
"""

_UNWRAP: list[Callable[[], None]] = []


def use_own_tiles(model: nn.Module) -> Callable[[], None]:
    """Give TRL's fused loss our tile size for a frozen output layer; returns a function to undo it.

    Also undone once the layer is freed, for models that are only inspected.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        return lambda: None
    leave = _entered(_HEADS, weakref.ref(head))
    weakref.finalize(head, leave).atexit = False
    return leave


def _entered(entries: list[Any], entry: Any) -> Callable[[], None]:
    """Push an entry on one of the lists; returns a function to remove it. TRL's function stays wrapped meanwhile."""
    module = sys.modules.get(MODULE)
    if not _UNWRAP and hasattr(module, FUNCTION) and hasattr(module, TILE):  # TRL may be imported after a first entry
        _UNWRAP.append(_wrapped(module))
    entries.append(held := (entry,))

    def leave() -> None:
        at = next((at for at, other in enumerate(entries) if other is held), None)
        if at is not None:  # called again when the layer is freed
            del entries[at]
        if _UNWRAP and not _HEADS and not _SIZERS:
            _UNWRAP.pop()()

    return leave


def tile_size(weight: Any, usual: int) -> TileSize:
    """Return the tile size of a fused loss with an output layer of this weight; `usual` is that of the kernel."""
    heads = (each() for (each,) in _HEADS)
    head = next((each for each in heads if each is not None and each.weight is weight), None)
    own = head is not None and not any(parameter.requires_grad for parameter in head.parameters())
    return TileSize(most=usual) if own else TileSize(1, 1, usual)


def tile_tokens(tokens: int, size: TileSize) -> int:
    """Return the tile size for a number of tokens, also in recorded small steps."""
    return int(_SIZERS[-1][0](tokens, size) if _SIZERS else size.of(tokens))


def _wrapped(module: Any) -> Callable[[], None]:
    """Apply the lists' tile sizes to TRL's function in both passes; returns a function to undo it."""
    function, usual = getattr(module, FUNCTION), getattr(module, TILE)
    forward, backward = function.forward, function.backward

    def in_tiles(size: int, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        setattr(module, TILE, size)
        try:
            return run(*arguments, **options)
        finally:
            setattr(module, TILE, usual)

    def sized(context: Any, hidden: Any, weight: Any, *rest: Any, **options: Any) -> Any:
        context.tile = tile_tokens(len(hidden), tile_size(weight, usual))
        return in_tiles(context.tile, forward, context, hidden, weight, *rest, **options)

    def sized_backward(context: Any, *gradients: Any) -> Any:
        return in_tiles(getattr(context, "tile", usual), backward, context, *gradients)

    def unwrap() -> None:
        function.forward, function.backward = staticmethod(forward), staticmethod(backward)

    function.forward, function.backward = staticmethod(sized), staticmethod(sized_backward)
    return unwrap


@contextmanager
def scaled(tiles: LossTiles, shape: BatchShape) -> Iterator[None]:
    """Give a batch of this shape `RECORDED_TILES` inside the context, unless it is the whole batch."""
    whole, token = loss_tokens(tiles.whole), RECORDING.set(shape != tiles.whole)

    def note(tokens: int) -> None:
        tiles.divided[shape] = max(tiles.divided.get(shape, 0), tokens)

    def note_own(context: Any, rows: Any, *rest: Any) -> None:
        note(len(rows))

    def sizer(tokens: int, size: TileSize) -> int:
        if size.of(whole) == whole:  # a single tile, in small steps too
            return size.of(tokens)
        tiles.size = size
        note(tokens)
        return tiles.tile(shape)

    leave = _entered(_SIZERS, sizer)
    try:
        with _noted(TiledCrossEntropy, note_own), _noted(TiledHeadLoss, note_own):
            yield
    finally:
        leave()
        RECORDING.reset(token)


@contextmanager
def _noted(function: Any, note: Callable[..., None]) -> Iterator[None]:
    """Call `note` for each run of an autograd function inside the context."""
    forward = function.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        note(*arguments)
        return forward(*arguments, **options)

    function.forward = staticmethod(noted)
    try:
        yield
    finally:
        function.forward = staticmethod(forward)
