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
        batch_size: rows per micro-batch. (default: 2; labels: 16)
        accumulation: micro-batches per optimizer step.
        max_length: most tokens per row. (default: 1024; labels: 64)
        target_modules: modules with an adapter: "all-linear", or names with commas.
        target_parameters: fused experts with an adapter: "all-experts", or names.
        optimizer: sets the bytes of state per trained weight.
        quantization: storage of the frozen weights.
        prepare_kbit: keep unquantised weights in fp32, as PEFT does and TRL doesn't.
        bf16: compute under bf16 autocast, as the Trainer's bf16=True.
        gradient_checkpointing: of all layers, none, or as few as the plan needs.
        exact_savers: use less memory at equal losses, gradients and time.

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
