"""A training step: the loss as a function of the batch (in tiles), the optimiser, and layers that run again.

The loss of a causal language model in tiles of its tokens, with the logits' gradient in the logits' own place.

transformers' loss holds the logarithms of all probabilities beside the logits, and its backward pass two more tensors
of that size. Here one tile of them at a time is there, made once more in the backward pass. The operators are torch's
own, row by row, so loss and gradients are the same bit for bit.

TRL has tiles too: `trl.kernels.chunked_logprob` multiplies the last hidden states with the head in tiles of at most
`TOKEN_CHUNK_SIZE` tokens. A small recorded step would fill one of them in part, and the batch of the run fills several:
a tile would be predicted as large as all of them. So while a small step is recorded, its tiles are as many as those of
the whole batch. Of `tiled_loss` there are always as many tiles, and their tokens are rounded up.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import UnsupportedError
from .recording import BatchShape
from .step_config import OptimizerName, Quantization

TILES = 16
"""Into how many tiles the tokens of a batch are divided, whatever its size."""

_REDUCTIONS = {"mean": 1, "sum": 2}


def use_tiled_loss(model: nn.Module) -> None:
    """Let the causal language models in a model that have transformers' own loss compute it in tiles.

    They keep the attribute `_loss_function`, without which they have their own loss again.
    """
    for module in model.modules():
        own = isinstance(module, PreTrainedModel) and "_loss_function" not in vars(module)
        if own and LOSS_MAPPING.get(module.loss_type) is ForCausalLMLoss:
            module.loss_function = tiled_causal_lm_loss


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
    """The mean loss of the next token, as `transformers.loss.loss_utils.ForCausalLMLoss`; see there for the arguments.

    The backward pass overwrites the logits, unless something else holds them.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    target = shift_labels.view(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss: torch.Tensor = TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.float().view(-1, vocab_size), target, ignore_index, reduction
    )
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class TiledCrossEntropy(torch.autograd.Function):
    """The cross entropy of rows of logits, float32 (tokens, vocabulary), and targets, int64 (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        """The loss, a scalar."""
        place = torch.where(target == ignore_index, 0, target)
        found = logits.new_empty(len(target))
        for tile in _tiles(len(target)):
            picked = _picked(torch.log_softmax(tile.of(logits), 1), tile.of(place))
            tile.of(found).copy_(picked)
        zero = torch.where(target == ignore_index, target, 0)
        # `data` holds the values alone, so that it can be told whether anyone else does.
        ctx.logits, ctx.target, ctx.place, ctx.found = logits.data, target, place, found
        ctx.settings = ignore_index, reduction
        return nn.functional.nll_loss(found[:, None], zero, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of the logits.

        Raises:
            UnsupportedError: the logits are no longer those of the forward pass.
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
            del logarithms, of_logarithms, of_logits  # before those of the next tile are made
        if not torch.allclose(found, ctx.found, rtol=0, atol=0, equal_nan=True):
            raise UnsupportedError(
                "The logits were changed between the loss and its backward pass, or the backward pass ran twice; with "
                "`recompute` it needs them as they were, and writes their gradient in their place. Change a copy of "
                "them, or leave `recompute` out."
            )
        return result, None, None, None


def tile_size(tokens: int) -> int:
    """The tokens of a tile of so many tokens. All tiles have as many, so the last ones may overlap."""
    return -(-tokens // TILES)


@dataclass(frozen=True)
class _Tile:
    """A tile: its first row, its rows, and how many of them an earlier tile has had.

    Rows are taken by `narrow`, which is the same operator for any of them, so that steps of any size are alike.
    """

    start: int
    size: int
    done: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the tile."""
        return tensor.narrow(0, self.start, self.size)

    def fresh(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of its rows that no earlier tile has had."""
        return rows.narrow(0, self.done, self.size - self.done)


def _tiles(tokens: int) -> Iterator[_Tile]:
    """All tiles of so many tokens; with few of them, the last have nothing fresh."""
    size = tile_size(tokens)
    for number in range(TILES):
        start = min(number * size, tokens - size)
        yield _Tile(start, size, min(number * size - start, size))


def _picked(logarithms: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return logarithms.gather(1, place[:, None])[:, 0]


def _held_once(tensor: torch.Tensor) -> bool:
    """Whether no other tensor has the same storage; it and the object that asks count."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) <= 2


MODULE, FUNCTION, TILE = "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", "TOKEN_CHUNK_SIZE"


class LossTiles:
    """Scales the tiles of TRL's fused loss while steps of a batch are recorded.

    Args:
        whole: the shape of the whole batch.

    Attributes:
        used: whether a step has run the fused loss.
        of_own: whether a step has run `TiledCrossEntropy`.
    """

    used: bool
    of_own: bool

    def __init__(self, whole: BatchShape) -> None:
        self.used = self.of_own = False
        self._whole, self._module = whole, sys.modules.get(MODULE)
        self._size: int | None = getattr(self._module, TILE, None)

    @property
    def size(self) -> int | None:
        """Tokens of a tile; None if no step has run the fused loss."""
        return self._size if self.used else None

    @property
    def count(self) -> int:
        """Tiles of the whole batch; 1 without the fused loss."""
        return -(-loss_tokens(self._whole) // self._size) if self.used and self._size else 1

    def tokens(self, shape: BatchShape) -> int:
        """Tokens of a tile while a batch of this shape is recorded; 1 without the fused loss."""
        return tile_tokens(loss_tokens(shape), loss_tokens(self._whole), self._size) if self._size else 1

    @contextmanager
    def scaled(self, shape: BatchShape) -> Iterator[None]:
        """Inside the context a batch of this shape has as many tiles as the whole batch."""
        function = getattr(self._module, FUNCTION, None)
        with _noted(TiledCrossEntropy, self._note_own), _noted(function, self._note):
            if function is not None and self._size is not None:
                setattr(self._module, TILE, self.tokens(shape))
            try:
                yield
            finally:
                if function is not None and self._size is not None:
                    setattr(self._module, TILE, self._size)

    def _note(self) -> None:
        self.used = True

    def _note_own(self) -> None:
        self.of_own = True


@contextmanager
def _noted(function: Any, note: Callable[[], None]) -> Iterator[None]:
    """Inside the context it is noted when an autograd function runs; None for one that is not there."""
    if function is None:
        yield
        return
    forward = function.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        note()
        return forward(*arguments, **options)

    function.forward = staticmethod(noted)
    try:
        yield
    finally:
        function.forward = staticmethod(forward)


def own_tile(shape: BatchShape) -> int:
    """The tokens of a tile of `tiled_loss` with a batch of this shape."""
    return tile_size(shape.rows * shape.length)


def loss_tokens(shape: BatchShape) -> int:
    """The tokens of a batch that have a next one, for which there is a loss."""
    return shape.rows * max(shape.length - 1, 1)


def tile_tokens(small: int, whole: int, size: int) -> int:
    """The tile of a small batch that is to it what a tile is to the whole batch; all in tokens."""
    tiles = -(-whole // size)
    if tiles == 1:
        return size
    scaled = -(-size * small // whole)
    return max(1, min(scaled, -(-small // (tiles - 1)) - 1))  # rounding must not save a tile


LossFunction = Callable[[Any], torch.Tensor]
"""Runs the forward pass of a training step on a batch, and returns the loss with its graph."""


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A training step that a loop takes.

    Attributes:
        model: the PEFT model, on its device.
        loss: the loss of a batch.
        optimizer: decides the bytes of state; AdamW's two tensors count without one.
        rows_per_example: rows of a batch that one example takes; see `reshaped`.
        accumulates: whether gradients are there all the time, because they are kept over several batches of each step.
        bucket_copies: how often the loop holds all gradients besides, all the time, to send them to other processes.
    """

    model: nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer | None
    rows_per_example: int = 1
    accumulates: bool = False
    bucket_copies: float = 0.0


def checked_loss(loss: LossFunction) -> LossFunction:
    """A loss that raises UnsupportedError where the function returns something else than a tensor of one number."""

    def checked(batch: Any) -> torch.Tensor:
        value = loss(batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UnsupportedError(
                f"The loss function returned {got}. It has to return the loss of the batch as a tensor of one number, "
                "with its graph, such as `model(**batch).loss`."
            )
        return value

    return checked


def model_loss(model: nn.Module) -> LossFunction:
    """The loss that a transformers model returns for a batch that holds labels.

    The function raises UnsupportedError if the model returns none.
    """

    def loss(batch: Any) -> torch.Tensor:
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise UnsupportedError(
                f"{type(model).__name__} returned no loss, so no step can be measured. Give its batches labels, or "
                "pass the function that computes your loss."
            )
        result: torch.Tensor = value
        return result

    return loss


CHECKPOINTING = {"use_reentrant": False}
"""How segments run again: reentrant checkpointing would need inputs with gradients, which a frozen base has not."""


_OF_BITSANDBYTES: dict[str, str] = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def check_installed(optimizer: OptimizerName = "adamw", quantization: Quantization = "none") -> None:
    """Raise UnsupportedError if the library that an optimiser or a quantisation needs is missing."""
    needing = [f"optimizer {optimizer}"] if optimizer in _OF_BITSANDBYTES else []
    needing += [f"quantization {quantization}"] if quantization != "none" else []
    if needing and find_spec("bitsandbytes") is None:
        raise UnsupportedError(f"The {needing[0]} needs bitsandbytes: pip install 'rankpilot[quant]'.")


def new_optimizer(name: OptimizerName, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of that name with the Trainer's settings, over all parameters that train; see `check_installed`."""
    check_installed(name)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trains, lr=1e-4)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        factored: torch.optim.Optimizer = Adafactor(trains, lr=1e-4, scale_parameter=False, relative_step=False)
        return factored
    if name in _OF_BITSANDBYTES:
        kind = getattr(importlib.import_module("bitsandbytes.optim"), _OF_BITSANDBYTES[name])
        optimizer: torch.optim.Optimizer = kind(trains, lr=1e-4)
        return optimizer
    if trains[0].is_meta:  # torch knows no fused kernel for the meta device, which stands for one that has it
        hollow = torch.optim.AdamW(trains, lr=1e-4)
        hollow.defaults["fused"] = True
        return hollow
    return torch.optim.AdamW(trains, lr=1e-4, fused=True)


def has_checkpointing(base: Any) -> bool:
    """Whether the class of a transformers model has gradient checkpointing."""
    return bool(getattr(base, "supports_gradient_checkpointing", False))


def check_checkpointing(base: Any) -> None:
    """Raise UnsupportedError if a transformers model has no gradient checkpointing."""
    if not has_checkpointing(base):
        raise UnsupportedError(f"{type(base).__name__} does not support gradient checkpointing.")


def switch_checkpointing(base: Any, wanted: bool, *, reentrant: bool = False) -> None:
    """Switch gradient checkpointing of a transformers model on or off; raise UnsupportedError if it has none.

    Reentrant checkpointing needs inputs with gradients, which a frozen base does not have: it is asked for them.
    """
    check_checkpointing(base)
    # Its name from transformers 5.20 on, and before.
    name = "activation_checkpointing" if hasattr(base, "activation_checkpointing_enable") else "gradient_checkpointing"
    if wanted:
        getattr(base, f"{name}_enable")(CHECKPOINTING | {"use_reentrant": reentrant})
        release_inputs(base)
    else:
        getattr(base, f"{name}_disable")()


def is_reentrant(function: Any) -> bool:
    """Whether a module's checkpointing function is reentrant: torch's is by default, and transformers binds options."""
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def release_inputs(model: nn.Module) -> None:
    """Let the model's inputs require no gradients any more, unless its checkpointing is reentrant and needs them.

    transformers makes them require gradients under either checkpointing. Then every layer below the lowest adapter
    holds tensors for the backward pass, which runs down to the embeddings for nothing.
    """
    functions = (vars(module).get(CHECKPOINT) for module in model.modules())
    if any(function is not None and is_reentrant(function) for function in functions):
        return
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if requires_grad_hook(hook):
                del module._forward_hooks[key]


def requires_grad_hook(hook: object) -> bool:
    """Whether a forward hook makes a module's output require gradients, as transformers and PEFT install them."""
    return "require_grad" in getattr(hook, "__name__", "")


CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps a module's checkpointing function."""


@contextmanager
def segments_marked(modules: Sequence[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Replace transformers' checkpointing function by another one inside.

    It stays replaced where a step switches checkpointing off and on again, which gives every module another function.

    Args:
        modules: those that have such a function.
        run: called with whether the function is reentrant, and then with what the function is called with.
    """
    functions = [vars(module)[CHECKPOINT] for module in modules]
    kinds, marked = {type(module) for module in modules}, _Marked(modules, run)
    try:
        for kind in kinds:
            setattr(kind, CHECKPOINT, marked)
        yield
    finally:
        for kind in kinds:
            delattr(kind, CHECKPOINT)  # no class of transformers has one of its own
        for module, function in zip(modules, functions, strict=True):
            setattr(module, CHECKPOINT, function)


class _Marked:
    """The checkpointing function of all modules of a class, as an attribute that hides those of the modules."""

    def __init__(self, modules: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        self._modules, self._run = {id(module) for module in modules}, run

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None or CHECKPOINT not in vars(module):
            raise AttributeError(f"{kind.__name__} has no attribute {CHECKPOINT!r}")
        function = vars(module)[CHECKPOINT]
        return partial(self._run, is_reentrant(function)) if id(module) in self._modules else function

    def __set__(self, module: nn.Module, function: Any) -> None:
        vars(module)[CHECKPOINT] = function

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[CHECKPOINT]
