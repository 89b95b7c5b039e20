"""Settings of one training step, shared by `rankpilot finetune` and `rankpilot memory`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from ..common.checks import is_real
from ..common.errors import ConfigError, shown

MOST_TOKENS = 2**24
"""The largest batch in tokens, well beyond the capacity of any device."""

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit", "paged_adamw8bit", "adamw4bit"]


Quantization = Literal["none", "nf4", "int8"]

ExpertBits = Literal["transformers", "axolotl", "unsloth"]
"""Storage of experts that form one parameter, in a quantised model.

transformers: as in the checkpoint, in 16 bits.
axolotl: in the same bits as the other weights (its `quantize_moe_experts`); a layer dequantises all its experts at once
    when it runs.
unsloth: the same bits, with each expert a separate linear layer that is dequantised in turn.
"""

Checkpointing = Literal["auto", True, False]
"""Gradient checkpointing: as few layers as a plan needs, all, or none."""


Attention = Literal["auto", "efficient", "math"]
"""Attention kernels on CUDA.

auto: from Ampere on, flash attention in half precision without a mask, else the memory-efficient kernel.
efficient: as on Turing, no flash attention; keys and values are repeated for all query heads.
math: no fused kernel.
"""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One training step of a LoRA fine-tune.

    Attributes:
        batch_size: rows per micro-batch; 0 means 2 for language modelling (causal-lm), and 16 elsewhere.
        accumulation: micro-batches per optimizer step; 0 means 1, and 8 for language modelling with the default batch.
        max_length: tokens per row; longer texts are truncated, or split for language modelling. 0 means 1024 (or the
            model's positions) for language modelling, and 64 elsewhere.
        target_modules: modules that get an adapter: "all-linear", or names separated by commas, as in
            `peft.LoraConfig`.
        target_parameters: fused experts that get an adapter: "all-experts", or names separated by commas, as in
            `peft.LoraConfig` (mlp.experts.gate_up_proj); empty for none.
        optimizer: sets the optimizer state per trained weight: adamw two numbers, sgd none, adafactor at most one,
            adamw8bit two bytes (needs the extra rankpilot[quant]), paged_adamw8bit the same in pages that CUDA may move
            to the CPU; they count as on the device, since a change of rank moves them there. adamw4bit is torchao's,
            one byte.
        quantization: storage of the frozen weights: none, as saved; nf4, four bits each; int8, eight bits. Both need
            the extra rankpilot[quant].
        prepare_kbit: keep unquantised weights in fp32, as PEFT's prepare_model_for_kbit_training does, except fused
            experts. TRL's SFTTrainer trains without it and uses less memory.
        bf16: compute in bfloat16 under autocast, as the Trainer does with bf16=True.
        gradient_checkpointing: checkpoint all layers (True), none (False), or as few as the plan needs ("auto").
        exact_savers: lower the memory of a step with identical losses and gradients, in no more time (docs/savers.md).

    Raises:
        ConfigError: a value is out of range.
    """

    batch_size: int = 0
    accumulation: int = 0
    max_length: int = 0
    target_modules: str = "all-linear"
    target_parameters: str = ""
    optimizer: OptimizerName = "adamw"
    quantization: Quantization = "none"
    prepare_kbit: bool = True
    bf16: bool = False
    gradient_checkpointing: Checkpointing = "auto"
    exact_savers: bool = True

    def __post_init__(self) -> None:
        rows, length = self.batch_size or 2, self.max_length or 64
        if rows * length > MOST_TOKENS:
            asked = f"{shown(rows)} x {shown(length)}"
            raise ConfigError(f"batch_size times max_length must be at most {MOST_TOKENS:,} tokens; got {asked}.")
        if not self.prepare_kbit and self.quantization == "none":
            raise ConfigError("prepare_kbit requires a quantised model: set quantization to nf4 or int8.")
        least = min(self.batch_size, self.accumulation, self.max_length)
        if least < 0 or self.max_length == 1 or self.accumulation > MOST_TOKENS:
            raise ConfigError(
                f"batch_size must be at least 1, accumulation 1 to {MOST_TOKENS:,} and max_length at least 2, or "
                f"0 for the default; got {shown(self.batch_size)}, {shown(self.accumulation)} and "
                f"{shown(self.max_length)}."
            )

    def sized(self, *, continues: bool, positions: int | None = None) -> Self:
        """Return the settings with defaults in place of a batch, accumulation or length of 0.

        Args:
            continues: whether the model is a causal language model.
            positions: most tokens the model reads per row; None for no limit.
        """
        rows, batches, length = (2, 8, 1024) if continues else (16, 1, 64)
        return replace(
            self,
            batch_size=self.batch_size or rows,
            accumulation=self.accumulation or (1 if self.batch_size else batches),
            max_length=self.max_length or min(length, positions or length),
        )


def check_seed(seed: object) -> None:
    """Raise ConfigError for a seed that NumPy's generators reject."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1; got {seed!r}.")


def check_dropout(share: Any) -> None:
    """Raise ConfigError for a dropout rate that `peft.LoraConfig` rejects."""
    if not is_real(share) or not 0 <= share < 1:
        raise ConfigError(f"lora_dropout must be at least 0 and below 1; got {shown(share)}.")


def check_length(length: int, most: int | None) -> None:
    """Raise ConfigError for rows longer than the model's positions."""
    if most is not None and length > most:
        raise ConfigError(f"max_length is {length}, but the model has only {most} positions. Lower --max-length.")
