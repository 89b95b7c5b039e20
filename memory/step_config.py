"""Settings of one training step: what `rankpilot finetune` runs and `rankpilot memory` looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit"]


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
            adafactor at most one, adamw8bit two bytes (needs the extra rankpilot[quant]).
        bf16: compute in bfloat16 under autocast, as the Trainer does with bf16=True.
        checkpointing: gradient checkpointing: each layer stores only its inputs, and runs again in the backward pass.

    Raises:
        ConfigError: a value is out of range.
    """

    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 64
    target_modules: str = "all-linear"
    optimizer: OptimizerName = "adamw"
    bf16: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulation) < 1 or self.max_length < 2:
            raise ConfigError(
                "batch_size and accumulation are at least 1, max_length at least 2; got "
                f"{self.batch_size}, {self.accumulation} and {self.max_length}."
            )
