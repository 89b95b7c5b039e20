"""Predictions of whole runs, beside the memory that they took as published, or whether it is known that they fitted."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rankpilot.common.files import write_json
from rankpilot.common.text import make_table
from rankpilot.cost.forecast.card_use import CardUse, slack_of
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.cost.forecast.published import find_configuration
from rich.console import Console
from transformers import JambaConfig, LlamaConfig

from .harness import Figures, with_progress

FILE = Path(__file__).with_name("published_peaks") / "runs.csv"

RESULTS = Path(__file__).with_name("results") / "published_runs.json"

GIB = 2**30

ROUNDS = 60
"""Enough for the smallest card to settle: each round leaves at most the share that is left free."""

_NUMBERS = {"rank": int, "batch_size": int, "max_length": int, "accumulation": int, "lora_dropout": float, "gpus": int}
_SWITCHES = ("packed", "reentrant", "offload", "expandable_segments", "prepare_kbit", "gradient_checkpointing")
_OWN = ("run", "published_gib", "meter", "outcome", "card", "half", "note", "source")


def llama_2_70b() -> Any:
    """The configuration of Llama-2-70B."""
    config = find_configuration("llama-3.1-70b")
    config.vocab_size, config.max_position_embeddings = 32_000, 4096  # all else is as in Llama 3.1
    return config


def _llama(hidden: int, wide: int, layers: int, heads: int, keys: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=16384,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama-2-70b": llama_2_70b,
    "llama-33b": lambda: _llama(6656, 17920, 60, 52, 52),
    "llama-65b": lambda: _llama(8192, 22016, 80, 64, 64),
    "code-llama-34b": lambda: _llama(8192, 22016, 48, 64, 8),
    "jamba": JambaConfig,
}
"""Configurations of models that have no short name."""


@dataclass(frozen=True)
class Run:
    """A run of others.

    Attributes:
        name: what its source calls it.
        published_gib: what it took; 0 where only the outcome is known.
        meter: what that counts: "reserved" by torch's allocator, "allocated" at most, or "in use", a context included.
        outcome: "fits" or "fails" on the card; empty where it is not known on which card it ran.
        card: the card; empty if it is not known.
        half: "fixed" if what is predicted was fixed on it, "held" if nothing was fitted on it.
        note: what is assumed, and what is known of the difference.
        settings: of `memory_of`.
    """

    name: str
    published_gib: float
    meter: str
    outcome: str
    card: str
    half: str
    note: str
    settings: dict[str, Any]

    @cached_property
    def outlook(self) -> Outlook:
        """The forecast on its card, or on an A100 of 80 GB."""
        settings = dict(self.settings)
        model = settings.pop("model")
        return memory_of(MODELS.get(model, lambda: model)(), self.card or "A100 80GB", **settings)

    @property
    def use(self) -> CardUse:
        """The card's memory use as predicted."""
        outlook = self.outlook
        checkpointed = outlook.checkpointable if self.settings["gradient_checkpointing"] else ()
        use = outlook.choice(outlook.blocks, outlook.rank, checkpointed).use
        assert use is not None, "there is a card"
        return use

    @property
    def predicted_gib(self) -> float:
        """What `meter` counts."""
        use = self.use
        counted = {"allocated": use.allocated_bytes, "reserved": use.reserved_bytes}
        return counted.get(self.meter, use.reserved_bytes + use.context_bytes) / GIB

    @property
    def upper_gib(self) -> float:
        """What `meter` counts at most: the smallest card on which the verdict is "fits" decides."""
        use, outlook = self.use, self.outlook
        assert outlook.card is not None, "there is a card"
        least = float(use.total_bytes)
        for _ in range(ROUNDS):
            card = replace(outlook.card, memory_bytes=int(least))
            slack = slack_of(outlook.given, outlook.shards, outlook.settings.quantization, card)
            least = use.total_bytes + slack * least
        return self.predicted_gib + (least - use.total_bytes) / GIB


def runs() -> list[Run]:
    """All runs; what all have in common is not in the file: bf16, and adapters in fp32."""
    with FILE.open() as file:
        return [_run(row) for row in csv.DictReader(file)]


def _run(row: dict[str, str]) -> Run:
    found: dict[str, Any] = {name: value for name, value in row.items() if value and name not in _OWN}
    found |= {name: kind(row[name]) for name, kind in _NUMBERS.items() if row[name]}
    found |= {name: row[name] == "True" for name in _SWITCHES if row[name]}
    found = {"gradient_checkpointing": True} | found | {"exact_savers": False}
    own = {name: row[name] for name in ("meter", "outcome", "card", "half", "note")}
    return Run(row["run"], float(row["published_gib"] or 0), settings=found, **own)


def compare_runs(console: Console) -> Figures:
    """Print and store all; return the errors by name."""
    columns = ("run", "published, GiB", "predicted", "error", "verdict", "outcome", "")
    table = make_table("Runs of others; nothing was fitted on those that are held", columns)
    figures: Figures = {}
    rows: list[dict[str, Any]] = []
    for run in with_progress(runs(), "runs of others"):
        error = run.predicted_gib / run.published_gib - 1 if run.published_gib else None
        verdict = run.use.verdict if run.outcome else ""
        half = "" if run.half == "held" else f"{run.half}. "
        told = (
            f"{run.published_gib:g} {run.meter}",
            f"{run.predicted_gib:.1f}",
            "" if error is None else f"{error:+.1%}",
        )
        table.add_row(run.name, *told, verdict, run.outcome, f"{half}{run.note}")
        own = {"name": run.name, "half": run.half, "note": run.note, "outcome": run.outcome, "verdict": verdict}
        beyond = run.published_gib / run.upper_gib - 1 if run.published_gib else None
        rows.append(own | {"error": error, "beyond": beyond})
        if error is not None:
            figures[f"runs.{run.half}.{run.name}.error"] = error
    write_json(RESULTS, rows)
    console.print(table)
    return figures
