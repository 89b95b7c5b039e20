"""`python -m benchmarks regrets`: what a wrong rate and a wrong depth cost on proxies, beside real fine-tunes.

An agent learns from proxies only what they lose by. Each loss is told above that of the best rate tried, or of the plan
that was not confined, on held-out rows.
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
from rankpilot.decide.group_rules import GROUP_RULES
from rankpilot.decide.observation import Observation
from rankpilot.decide.policy import Decision, decision_to_keep, is_first
from rankpilot.env.evaluate import compare
from rankpilot.env.tasks import FineTuneTask, Kind
from rich.console import Console

from .harness import Figures, machine_facts
from .labels import HELD_OUT, ROWS, STEPS, Run, classifier, load
from .no_sweep import train

OFFSETS = (-3, -2, -1, 0, 1, 2, 3)
"""Log2 of the rates tried, relative to the expected best one."""

RANK = 4
"""Mean rank of the proxies' budgets."""

ENCODERS_RATE = 1.67e-3
"""Rate of the rule for the encoder (`benchmarks/results/labels.json`)."""

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


@dataclass(frozen=True)
class LowerHalf:
    """Adapters on the lower half of the layers alone, at twice `RANK`, kept to the end."""

    name: str = "lower half"

    def decide(self, observation: Observation) -> Decision:
        """The plan at first, and no change after it."""
        if not is_first(observation):
            return decision_to_keep(observation)
        blocks = observation.problem.blocks
        return Decision(np.where(blocks < (blocks.max() + 1) // 2, 2 * RANK, 0), np.zeros(len(blocks)))


def regrets(losses: Sequence[float], lower: float) -> dict[str, float]:
    """Return by how many per cent a rate four times too low, too high, and the lower half alone end above the best.

    Args:
        losses: of `OFFSETS`.
        lower: of the lower half of the layers at the middle one.
    """
    best = int(np.argmin(losses))
    low, high = losses[max(best - 2, 0)], losses[min(best + 2, len(losses) - 1)]
    pairs = {"rate 4x low": (low, losses[best]), "rate 4x high": (high, losses[best])}
    pairs["lower half"] = lower, losses[len(losses) // 2]
    return {name: 100 * math.log(loss / least) for name, (loss, least) in pairs.items()}


def of_proxy(task: FineTuneTask) -> dict[str, float]:
    """Return the regrets of a proxy task."""
    kept = {"kept": GROUP_RULES["left-alone"]}
    found = [next(compare(kept, {replace(task, offset=float(each)): "plain"})).loss for each in OFFSETS]
    return regrets(found, next(compare({"lower": LowerHalf()}, {task: "plain"})).loss)


def of_encoder(run: Run) -> dict[str, float]:
    """Return the regrets of an encoder that learns labels, with plain PEFT."""
    return regrets([real_loss(run, each) for each in OFFSETS], real_loss(run, 0, lower=True))


def real_loss(run: Run, offset: int, *, lower: bool = False) -> float:
    """Train an encoder at a constant rate with warm-up and decay, and return its held-out loss."""
    rows, held_out, collate, classes = load(run.encoder, run.text)
    model: Any = classifier(run, classes)
    if lower:
        layers = model.config.num_hidden_layers
        for name, parameter in model.named_parameters():
            if any(f"layer.{number}." in name for number in range(layers // 2, layers)):
                parameter.requires_grad_(False)
    rate = ENCODERS_RATE * 2.0**offset
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], rate, weight_decay=0.0)
    order = np.random.default_rng([run.seed, 7]).permutation(len(rows))[: STEPS * ROWS].tolist()
    loader: Any = torch.utils.data.DataLoader(rows, ROWS, sampler=order, collate_fn=collate)
    torch.manual_seed(run.seed)
    train(STEPS, model, optimizer, loader, None)
    model.eval()
    with torch.no_grad():
        batches = [collate([held_out[at] for at in range(first, first + 50)]) for first in range(0, HELD_OUT, 50)]
        return float(np.mean([float(model(**batch).loss) for batch in batches]))


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
        means = {choice: float(np.mean([of[choice] for of in each])) for choice in each[0]}
        figures |= {f"{name}, {choice}": value for choice, value in means.items()}
        rows.append((name, str(len(each)), *(f"{value:+.1f}" for value in means.values())))
    columns = ("fine-tunes", "runs", *next(iter(found.values()))[0])
    console.print(make_table("Held-out loss above that of the best rate tried, or of all layers, %", columns, rows))
    return figures
