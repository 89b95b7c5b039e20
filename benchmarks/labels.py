"""`python -m benchmarks labels`: encoders that learn labels under "auto" and "race", and at the rate both begin at.

All runs of a cell have the same adapters, head, batches and dropout, and no seed is chosen by its outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rankpilot.common.text import make_table
from rankpilot.data.models import load_model, load_tokenizer
from rankpilot.data.packaged_data import load_packaged_dataset
from rankpilot.data.task import KINDS
from rankpilot.env.bases import load_base_model
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.peft_config import fresh_adapters
from rankpilot.lora.spec import REFERENCE_RANK
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

from .harness import Figures, collect_rows, known_rows, pack_rows, packed_rows
from .no_sweep import PLAIN_OPTIONS, Plain, train
from .text_runs import ALPHA

STORED = Path(__file__).parent / "results" / "labels.json"

ENCODERS = {"all-minilm-l6-v2": 40, "bert-4x64": 96}
"""Tokens of a row by model; the second model ships with the package and reads bytes."""

TEXTS, SEEDS = ("rotten-tomatoes", "reuters-r8", "imdb"), (1, 2, 3)

STEPS, ROWS, HELD_OUT = 120, 8, 400

ENCODERS_RATE = 1.67e-3
"""Rate of the rule for the first encoder."""

SIDES = ("auto", "race", "kept")
"""The default, a race of rates around the rule's, and the rate at which both begin."""


@dataclass(frozen=True)
class Run:
    """One fine-tune: an encoder, a text with labels, a seed, and one of `SIDES`."""

    encoder: str
    text: str
    seed: int
    side: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold the default learning rate on labels against the rate at which it begins.

    Attributes:
        output: folder of the rows; an interrupted comparison goes on there.
        workers: processes of one thread each; 0 for as many as there are cores.
        minutes: stop after so many, when the runs that have begun are over; 0 for the rows that are stored.
        pack: put the rows into the repository's file.
        quick: under a minute: the small encoder, one text, one seed.
        json: also write figures to this file.
    """

    output: Path = Path("runs/labels")
    workers: int = 0
    minutes: float | None = None
    pack: bool = False
    quick: bool = False
    json: Path | None = None


@lru_cache(maxsize=1)
def load(encoder: str, text: str) -> tuple[Any, Any, Callable[[Any], Any], int]:
    """Training rows, held-out rows, what makes a batch of rows, and the number of classes."""
    splits, length = load_packaged_dataset(text), ENCODERS[encoder]
    tokenizer = load_tokenizer(encoder) if encoder != "bert-4x64" else None

    def collate(rows: Any) -> Any:
        texts, labels = [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])
        if tokenizer:
            read = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            return {**read, "labels": labels}
        ids = [torch.tensor(list(text.encode()[:length])) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        return {"input_ids": padded.clamp(min=0), "attention_mask": (padded >= 0).long(), "labels": labels}

    held_out = splits["validation"].shuffle(seed=0).select(range(HELD_OUT))
    return splits["train"], held_out, collate, splits["train"].features["label"].num_classes


def classifier(run: Run, classes: int, **plan: Any) -> PeftModel:
    """The run's encoder with fresh adapters and a new head.

    Args:
        run: names the encoder and the seed.
        classes: their number.
        plan: settings of the LoraConfig; by default rank 8 on all linear modules.
    """
    torch.manual_seed(run.seed)
    if run.encoder == "bert-4x64":
        known = load_base_model(run.encoder)
        known.config.num_labels = classes
        base = BertForSequenceClassification(known.config)
        base.load_state_dict(known.state_dict(), strict=False)
    else:
        labels = tuple(map(str, range(classes)))
        base = load_model(run.encoder, "classification", labels, load_tokenizer(run.encoder))
    plan = {"target_modules": "all-linear", "r": REFERENCE_RANK, "lora_alpha": ALPHA, **plan}
    kind = KINDS["classification"].peft_type
    return fresh_adapters(base.float(), run.encoder, kind, new_head=True, **plan).train()


def prepared(run: Run, rate: float, **plan: Any) -> tuple[PeftModel, torch.optim.Optimizer, DataLoader[Any]]:
    """The model, optimizer and batches of a run; for `plan` see `classifier`."""
    rows, _, collate, classes = load(run.encoder, run.text)
    model = classifier(run, classes, **plan)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], rate, weight_decay=0.0)
    order = np.random.default_rng([run.seed, 7]).permutation(len(rows))[: STEPS * ROWS].tolist()
    return model, optimizer, DataLoader(rows, ROWS, sampler=order, collate_fn=collate)


def held_out_loss(run: Run, model: PeftModel) -> float:
    """Mean loss of a run's model on its held-out rows."""
    _, held_out, collate, _ = load(run.encoder, run.text)
    model.eval()
    with torch.no_grad():
        batches = [collate([held_out[at] for at in range(first, first + 50)]) for first in range(0, HELD_OUT, 50)]
        return float(np.mean([float(model(**batch).loss) for batch in batches]))


def perform(run: Run) -> dict[str, Any]:
    """Train a run to its end; its held-out loss, the rate at the start, and the moves of the rate by step."""
    model, optimizer, loader = prepared(run, 1e-3)
    options = replace(PLAIN_OPTIONS["race" if run.side == "race" else "auto"], budget="99M params")
    pilot = RankPilot(Plain(), options, seed=run.seed, tell=lambda line: None)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=STEPS))
    assert pilot.rates is not None
    rate = ended = pilot.rates[1]
    if run.side == "kept":
        pilot.finish()
        optimizer.param_groups[0]["lr"] = rate
    torch.manual_seed(run.seed)
    train(STEPS, model, optimizer, loader, None if run.side == "kept" else pilot)
    if run.side != "kept":
        ended = pilot.rates[1]
        pilot.finish()
    return {"loss": round(held_out_loss(run, model), 5), "rate": rate, "moved": round(ended / rate, 4)}


def stored_rows() -> dict[Run, Any]:
    """The rows of the repository."""
    return packed_rows(Run, STORED)


def changes(rows: dict[Run, Any], side: str) -> dict[Run, float]:
    """By how much the loss of a side is above that of the rate that was kept, in per cent of it, by run of the side."""
    pairs = {run: replace(run, side="kept") for run in rows if run.side == side}
    return {run: 100 * (rows[run]["loss"] / rows[kept]["loss"] - 1) for run, kept in pairs.items() if kept in rows}


def benchmark(options: Options, console: Console) -> Figures:
    """Run what is missing, and print each side versus the rate that was kept."""
    path = options.output / "rows.jsonl"
    rows = known_rows(Run, path, STORED, options.minutes)

    def missing() -> Iterator[Run]:
        cells = [("bert-4x64", TEXTS[0], 1)] if options.quick else [*product(ENCODERS, TEXTS, SEEDS)]
        return (run for cell in cells for side in SIDES if (run := Run(*cell, side)) not in rows)

    def told(run: Run, row: Any) -> str:
        return f"{run.encoder} {run.text} {run.side}, seed {run.seed}: {row['loss']}"

    collect_rows(path, rows, missing, perform, told, workers=options.workers, minutes=options.minutes)
    if options.pack:
        pack_rows(STORED, rows)
    figures: Figures = {}
    table = []
    for side, encoder, text in product(SIDES[:2], ENCODERS, TEXTS):
        found = [by for run, by in changes(rows, side).items() if (run.encoder, run.text) == (encoder, text)]
        if found:
            mean, worst = math.fsum(found) / len(found), max(found)
            figures |= {f"{encoder} {text}, {side}: mean": mean, f"{encoder} {text}, {side}: worst": worst}
            table.append((side, encoder, text, str(len(found)), f"{mean:+.2f}", f"{worst:+.2f}"))
    columns = ("side", "encoder", "text", "seeds", "loss, %", "worst")
    console.print(make_table("Versus the rate at the start, kept", columns, table))
    return figures
