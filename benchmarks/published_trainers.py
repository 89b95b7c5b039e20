"""Predictions of runs as axolotl trains them, beside the memory that its examples publish."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankpilot.common.text import make_table
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rich.console import Console

from .harness import Figures

FILE = Path(__file__).with_name("published_peaks") / "axolotl.csv"

GIB = 2**30

_NUMBERS = {"rank": int, "batch_size": int, "max_length": int, "accumulation": int, "lora_dropout": float}
_SWITCHES = ("packed", "reentrant", "offload", "expandable_segments", "prepare_kbit")


@dataclass(frozen=True)
class Example:
    """An example of axolotl's.

    Attributes:
        name: of its file.
        published_gib: what its page says that it takes, "about".
        half: "fixed" if what is predicted was fixed on it, "held" if it was only looked at afterwards.
        note: what is known of the difference.
        settings: of `memory_of`.
    """

    name: str
    published_gib: float
    half: str
    note: str
    settings: dict[str, Any]

    @property
    def outlook(self) -> Outlook:
        """On an A100 of 80 GB."""
        settings = dict(self.settings)
        return memory_of(settings.pop("model"), "A100 80GB", **settings)

    @property
    def predicted_gib(self) -> float:
        """What torch's allocator reserves there."""
        outlook = self.outlook
        use = outlook.choice(outlook.blocks, outlook.rank, outlook.checkpointable).use
        assert use is not None, "there is a card"
        return use.reserved_bytes / GIB


def examples() -> list[Example]:
    """All examples; what all have in common is not in the file: bf16, gradient checkpointing, adapters in fp32."""
    with FILE.open() as file:
        rows = list(csv.DictReader(file))
    return [
        Example(row.pop("example"), float(row.pop("published_gib")), row.pop("half"), row.pop("note"), _settings(row))
        for row in rows
    ]


def _settings(row: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for name, value in row.items() if value}
    found |= {name: kind(row[name]) for name, kind in _NUMBERS.items()}
    found |= {name: row[name] == "True" for name in _SWITCHES if row[name]}
    return found | {"exact_savers": False, "gradient_checkpointing": True}


def compare_examples(console: Console) -> Figures:
    """Print all, and return the errors by name."""
    table = make_table("Memory that axolotl's examples publish, in GiB", ("example", "published", "predicted", "", ""))
    figures: Figures = {}
    for example in examples():
        predicted = example.predicted_gib
        error = predicted / example.published_gib - 1
        table.add_row(example.name, f"{example.published_gib:g}", f"{predicted:.1f}", f"{error:+.1%}", example.note)
        figures[f"axolotl.{example.half}.{example.name}.error"] = error
    console.print(table)
    return figures
