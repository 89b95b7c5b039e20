"""Random models, their LoRA settings and random batches: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ..lora.ladder import REFERENCE_RANK

Family = Literal["llama", "bert", "gpt2", "t5"]
FAMILIES: tuple[Family, ...] = ("bert", "llama")
"""Families whose steps are timed at a realistic size."""

ARCHITECTURES: dict[Family, tuple[type[PreTrainedConfig], Callable[[Any], PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "bert": (BertConfig, BertForSequenceClassification),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "t5": (T5Config, T5ForConditionalGeneration),
}

_ALL_LINEAR = {"r": REFERENCE_RANK, "lora_alpha": 2 * REFERENCE_RANK, "target_modules": "all-linear"}
LORA: dict[Family, dict[str, Any]] = {
    "llama": {**_ALL_LINEAR, "task_type": "CAUSAL_LM"},
    "bert": {**_ALL_LINEAR, "task_type": "SEQ_CLS"},
    "gpt2": {**_ALL_LINEAR, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "t5": _ALL_LINEAR,
}
"""Fields of each family's `peft.LoraConfig`: LoRA of rank 8 on all linear modules."""


@dataclass(frozen=True)
class Size:
    """Size of a model and of its batches.

    Attributes:
        layers: transformer layers.
        width: hidden width; heads are 32 (BERT) and 64 (others) wide, or as wide as the model if that is narrower.
        vocabulary: tokens; few, so that Llama's head does not outweigh its layers.
        rows: rows of a batch.
        length: tokens of a row.
    """

    layers: int = 6
    width: int = 384
    vocabulary: int = 4096
    rows: int = 16
    length: int = 64


def random_model(family: Family, size: Size, seed: int, *, heads: int | None = None, **fields: Any) -> PreTrainedModel:
    """A model with random weights, the same ones for the same arguments.

    Args:
        family: which architecture.
        size: of the model.
        seed: of the weights.
        heads: of attention; without it as many as `Size.width` says.
        fields: further fields of the model's config.
    """
    config_class, model_class = ARCHITECTURES[family]
    heads = heads or max(1, size.width // (32 if family == "bert" else 64))
    # Llama's three projections of 8/3 of the width are as large as BERT's two of four times the width.
    inner = 4 * size.width if family == "bert" else 8 * size.width // 3
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": size.length,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "t5":
        shape |= {"d_kv": size.width // heads, "d_ff": inner, "num_decoder_layers": size.layers}
        shape["decoder_start_token_id"] = 0
    elif family != "gpt2":
        shape["intermediate_size"] = inner
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**shape | fields))


def random_loader(family: Family, size: Size, seed: int, batches: int = 8) -> DataLoader[Any]:
    """A loader of so many batches of random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    count = batches * size.rows
    tokens = torch.randint(size.vocabulary, (count, size.length), generator=generator)
    labels = torch.randint(2, (count,), generator=generator) if family == "bert" else tokens
    rows: Any = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
        for ids, label in zip(tokens, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=size.rows)
