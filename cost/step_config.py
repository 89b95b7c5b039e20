"""Settings of one training step: what `rankpilot finetune` runs and `rankpilot memory` looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

MOST_TOKENS = 2**24
"""The largest batch, in tokens, far beyond what any device holds."""

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit", "paged_adamw8bit"]


Quantization = Literal["none", "nf4", "int8"]

Checkpointing = Literal["auto", True, False]
"""Whether layers run again in the backward pass: as few as a plan needs, all, or none."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One training step of a LoRA fine-tune.

    Attributes:
        batch_size: rows that the device processes at once.
        accumulation: how many batches add up their gradients for one optimiser step.
        max_length: tokens in a row; longer texts are cut, or split for language modelling.
        target_modules: modules that get an adapter: "all-linear", or names separated by commas, as in
            `peft.LoraConfig`.
        optimizer: the optimiser. It decides what is stored for each weight that trains: adamw two numbers, sgd none,
            adafactor at most one, adamw8bit two bytes (needs the extra rankpilot[quant]), paged_adamw8bit as many, in
            pages that CUDA may move to the CPU; they count as on the device, where a change of rank puts them.
        quantization: how the frozen weights are stored: none, as they are saved; nf4, four bits each; int8, eight bits.
            Both need the extra rankpilot[quant].
        bf16: compute in bfloat16 under autocast, as the Trainer does with bf16=True.
        gradient_checkpointing: True lets each layer store only its inputs, and run again in the backward pass; "auto"
            as few layers as a plan needs, where there is one.
        exact_savers: run it with what takes fewer bytes at the same losses and gradients, and no more time; see
            `cost/savers.py`.

    Raises:
        ConfigError: a value is out of range.
    """

    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 64
    target_modules: str = "all-linear"
    optimizer: OptimizerName = "adamw"
    quantization: Quantization = "none"
    bf16: bool = False
    gradient_checkpointing: Checkpointing = "auto"
    exact_savers: bool = True

    def __post_init__(self) -> None:
        if self.batch_size * self.max_length > MOST_TOKENS:
            asked = f"{self.batch_size} x {self.max_length}"
            raise ConfigError(f"batch_size times max_length is at most {MOST_TOKENS:,} tokens; got {asked}.")
        if min(self.batch_size, self.accumulation) < 1 or self.max_length < 2:
            raise ConfigError(
                "batch_size and accumulation are at least 1, max_length at least 2; got "
                f"{self.batch_size}, {self.accumulation} and {self.max_length}."
            )


def check_seed(seed: object) -> None:
    """Raise ConfigError for a seed that NumPy's generators do not take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed is a whole number from 0 to 2**32 - 1; got {seed!r}.")
