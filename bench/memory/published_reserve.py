"""Published bytes that torch's allocator reserved, beside those that a replay of the step predicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ...memory.batch_shape import BatchShape
from ...memory.breakdown import frozen_sizes
from ...memory.device_table import find_device_spec
from ...memory.from_config import ConfiguredStep
from ...memory.verdict import CardUse, card_use
from .published_peaks import FOLDER, LENGTHS, MIB, Compared, T4Row, peft_step, t4_step

CARD_MIB = 14_000
"""The part of a T4's memory for which verdicts are compared."""

SMALLER_CARDS_MIB = range(2048, CARD_MIB, 1024)
"""Smaller cards, on which some of the steps do not fit."""


@dataclass(frozen=True)
class Reserved:
    """A predicted and a published step on a T4.

    Attributes:
        row: as published.
        use: of the card, as predicted.
    """

    row: T4Row
    use: CardUse

    @property
    def compared(self) -> Compared:
        """Reserved bytes, without the context."""
        return Compared(self.row.name, self.use.reserved_bytes / MIB, self.row.reserved)

    @property
    def kind(self) -> str:
        """The setting on which the error depends, such as "sdpa none"."""
        return f"{self.row.attention} {self.row.quantization}"

    def verdict_is_right(self, card_mib: float) -> bool:
        """Whether the verdict for a card of this size is the one that the published figures give."""
        device = replace(self.use.device, memory_bytes=int(card_mib * MIB))
        measured = replace(
            self.use,
            device=device,
            step_bytes=int(self.row.measured * MIB) - self.use.base_bytes,
            reserve_bytes=int((self.row.reserved - self.row.measured) * MIB),
            margin_bytes=0,
        )
        return replace(self.use, device=device).verdict == measured.verdict


def reserve_on_t4(row: T4Row) -> Reserved:
    """Predict what a step on a T4 takes; torch's AdamW with its defaults copies all adapters for a while."""
    step = t4_step(row.model, row.attention, row.quantization)
    states = replace(step.memory.states, scratch=step.memory.states.weights)
    memory = replace(step.memory, states=states)
    ranks = np.full(len(step.targets), row.rank)
    shape = BatchShape(row.rows, row.length)
    return Reserved(row, card_use(memory, ranks, _loaded(step), find_device_spec("T4"), shape=shape))


def right_verdicts(rows: Sequence[Reserved]) -> tuple[int, int]:
    """Right verdicts, and all verdicts, over `SMALLER_CARDS_MIB`."""
    right = [row.verdict_is_right(size) for row in rows for size in SMALLER_CARDS_MIB]
    return sum(right), len(right)


def reserve_of_peft() -> list[Compared]:
    """Predict the runs of PEFT's benchmark; the length of their longest batch is fitted on the first."""
    rows = json.loads((FOLDER / "peft_llama32_3b.json").read_text())["rows"]

    def predicted(row: dict[str, Any], length: int) -> float:
        step = peft_step(tuple(row["target_modules"]), row.get("use_dora", False))
        ranks = np.full(len(step.targets), row["r"])
        use = card_use(step.memory, ranks, _loaded(step), find_device_spec("L40S"), shape=BatchShape(4, length))
        return use.reserved_bytes / MIB

    length = min(LENGTHS, key=lambda length: abs(predicted(rows[0], length) - rows[0]["reserved_mib"]))
    return [Compared(row["name"], predicted(row, length), row["reserved_mib"]) for row in rows]


@cache
def _loaded(step: ConfiguredStep) -> tuple[int, ...]:
    return tuple(frozen_sizes(step.model))
