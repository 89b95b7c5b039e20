"""Verdicts on published GRPO runs with vLLM on the card of the training, of which it is known whether they fit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rankpilot.common.text import make_table
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.cost.forecast.what_else import largest_share
from rankpilot.cost.rollouts import Engine, Rollouts
from rich.console import Console

from .harness import Figures

FILE = Path(__file__).with_name("published_peaks") / "grpo.csv"


def outlook_of(row: dict[str, str]) -> Outlook:
    """The forecast of a run: prompts with answers of the length in the file, all layers checkpointed."""
    settings: dict[str, Any] = {name: row[name] for name in ("dtype", "quantization", "target_modules", "optimizer")}
    settings = {name: value for name, value in settings.items() if value}
    settings |= {name: int(row[name]) for name in ("rank", "batch_size", "max_length")}
    if row["quantization"]:
        settings["prepare_kbit"] = False
    engine = Engine(
        float(row["share"]),
        sleeps=row["sleeps"] == "True",
        length=int(row["engine_length"] or 0),
        lends=row["lends"] == "True",
    )
    return memory_of(
        row["model"],
        row["card"],
        loss="chunked",
        packed=True,  # rows of an engine may be longer than a model's positions
        exact_savers=False,
        gradient_checkpointing=True,
        eval_batch_size="none",
        rollouts=Rollouts(int(row["batch_size"]), engine),
        **settings,
    )


def compare_rollouts(console: Console) -> Figures:
    """Print all runs with the verdicts on them, and return how many are right."""
    with FILE.open() as file:
        rows = list(csv.DictReader(file))
    columns = ("run", "share", "is known to", "predicted", "on the card, GiB", "largest share", "")
    table = make_table("GRPO with vLLM beside training", columns)
    right = 0
    for row in rows:
        outlook = outlook_of(row)
        choice = outlook.choice(outlook.blocks, outlook.rank, outlook.checkpointable)
        engine = outlook.given.loaded.engine
        assert choice.use, "there is a card"
        assert engine, "there is an engine"
        fits = outlook.engine_lacks <= 0 and choice.use.spare_bytes >= 0
        right += fits == (row["outcome"] == "fits")
        told = "fits" if fits else "fails" if outlook.engine_lacks <= 0 else "engine does not start"
        total = f"{choice.use.total_bytes / 2**30:.1f}"
        most = f"{largest_share(outlook, engine):.2f}"
        table.add_row(row["run"], row["share"], row["outcome"], told, total, most, row["note"])
    console.print(table)
    return {"grpo.runs": len(rows), "grpo.right": right}
