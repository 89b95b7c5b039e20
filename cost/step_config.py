"""Settings of one training step: what `rankpilot finetune` runs and `rankpilot memory` looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from ..common.checks import is_real
from ..errors import ConfigError, shown

MOST_TOKENS = 2**24
"""The largest batch, in tokens, far beyond what any device holds."""

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit", "paged_adamw8bit", "adamw4bit"]


Quantization = Literal["none", "nf4", "int8"]

ExpertBits = Literal["transformers", "axolotl", "unsloth"]
"""How a quantised model keeps experts that are one parameter.

transformers: as they are saved, in 16 bits.
axolotl: in as many bits as the other weights (its `quantize_moe_experts`); all experts of a layer are dequantised at
    once where the layer runs.
unsloth: the same, each expert a linear layer of its own, dequantised one after the other.
"""

Checkpointing = Literal["auto", True, False]
"""Gradient checkpointing: of as few layers as a plan needs, of all, or of none."""


Attention = Literal["auto", "efficient", "math"]
"""Which kernels CUDA has.

auto: as from Ampere on, flash attention in half precision without a mask, and otherwise the memory-efficient kernel.
efficient: as on Turing, no flash attention; keys and values are repeated for all heads of the query.
math: no fused kernel.
"""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One training step of a LoRA fine-tune.

    Attributes:
        batch_size: rows that the device processes at once; 0 stands for 2 in language modelling (causal-lm), and for
            16 elsewhere.
        accumulation: batches whose gradients one optimizer step adds up; 0 stands for 1, and for 8 in language
            modelling with the usual batch.
        max_length: tokens in a row; longer texts are cut, or split for language modelling. 0 stands for 1024 (or the
            positions of the model) in language modelling, and for 64 elsewhere.
        target_modules: modules that get an adapter: "all-linear", or names separated by commas, as in
            `peft.LoraConfig`.
        target_parameters: fused experts that get an adapter: "all-experts", or names separated by commas, as in
            `peft.LoraConfig` (mlp.experts.gate_up_proj); empty for none.
        optimizer: it decides what is stored for each weight that trains: adamw two numbers, sgd none,
            adafactor at most one, adamw8bit two bytes (needs the extra rankpilot[quant]), paged_adamw8bit as many, in
            pages that CUDA may move to the CPU; they count as on the device, where a change of rank puts them.
            adamw4bit is torchao's, one byte.
        quantization: how the frozen weights are stored: none, as they are saved; nf4, four bits each; int8, eight bits.
            Both need the extra rankpilot[quant].
        prepare_kbit: keep in fp32 what is not quantised, as PEFT's prepare_model_for_kbit_training does, except fused
            experts. TRL's SFTTrainer trains without it, in fewer bytes.
        bf16: compute in bfloat16 under autocast, as the Trainer does with bf16=True.
        gradient_checkpointing: of all layers (True), of none (False), or of as few as the plan needs ("auto").
        exact_savers: lower the bytes of a step at the same losses and gradients, in no more time (docs/savers.md).

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
            raise ConfigError(f"batch_size times max_length is at most {MOST_TOKENS:,} tokens; got {asked}.")
        if not self.prepare_kbit and self.quantization == "none":
            raise ConfigError("prepare_kbit is of a quantised model: give a quantization with it, nf4 or int8.")
        least = min(self.batch_size, self.accumulation, self.max_length)
        if least < 0 or self.max_length == 1 or self.accumulation > MOST_TOKENS:
            raise ConfigError(
                f"batch_size is at least 1, accumulation 1 to {MOST_TOKENS:,}, max_length at least 2, and 0 is the "
                f"usual of each; got {shown(self.batch_size)}, {shown(self.accumulation)} and {shown(self.max_length)}."
            )

    def sized(self, *, continues: bool, positions: int | None = None) -> Self:
        """The settings with the usual batch, accumulation and length in place of those that are 0.

        Args:
            continues: whether the model continues texts.
            positions: the tokens that it can read in a row; None for any number.
        """
        rows, batches, length = (2, 8, 1024) if continues else (16, 1, 64)
        return replace(
            self,
            batch_size=self.batch_size or rows,
            accumulation=self.accumulation or (1 if self.batch_size else batches),
            max_length=self.max_length or min(length, positions or length),
        )


def check_seed(seed: object) -> None:
    """Raise ConfigError for a seed that NumPy's generators do not take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed is a whole number from 0 to 2**32 - 1; got {seed!r}.")


def check_dropout(share: Any) -> None:
    """Raise ConfigError for what is no share of inputs that `peft.LoraConfig` drops."""
    if not is_real(share) or not 0 <= share < 1:
        raise ConfigError(f"lora_dropout is from 0 to below 1; got {shown(share)}.")


def check_length(length: int, most: int | None) -> None:
    """Raise ConfigError for rows that are longer than the model has positions."""
    if most is not None and length > most:
        raise ConfigError(f"The model has {most} positions, and max_length is {length}. Lower --max-length.")
