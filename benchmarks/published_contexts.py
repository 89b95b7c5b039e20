"""The longest rows that others trained on cards of several sizes, and those that a configuration alone predicts."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rankpilot.cost.cards import find_device_spec
from rankpilot.cost.forecast.card_use import card_use
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.forecast.published import find_configuration
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig

FILE = Path(__file__).parent / "published_peaks" / "unsloth_contexts.csv"

RANK, LONGEST, RECORDED = 32, 2**17, 8192
"""The rank of all modules, more tokens than any card holds, and those of the recorded step."""

NEAR = 0.002
"""The share of a length to which the longest one is found."""


@dataclass(frozen=True)
class Context:
    """The longest row on a card.

    Attributes:
        model: as `find_configuration` names it.
        card_gb: memory of the card.
        tokens: of the row; 0 if none fitted.
    """

    model: str
    card_gb: int
    tokens: int

    @property
    def name(self) -> str:
        """Model and card, for people."""
        return f"{self.model} on {self.card_gb} GB"


def contexts() -> list[Context]:
    """All published lengths."""
    with FILE.open() as file:
        return [Context(row["model"], int(row["card_gb"]), int(row["tokens"])) for row in csv.DictReader(file)]


def longest(context: Context) -> int:
    """The most tokens of a row that fit the card, its context and the allocator's reserve included; 0 for none."""
    card, step = find_device_spec(f"{context.card_gb}GiB"), _step(context.model)
    ranks, loaded = np.full(len(step.targets), RANK), step.model.frozen

    def fits(tokens: int) -> bool:
        return card_use(step.memory, ranks, loaded, card, shape=BatchShape(1, tokens)).spare_bytes >= 0

    least, most = 0, LONGEST
    while most - least > max(1, NEAR * least):
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


@cache
def _step(model: str) -> ConfiguredStep:
    """QLoRA on all linear layers, all of which are checkpointed, as today's libraries run it."""
    step = StepConfig(
        batch_size=1,
        max_length=RECORDED,
        target_modules="all-linear",
        quantization="nf4",
        optimizer="adamw8bit",
        gradient_checkpointing=True,
        exact_savers=False,
        bf16=True,
    )
    return from_config(find_configuration(model), step, LoadedAs(dtype=torch.bfloat16, adapter={"r": RANK}))
