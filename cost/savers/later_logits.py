"""Lazy logits, so that a loss can compute them tile by tile.

Logits are the largest tensor of many steps: 4 x 1024 tokens with a vocabulary of 128k take 2 GiB in fp32. With a frozen
output layer, only the loss needs them. After `defer_logits`, that layer returns `LaterLogits`: a tensor that records
the hidden states and the model's elementwise operations on the product (a factor, a soft cap, another precision). Its
cross entropy is computed in tiles (`cost/savers/tiled_loss.py`). Any other use materialises what the layer would have
returned, with its graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ...common.devices import autocast_dtype
from .tiled_loss import Expected, HeadLoss, Product, TiledCrossEntropy, TiledHeadLoss

LEAST_RATIO = 4
"""Smallest ratio of a token's logits to its hidden states; below it, logits take less than the tiles' extra tensors."""

FORWARD, _LOSS = "forward", "_loss_function"


def use_tiled_loss(model: nn.Module) -> Callable[[], None]:
    """Compute transformers' own causal language modelling losses in a model in tiles.

    Returns a function to undo the change.
    """
    models = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and _LOSS not in vars(module)
        and LOSS_MAPPING.get(module.loss_type) is ForCausalLMLoss
    ]
    for module in models:
        module.loss_function = tiled_causal_lm_loss

    def undo() -> None:
        for module in models:
            vars(module).pop(_LOSS, None)

    return undo


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tiled_causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """Return the mean next-token loss, like `transformers.loss.loss_utils.ForCausalLMLoss`; see it for arguments.

    The backward pass overwrites existing logits, unless something else holds them.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    target = shift_labels.view(-1).to(logits.device)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    rows = logits.float().view(-1, vocab_size)
    if isinstance(rows, LaterLogits):
        return rows.cross_entropy(target, ignore_index, reduction, num_items_in_batch)
    loss: torch.Tensor = TiledCrossEntropy.apply(rows, target, ignore_index, reduction)  # type: ignore[no-untyped-call]
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def defer_logits(model: nn.Module) -> Callable[[], None]:
    """Make a model's output layer return `LaterLogits` if possible; returns a function to undo it.

    The layer must be a plain, frozen linear layer.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not nn.Linear or FORWARD in vars(head) or any(p.requires_grad for p in head.parameters()):
        return lambda: None
    if head.out_features < LEAST_RATIO * head.in_features:
        return lambda: None
    vars(head)[FORWARD] = partial(_forward, head, Expected())

    def undo() -> None:
        vars(head).pop(FORWARD, None)

    return undo


@contextmanager
def expecting_one(model: nn.Module) -> Iterator[None]:
    """Expect a gradient of 1 inside the context, the initial gradient of recorded steps."""
    forwards = [vars(module).get(FORWARD) for module in model.modules()]
    expected = [each.args[1] for each in forwards if isinstance(each, partial) and each.func is _forward]
    before = [each.gradient for each in expected]
    try:
        for each in expected:
            each.gradient = 1.0
        yield
    finally:
        for each, gradient in zip(expected, before, strict=True):
            each.gradient = gradient


def _forward(head: nn.Linear, expected: Expected, hidden: torch.Tensor) -> torch.Tensor:
    trains = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)  # at this point
    if trains or torch.compiler.is_compiling() or type(hidden) is not torch.Tensor or hidden.dim() < 2:
        return functional.linear(hidden, head.weight, head.bias)
    return later(hidden, Product(head, expected, autocast_dtype(hidden)))


def later(hidden: torch.Tensor, product: Product) -> torch.Tensor:
    """Return `LaterLogits`; `hidden` gets a gradient if an autograd function takes them, such as a kernel's loss."""
    logits: torch.Tensor = _Later.apply(hidden, product)  # type: ignore[no-untyped-call]
    return logits


class _Later(torch.autograd.Function):
    """Computes the logits again in the backward pass, used if their gradient comes from outside this file."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, product: Product) -> torch.Tensor:
        ctx.hidden, ctx.product = hidden, product
        return LaterLogits(hidden, product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = ctx.hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = ctx.product.of(rows, ctx.product.weight())
        return torch.autograd.grad(logits, rows, gradient)[0], None


class LaterLogits(torch.Tensor):
    """Logits computed on first use.

    Args:
        hidden: the last hidden states, (..., width).
        product: computes logits from them.
    """

    _hidden: torch.Tensor
    _product: Product
    _made: dict[bool, torch.Tensor]

    @staticmethod
    def __new__(cls, hidden: torch.Tensor, product: Product) -> LaterLogits:
        """Create a tensor without storage, with the shape, dtype and device of the logits."""
        dtype = product.after(hidden.new_empty(0, dtype=product.autocast or product.head.weight.dtype)).dtype
        shape = (*hidden.shape[:-1], product.head.out_features)
        new: Any = torch.Tensor._make_wrapper_subclass
        self: LaterLogits = new(cls, shape, dtype=dtype, device=hidden.device, requires_grad=False)
        self._hidden, self._product, self._made = hidden, product, {}
        return self

    def __init__(self, hidden: torch.Tensor, product: Product) -> None:
        pass

    def cross_entropy(
        self, target: torch.Tensor, ignore_index: int, reduction: str, divisor: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Compute the loss of 2-D logits in tiles, divided by `divisor`; see `functional.cross_entropy`."""
        hidden = self._hidden
        with_gradient = torch.is_grad_enabled() and hidden.requires_grad
        loss = HeadLoss(self._product, target, ignore_index, reduction, divisor, with_gradient)
        value: torch.Tensor = TiledHeadLoss.apply(hidden, loss)  # type: ignore[no-untyped-call]
        return value

    def made(self) -> torch.Tensor:
        """Materialise the logits, with their graph."""
        with_graph = torch.is_grad_enabled()
        if with_graph not in self._made:
            self._made[with_graph] = self._product.of(self._hidden, self._product.weight())
        return self._made[with_graph]

    def _may_be_written(self) -> bool:
        """True inside an autograd function, which may overwrite the logits with its gradient."""
        return self._hidden.requires_grad and not torch.is_grad_enabled()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Run functions that do not need the logits, and materialise them for all others."""
        options = options or {}
        if function in _OF_THE_OUTSIDE:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*arguments, **options)
        first = arguments[0] if arguments else None
        if function in (_REQUIRES_GRAD, _GRAD_FN) and isinstance(first, LaterLogits):
            return first._hidden.requires_grad if function == _REQUIRES_GRAD else None
        if isinstance(first, LaterLogits) and not first._made and not first._may_be_written():
            if function is functional.cross_entropy:
                loss = _cross_entropy(*arguments, **options)
                if loss is not None:
                    return loss
            elif function in _ROWS:
                rows = _ROWS[function](first, *arguments[1:], **options)
                if rows is not None:
                    return later(rows, first._product)
            elif _is_of_each_number(function, arguments[1:], options):
                step = partial(_applied, function, arguments[1:], options)
                return later(first._hidden, first._product.then(step))
        made = partial(tree_map, lambda value: value.made() if isinstance(value, LaterLogits) else value)
        return function(*made(arguments), **made(options))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Handle calls that bypass `__torch_function__`, such as operators called from C++."""
        made = partial(tree_map, lambda value: value.made() if isinstance(value, LaterLogits) else value)
        return operator(*made(arguments), **made(options or {}))


def _applied(function: Any, rest: Sequence[Any], options: dict[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = function(tensor, *rest, **options)
    return result


_GRAD_FN = torch.Tensor.grad_fn.__get__  # type: ignore[union-attr]  # wrappers of models ask: none as yet
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_OF_THE_OUTSIDE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_nested")),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
}
"""Properties of a tensor that do not depend on its values."""

_OF_EACH_NUMBER = {
    *(torch.Tensor.float, torch.Tensor.mul, torch.Tensor.div, torch.Tensor.tanh, torch.Tensor.to),
    *(torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.__truediv__, torch.mul, torch.div, torch.tanh),
}
"""Elementwise operations that models and wrappers apply to logits."""


def _is_of_each_number(function: Any, rest: Sequence[Any], options: dict[str, Any]) -> bool:
    kinds = (torch.dtype,) if function is torch.Tensor.to else (int, float)
    return function in _OF_EACH_NUMBER and not options and all(isinstance(value, kinds) for value in rest)


def _reshaped(logits: LaterLogits, *shape: Any) -> torch.Tensor | None:
    """Return the hidden states of reshaped logits; None if the last axis changes."""
    sizes = [*shape[0]] if len(shape) == 1 and isinstance(shape[0], Sequence) else [*shape]
    words = logits._product.head.out_features
    if len(sizes) < 2 or not all(isinstance(size, int) for size in sizes):
        return None
    if sizes[-1] == -1:
        known = math.prod(sizes[:-1])
        sizes[-1] = words if known > 0 and known * words == logits.numel() else 0
    return logits._hidden.reshape(*sizes[:-1], logits._hidden.shape[-1]) if sizes[-1] == words else None


def _indexed(logits: LaterLogits, index: Any) -> torch.Tensor | None:
    """Return the hidden states of indexed rows; None if the index affects the last axis."""
    entries = index if isinstance(index, tuple) else (index,)
    kept = logits._hidden.dim() - 1
    if any(entry is None or not isinstance(entry, int | slice | type(Ellipsis)) for entry in entries):
        return None
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        after = entries[at + 1 :]
        if not after or after[-1] != slice(None):
            return None
    elif len(entries) > kept and entries[kept] != slice(None):
        return None
    rows: torch.Tensor = logits._hidden[index]
    return rows if rows.dim() > 1 else None


def _as_is(logits: LaterLogits) -> torch.Tensor:
    return logits._hidden


def _detached(logits: LaterLogits) -> torch.Tensor:
    return logits._hidden.detach()


_ROWS: dict[Any, Callable[..., torch.Tensor | None]] = {
    torch.Tensor.view: _reshaped,
    torch.Tensor.reshape: _reshaped,
    torch.Tensor.__getitem__: _indexed,
    torch.Tensor.contiguous: _as_is,
    torch.Tensor.clone: _as_is,  # DistributedDataParallel clones all outputs
    torch.Tensor.detach: _detached,
}
"""Operations on rows of the logits that apply equally to the hidden states."""


def _cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """Return the loss of rows of logits; None if it is not a plain classification of rows."""
    others = weight is not None or size_average is not None or reduce is not None or label_smoothing
    if others or reduction not in ("mean", "sum") or not isinstance(logits, LaterLogits):
        return None
    if logits.dim() != 2 or target.dim() != 1 or target.dtype != torch.long:
        return None
    return logits.cross_entropy(target, ignore_index, reduction, None)
