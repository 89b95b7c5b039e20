"""`python -m benchmarks rates`: what the rule for the learning rate costs beside each task's best rate.

A *sweep* is one fine-tune at several rates. The regret of a rule on it is the log of the loss at the rule's rate, read
off between the rates that were run, less that of the lowest loss. The level of the rule is the constant of wide models,
so the published sweeps and those of SmolLM2 whole are of models left out. The powers are fitted on small models.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
from rankpilot.common.text import make_table
from rankpilot.decide.plan.rate import BELOW, ENDS, MOST_TOKENS, RULE, WIDE, InitialLoss, RateRule
from rankpilot.lora.spec import REFERENCE_RANK
from rich.console import Console
from scipy.optimize import minimize

from .harness import Figures

PUBLISHED = Path(__file__).parent / "published_rates" / "lora_rank_rate_sweep.csv"
PUBLISHED_STEPS, PUBLISHED_ALPHA = 780, 32

PUBLISHED_START = InitialLoss(0.9, MOST_TOKENS)
"""The loss before training is not published; after it, it is .5 to .8."""

ROWS = Path(__file__).parent / "results" / "rates.json"
"""Sweeps of small models; what ran them, and the fine-tunes of `RUNS`, is at commit c5bd684f."""

RUNS = ROWS.with_name("loss_runs.json")
"""Fine-tunes of SmolLM2 whole, of which plain LoRA at several rates is a sweep."""

WHOLE = "smollm2-135m"

QUANTILES = (ENDS, BELOW, 0.5, 1 - ENDS)

CONSTANT = 3e-4
"""The rate of wide models, at `PUBLISHED_ALPHA`."""

DIVERGED = 50.0
"""The loss that counts for a run that diverged, in nats."""

MOST_REGRET = 20.0
"""In per cent; a fit counts larger ones as this."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Judge the rule for the learning rate on published sweeps and on our own.

    Attributes:
        json: also write figures to this file.
    """

    json: Path | None = None


@dataclass(frozen=True)
class Sweep:
    """One fine-tune of plain LoRA at several rates.

    Attributes:
        family: of the model; what is left out together.
        name: of the fine-tune.
        width: of the model.
        steps: of the run.
        rank: of all modules.
        scale: of the adapters.
        loss: before training, in nats.
        tokens: of a step.
        losses: held-out, by rate.
    """

    family: str
    name: str
    width: int
    steps: int
    rank: int
    scale: float
    loss: float
    tokens: float
    losses: Mapping[float, float]

    def rate(self, rule: RateRule) -> float:
        """What a rule says."""
        plain_scale = self.scale * self.rank / REFERENCE_RANK
        one = np.ones(1)
        factor = rule.factor(np.array([self.rank]), self.scale * one, plain_scale * one)
        return factor * rule.plain(self.width, self.steps, plain_scale, InitialLoss(self.loss, self.tokens))

    @property
    def best(self) -> float:
        """The best of the rates that were run."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    def regret(self, rate: float, *, beyond: bool = False) -> float:
        """By how much the loss at a rate is above the lowest, in per cent.

        Args:
            rate: the rate.
            beyond: let it rise outside of the rates that were run; else it is that of the nearest one.
        """
        rates = np.log(sorted(self.losses))
        values = np.log([self.losses[rate] for rate in sorted(self.losses)])
        values, at = 100 * (values - values.min()), math.log(rate)
        regret = float(np.interp(at, rates, values))
        if beyond and at < rates[0]:
            regret += max((values[0] - values[1]) / (rates[1] - rates[0]), 1.0) * (rates[0] - at)
        if beyond and at > rates[-1]:
            regret += max((values[-1] - values[-2]) / (rates[-1] - rates[-2]), 4.0) * (at - rates[-1])
        return regret


def published() -> Iterator[Sweep]:
    """Sweeps of large models that others published."""
    losses: dict[tuple[str, int, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    with PUBLISHED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["model"], int(row["width"]), int(row["rank"])
            losses[key][float(row["learning_rate"])].append(float(row["test_nll"]))
    for (model, width, rank), by_rate in losses.items():
        if len(by_rate) >= 3:
            means = {rate: float(np.mean(values)) for rate, values in by_rate.items()}
            scale, initial = PUBLISHED_ALPHA / rank, PUBLISHED_START
            family, name = model.partition("/")[0], f"{model} rank {rank}"
            yield Sweep(family, name, width, PUBLISHED_STEPS, rank, scale, initial.loss, initial.tokens, means)


WIDTHS = {"smollm2-135m": 576, "smollm2-15": 576, "smollm2-8": 576}


def width_of(model: str) -> int:
    """The hidden width of a model; that of byte models stands in their name, as in "llama-8x64"."""
    return WIDTHS.get(model) or int(model.rpartition("x")[2])


def packed() -> Iterator[Sweep]:
    """Our own sweeps of the repository's file."""
    for sweep in json.loads(ROWS.read_text(encoding="utf-8")):
        model, text, steps, rows = sweep["run"]
        losses = {rate: DIVERGED if loss is None else loss for rate, loss in sweep["losses"]}
        family, name = model.partition("-")[0], f"{model} / {text}, {steps} steps of {rows}"
        yield Sweep(family, name, width_of(model), steps, REFERENCE_RANK, 2.0, sweep["untrained"], 48 * rows, losses)


def whole() -> Iterator[Sweep]:
    """Sweeps of SmolLM2-135M, on which nothing of the rule was fitted."""
    for packed_runs in json.loads(RUNS.read_text(encoding="utf-8")):
        model, text, steps, rows = packed_runs["task"]
        losses = {run[3]: run[4] for run in packed_runs["runs"] if run[:3] == ["all", REFERENCE_RANK, 1.0]}
        if model == WHOLE and len(losses) >= 3:
            loss, name = packed_runs["untrained"], f"{model} / {text}, {steps} steps of {rows}"
            yield Sweep(model, name, width_of(model), steps, REFERENCE_RANK, 2.0, loss, 48 * rows, losses)


def fit(sweeps: Sequence[Sweep]) -> RateRule:
    """The rule with the least mean regret, each family counting alike; wide models have `CONSTANT`."""
    groups = defaultdict(list)
    for sweep in sweeps:
        groups[sweep.family].append(sweep)

    def rule_of(powers: Sequence[float]) -> RateRule:
        width, steps, tokens, loss = powers
        rule = replace(RULE, rate=1.0, of_width=width, of_steps=steps, of_tokens=tokens, of_loss=loss)
        wide = rule.plain(WIDE, PUBLISHED_STEPS, PUBLISHED_ALPHA / REFERENCE_RANK, PUBLISHED_START)
        return replace(rule, rate=CONSTANT / wide)

    def regret(powers: Sequence[float]) -> float:
        rule = rule_of(powers)
        means = [
            np.mean([min(sweep.regret(sweep.rate(rule), beyond=True), MOST_REGRET) for sweep in group])
            for group in groups.values()
        ]
        return float(np.mean(means))

    starts = [[width, -0.1, 0.2, loss] for width in (-0.6, -0.8) for loss in (0.4, 0.8)]
    settings = {"maxiter": 800, "xatol": 1e-3, "fatol": 1e-4, "adaptive": True}
    found = [minimize(regret, start, method="Nelder-Mead", options=settings) for start in starts]
    return rule_of(min(found, key=lambda each: float(each.fun)).x)


RATES: dict[str, Callable[[Sweep], float]] = {
    "rule": lambda sweep: sweep.rate(RULE),
    "1e-4": lambda sweep: 1e-4,
    "3e-4": lambda sweep: 3e-4,
    "1e-3": lambda sweep: 1e-3,
    "width alone": lambda sweep: 5e-4 * (2000 / sweep.width) ** 0.781,
}


def benchmark(options: Options, console: Console) -> Figures:
    """Print the regret of each rule by family."""
    small = [sweep for sweep in packed() if not sweep.name.startswith("smollm2")]
    by_family: dict[str, list[Sweep]] = defaultdict(list)
    for sweep in (*published(), *whole(), *small):
        by_family[sweep.family].append(sweep)
    rows: list[tuple[str, ...]] = []
    figures: Figures = {}
    for family, sweeps in by_family.items():
        cells = []
        for name, rate in RATES.items():
            regrets = [sweep.regret(rate(sweep)) for sweep in sweeps]
            figures[f"{family} {name}"] = float(np.mean(regrets))
            cells.append(f"{np.mean(regrets):.2f} ({max(regrets):.1f})")
        rows.append((family, str(len(sweeps)), *cells))
    names = ("family", "sweeps", *RATES)
    console.print(make_table("Loss above the best rate's, %: mean (worst)", names, rows))
    for name, sweeps in {"published": [*published()], WHOLE: [*whole()]}.items():
        ends = np.quantile([math.log(sweep.best / sweep.rate(RULE)) for sweep in sweeps], QUANTILES)
        told = ", ".join(f"{end:.2f}" for end in np.exp(ends))
        console.print(f"Best rates over the rule's, {name}: quantiles {QUANTILES}: {told}.")
    fitted = fit(small)
    values = ", ".join(
        f"{field.name} {value:.3g}" for field, value in zip(fields(RateRule), astuple(fitted), strict=True)
    )
    console.print(f"Fitted: {values}.", markup=False)
    return figures | {f"fitted {field.name}": getattr(fitted, field.name) for field in fields(RateRule)}
