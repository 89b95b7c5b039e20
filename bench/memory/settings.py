"""Small random models in the settings that decide what a training step holds: family, checkpointing, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig

from ...memory.batch_shape import BatchShape
from ...memory.recording import Batch
from ..learner import Learner
from ..models import LORA, Family, Size, random_model

Checkpointing = Literal["none", "not reentrant", "reentrant"]
Precision = Literal["fp32", "bf16", "autocast"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "not reentrant", "reentrant")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "autocast")

SMALL = Size(layers=4, width=64, vocabulary=256, length=128)
CLASSES = 3
FIELDS: dict[Family, dict[str, Any]] = {"llama": {"num_key_value_heads": 2}, "bert": {"num_labels": CLASSES}}
"""Further fields of models' configs: Llama shares keys and values between heads."""


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        family: of the model; BERT and its adapters have dropout.
        checkpointing: of gradients, in which of torch's two forms.
        precision: fp32 weights, bf16 weights under fp32 adapters, or fp32 weights under bf16 autocast.
    """

    family: Family
    checkpointing: Checkpointing
    precision: Precision

    def learner(self, device: torch.device, seed: int) -> Learner:
        """A fresh model with adapters, the same one for the same arguments."""
        base = random_model(self.family, SMALL, seed, heads=4, **FIELDS.get(self.family, {}))
        base = base.to(device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        config = LoraConfig(**LORA[self.family], lora_dropout=0.05 if self.family == "bert" else 0.0)
        learner = Learner(base, config, seed=seed, autocast=self.precision == "autocast")
        if self.checkpointing != "none":
            reentrant = self.checkpointing == "reentrant"
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                base.enable_input_require_grads()
        return learner

    def batch(self, shape: BatchShape, device: torch.device, seed: int) -> Batch:
        """Random tokens and labels."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, SMALL.vocabulary, (shape.rows, shape.length), generator=generator).to(device)
        if self.family != "bert":
            return {"input_ids": tokens, "labels": tokens}
        classes = torch.arange(shape.rows, device=device) % CLASSES
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": classes}
