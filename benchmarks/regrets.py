"""`python -m benchmarks regrets`: what a wrong rate and a wrong depth cost on proxies, beside real fine-tunes.

An agent learns from proxies only what they lose by. A loss on held-out rows is told above that of the best rate tried,
with one rank on all modules. The lower half of the layers has twice the rank, and so about as many parameters as all
layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankpilot.common.text import make_table
from rankpilot.decide.rules import FixedPlan, Window, find_rule
from rankpilot.env.evaluate import compare
from rankpilot.env.tasks import FineTuneTask, Kind, Regime
from rankpilot.lora.spec import REFERENCE_RANK
from rich.console import Console

from .harness import Figures, machine_facts
from .labels import ENCODERS_RATE, ROWS, STEPS, Run, held_out_loss, prepared
from .no_sweep import train
from .text_runs import ALPHA

OFFSETS = (-3, -2, -1, 0, 1, 2, 3)
"""Log2 of the rates tried, relative to the expected best one."""

RANK = 4
"""Mean rank of the proxies' budgets."""

LOWER_HALF = FixedPlan("lower half", Window(0.0, 1 / 2))

LOWER_LAYERS: dict[str, Any] = {
    "target_modules": r".*layer\.[0-2]\..*(query|key|value|dense)",
    "r": 2 * REFERENCE_RANK,
    "lora_alpha": 2 * ALPHA,
}
"""The same of the encoder, which has six layers."""

BASES = ("bert-4x64", "llama-4x64")
PROXIES: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "text": ("text", ("reviews", "german")),
    "labels of texts": ("labels", ("sentiment", "newsgroups")),
    "texts as labels": ("labels", ("code+reviews+newsgroups+tables", "german+spanish+italian+dutch")),
}
REAL = (("all-minilm-l6-v2", "rotten-tomatoes"), ("all-minilm-l6-v2", "reuters-r8"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a wrong rate and a wrong depth cost on proxies, beside real fine-tunes.

    Attributes:
        seeds: seeds of each.
        real: also run the real fine-tunes, about ten CPU minutes.
        quick: under a minute: one base, one seed, no real fine-tune.
        json: also write figures to this file.
    """

    seeds: int = 2
    real: bool = True
    quick: bool = False
    json: Path | None = None


def regrets(losses: Sequence[float]) -> dict[str, float]:
    """Return how far above the best a rate four times off and the lower half of the layers end, in %.

    Args:
        losses: of `OFFSETS` with all layers, and of the lower half at the expected best rate.

    Returns:
        The regrets by choice; NaN where no rate was tried that is four times off the best one.
    """
    *rates, lower = losses
    best = int(np.argmin(rates))
    low, high = (rates[at] if 0 <= at < len(rates) else math.nan for at in (best - 2, best + 2))
    pairs = {"rate 4x low": (low, rates[best]), "rate 4x high": (high, rates[best])}
    pairs["lower half"] = lower, rates[len(rates) // 2]
    return {name: 100 * math.log(loss / least) for name, (loss, least) in pairs.items()}


def of_proxy(task: FineTuneTask) -> dict[str, float]:
    """Return the regrets of a proxy task with one rank on all modules."""
    tasks: dict[FineTuneTask, Regime] = {replace(task, offset=float(each)): "plain" for each in OFFSETS}
    found = [row.loss for row in compare({"uniform": find_rule("uniform")}, tasks)]
    return regrets([*found, *(row.loss for row in compare({"lower half": LOWER_HALF}, {task: "plain"}))])


def of_encoder(run: Run) -> dict[str, float]:
    """Return the regrets of an encoder that learns labels, with plain PEFT."""
    return regrets([*(real_loss(run, 2.0**each) for each in OFFSETS), real_loss(run, 1.0, **LOWER_LAYERS)])


def real_loss(run: Run, factor: float, **plan: Any) -> float:
    """Train an encoder at a factor on the rule's rate, and return its held-out loss; for `plan` see `classifier`."""
    model, optimizer, loader = prepared(run, ENCODERS_RATE * factor, **plan)
    torch.manual_seed(run.seed)
    train(STEPS, model, optimizer, loader, None)
    return held_out_loss(run, model)


def benchmark(options: Options, console: Console) -> Figures:
    """Print the regrets of proxies by kind, and those of real fine-tunes."""
    bases, seeds = (BASES[:1], 1) if options.quick else (BASES, options.seeds)
    found: dict[str, list[dict[str, float]]] = {}
    for kind, (labels, corpora) in PROXIES.items():
        for base, corpus, seed in product(bases, corpora[: 1 if options.quick else None], range(seeds)):
            task = FineTuneTask(
                labels, 77_000_000 + seed, base, corpus, mean_rank=float(RANK), warm_up=0.1, steps=STEPS,
                batch_size=ROWS if labels == "labels" else 4,
            )  # fmt: skip
            found.setdefault(f"{kind}, {base}", []).append(of_proxy(task))
    for encoder, text in REAL if options.real and not options.quick else ():
        for seed in range(1, seeds + 1):
            found.setdefault(f"{encoder}, {text}", []).append(of_encoder(Run(encoder, text, seed, "kept")))
    figures: Figures = dict(machine_facts(torch.device("cpu")))
    rows = []
    for name, each in found.items():
        means = {choice: float(np.nanmean([of[choice] for of in each])) for choice in each[0]}
        figures |= {f"{name}, {choice}": value for choice, value in means.items()}
        rows.append((name, str(len(each)), *(f"{value:+.1f}" for value in means.values())))
    columns = ("fine-tunes", "runs", *next(iter(found.values()))[0])
    console.print(make_table("Held-out loss above that of the best rate, or of all layers, %", columns, rows))
    return figures
