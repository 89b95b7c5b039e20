"""Random models and batches of realistic sizes: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

Family = Literal["bert", "llama"]
FAMILIES: tuple[Family, ...] = ("bert", "llama")
TASKS: dict[Family, str] = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
"""`peft.LoraConfig.task_type` by family."""


@dataclass(frozen=True)
class Size:
    """Size of a model and of its batches.

    Attributes:
        layers: transformer layers.
        width: hidden width; heads are 32 (BERT) and 64 (Llama) wide, or as wide as the model if that is narrower.
        vocabulary: tokens; few, so that Llama's head does not outweigh its layers.
        rows: rows of a batch.
        length: tokens of a row.
    """

    layers: int = 6
    width: int = 384
    vocabulary: int = 4096
    rows: int = 16
    length: int = 64


def random_model(family: Family, size: Size, seed: int) -> PreTrainedModel:
    """A model with random weights, the same ones for the same arguments."""
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "max_position_embeddings": size.length,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "bert":
            heads = max(1, size.width // 32)
            config = BertConfig(**shape, num_attention_heads=heads, intermediate_size=4 * size.width, num_labels=2)
            return BertForSequenceClassification(config)
        # Three projections of 8/3 of the width are as large as BERT's two of four times the width.
        heads = max(1, size.width // 64)
        return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=heads, intermediate_size=8 * size.width // 3))


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
