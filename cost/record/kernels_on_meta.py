"""Memory-only stand-ins on the meta device for kernels that trainers substitute for transformers' code.

They cover attention without scores, losses without logits, fused activation functions and scans. Each is an autograd
function that allocates and saves the same tensors as the kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import XIELUActivation
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...common.devices import autocast_dtype
from ..savers.tiled_loss import tile_size, tile_tokens

FLASH = "rankpilot_flash"
"""Name of this attention in transformers, whose models check for "flash" in it."""


def use_flash_attention(model: PreTrainedModel) -> None:
    """Replace a model's attention by one kernel (flash attention 2 or 3, flex) that saves its inputs and output.

    It reads no pairwise mask: windows and the limits of packed texts are arguments. Sinks are one number per head.
    """
    AttentionInterface.register(FLASH, _flash)
    AttentionMaskInterface.register(FLASH, lambda *_, **__: None)
    configs = {id(config): config for part in model.modules() if (config := vars(part).get("config")) is not None}
    for config in configs.values():
        config._attn_implementation_internal = FLASH


def _flash(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with queries (rows, heads, tokens, width) and fewer key heads; fp32 inputs run in bf16."""
    width, wide = value.shape[-1], query.shape[-1]
    query, key, value = (each.to(torch.bfloat16) if each.element_size() > 2 else each for each in (query, key, value))
    if width < wide:  # latent attention (DeepSeek)
        value = functional.pad(value, (0, wide - width))
    causal = bool(getattr(module, "is_causal", True))
    result = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return result[..., :width].transpose(1, 2), None


def fuse_activations(model: nn.Module) -> None:
    """Make activation functions with a published CUDA kernel save only their input."""
    for module in model.modules():
        if type(module) is XIELUActivation:
            vars(module)["forward"] = _Fused.apply


class _Fused(torch.autograd.Function):
    """An elementwise function."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
        """Return a tensor shaped like the input."""
        ctx.save_for_backward(inputs)
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return a tensor shaped like the gradient."""
        return torch.empty_like(gradient)


SCAN, CHUNK = "mamba_selective_scan", 2048
"""Name of the scan of Mamba's layers in transformers, and tokens between the states that the kernel keeps."""


@contextmanager
def fused_scans(model: nn.Module) -> Iterator[None]:
    """Run the scans of Mamba's layers as mamba-ssm's kernel inside the context (its selective_scan_interface.py).

    Without that package transformers loops over the tokens, and keeps the states of all.
    """
    code = {type(module).__module__ for module in model.modules() if hasattr(module, "A_log")}
    with ExitStack() as undo:
        for module in (sys.modules[name] for name in code if hasattr(sys.modules[name], SCAN)):
            undo.callback(setattr, module, SCAN, getattr(module, SCAN))
            setattr(module, SCAN, _scan)
        yield


def _scan(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **more: Any) -> Any:
    """Scan inputs and steps, (rows, width, tokens), with one state per row and channel."""
    others = (more.get(name) for name in ("D", "z", "delta_bias"))
    return _Scan.apply(*map(_in_rows, (u, dt)), A, *map(_in_rows, (B, C)), *others)  # type: ignore[no-untyped-call]


def _in_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Scan(torch.autograd.Function):
    """Mamba's selective scan."""

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor shaped like the steps; saves the inputs, the ungated result and a state per chunk."""
        dt, states, gate = given[1], given[2], given[6]
        assert dt is not None
        assert states is not None
        rows, width, tokens = dt.shape
        kept = states.new_empty(rows, width, -(-tokens // CHUNK), 2 * states.shape[-1], dtype=torch.float32)
        result = torch.empty_like(dt)
        ctx.save_for_backward(*given, kept, result)
        return result if gate is None else torch.empty_like(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of all; those of B and C add up in fp32."""
        *given, _, _ = ctx.saved_tensors
        made = [each if each is None else torch.empty_like(each) for each in given]
        for at in (3, 4):
            made[at] = torch.empty_like(given[at], dtype=torch.float32).to(given[at].dtype)
        return tuple(made)


def cut_loss(model: PreTrainedModel) -> None:
    """Compute a causal language model's loss as cut cross-entropy does: logits only exist in registers."""
    _on_hidden_states(model, lambda head, hidden, labels: _Cut.apply(hidden))  # type: ignore[no-untyped-call]


class _Cut(torch.autograd.Function):
    """The loss of hidden states, (tokens, width)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return a scalar; saves each token's normaliser for the backward pass."""
        ctx.save_for_backward(hidden, hidden.new_empty(len(hidden), dtype=torch.float32))
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the hidden states."""
        return torch.empty_like(ctx.saved_tensors[0])


WORDS, TOKENS = 32_768, 4096
"""Vocabulary and token size of a tile of TRL's loss (trl/kernels/chunked_logprob.py)."""


def use_chunked_loss(model: PreTrainedModel) -> None:
    """Compute a causal language model's loss as TRL's SFTTrainer does (`loss_type="nll"`, formerly `chunked_nll`)."""

    def loss(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> Any:
        return _Chunked.apply(hidden, head.weight, head.bias)  # type: ignore[no-untyped-call]

    _on_hidden_states(model, loss)


class _Chunked(torch.autograd.Function):
    """The loss of hidden states, (tokens, width), with one tile of logits at a time in both passes."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return a scalar; saves each token's normaliser for the backward pass."""
        ctx.dtype, ctx.tile = (
            autocast_dtype(hidden) or hidden.dtype,
            tile_tokens(len(hidden), tile_size(weight, TOKENS)),
        )
        statistics = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(7)]
        _Chunked.tile(ctx, hidden, weight)
        ctx.save_for_backward(hidden, weight, statistics[0])
        return statistics[1].new_empty(())

    @staticmethod
    def tile(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate a temporary tile of logits, and its part of the weight in the precision of the product."""
        words = weight.narrow(0, 0, min(WORDS, len(weight))).to(ctx.dtype)
        return hidden.new_empty(ctx.tile, WORDS, dtype=ctx.dtype), words

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of the hidden states, accumulated in fp32."""
        hidden, weight, _ = ctx.saved_tensors
        result = torch.empty_like(hidden, dtype=torch.float32)
        _Chunked.tile(ctx, hidden, weight)
        return result.to(hidden.dtype), None, None


def _on_hidden_states(model: PreTrainedModel, loss: Any) -> None:
    """Make the output layer return its input, and compute the model's loss from it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return  # it trains or has an adapter, but these kernels need a frozen one

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        result: torch.Tensor = loss(head, logits.flatten(0, -2), labels.flatten())
        return result

    vars(head)["forward"] = lambda hidden: hidden
    model.loss_function = loss_function
