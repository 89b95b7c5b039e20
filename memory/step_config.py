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
        batch_size: rows on the device at once.
        accumulation: batches whose gradients are added up for one optimiser step.
        max_length: tokens a row.
        target_modules: as in `peft.LoraConfig`; "all-linear" or names separated by commas.
        optimizer: decides what is kept for each weight: adamw two numbers, sgd none, adafactor one at the most,
            adamw8bit two bytes (needs the extra rankpilot[quant]).
        bf16: compute in bfloat16 where autocast does, as the Trainer's bf16=True.
        checkpointing: gradient checkpointing: layers keep their inputs alone and run again in the backward pass.

    Raises:
        ConfigError: a value out of range.
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
