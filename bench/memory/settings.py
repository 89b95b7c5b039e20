"""Small random models in the settings that decide what a training step holds: family, checkpointing, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ...memory.batch_shape import BatchShape
from ...memory.recording import Batch
from ..learner import Learner

Checkpointing = Literal["none", "not reentrant", "reentrant"]
Precision = Literal["fp32", "bf16", "autocast"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "not reentrant", "reentrant")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "autocast")

VOCABULARY, LAYERS, WIDTH, HEADS, CLASSES = 256, 4, 64, 4, 3
LONGEST = 128
"""Tokens of a row."""


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=176,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=LONGEST,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LONGEST,
            num_labels=CLASSES,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LONGEST,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=176,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
        )
    )


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (_llama, {}),
    "bert": (_bert, {"task_type": "SEQ_CLS", "lora_dropout": 0.05}),
    "gpt2": (_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "t5": (_t5, {}),
}
"""How to make each family, and what its LoRA differs in; BERT and its adapters have dropout."""


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        family: see `MODELS`.
        checkpointing: of gradients, in which of torch's two forms.
        precision: fp32 weights, bf16 weights under fp32 adapters, or fp32 weights under bf16 autocast.
    """

    family: str
    checkpointing: Checkpointing
    precision: Precision

    def learner(self, device: torch.device, seed: int) -> Learner:
        """A fresh model with adapters, the same one for the same arguments."""
        make, lora = MODELS[self.family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base = make().to(device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        learner = Learner(base, seed=seed, autocast=self.precision == "autocast", **lora)
        if self.checkpointing != "none":
            reentrant = self.checkpointing == "reentrant"
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                base.enable_input_require_grads()
        return learner

    def batch(self, shape: BatchShape, device: torch.device, seed: int) -> Batch:
        """Random tokens and labels."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCABULARY, (shape.rows, shape.length), generator=generator).to(device)
        if self.family != "bert":
            return {"input_ids": tokens, "labels": tokens}
        classes = torch.arange(shape.rows, device=device) % CLASSES
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": classes}
