"""How the best learning rate depends on the rank, under three rules for the scaling, and on the adapted modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..common.tables import make_table
from ..errors import ConfigError, UnknownNameError
from ..lora.ladder import REFERENCE_RANK
from .harness import Figures, machine_facts, with_progress
from .ledger import Ledger
from .scaling_runs import Setting, Subject, log_loss, share_of

RULES: Mapping[str, float] = {"alpha": 1.0, "rslora": 0.5, "constant": 0.0}
"""By rule the power g in s = 2 (8 / r)^g: all agree at rank 8."""

WITHIN, REGRET, SHARE = 2.0, 0.01, 0.9
"""Bars: the best rate within this factor of rank 8's in this share of the cells, and the mean regret in log loss."""

FARTHEST = 7
"""A search ends so many factors of 2 from where it began."""

SUBJECTS: Mapping[str, Subject] = {
    "decoder": Subject("llama-8x64", None, "tales", 60, 4, 32, 192, 8e-3, (1, 4, 8, 16, 64)),
    "minilm-3": Subject("all-minilm-l6-v2", 3, "topics", 30, 8, 24, 256, 2e-3, (1, 4, 8, 16, 64)),
    "minilm": Subject("all-minilm-l6-v2", None, "newsgroups", 40, 8, 24, 256, 2e-3, (1, 8, 64)),
    "smollm2": Subject(
        "smollm2-135m-instruct", None, "code", 12, 2, 32, 16, 2e-3, (1, 8, 64), ("top half", "attention")
    ),
}
_TINY = Subject("llama-4x32", None, "tales", 15, 4, 16, 32, 1.6e-2, (1, 8, 32), ("top half",))
QUICK: Mapping[str, Subject] = {"quick": _TINY}

VARIANTS: Mapping[str, Setting] = {
    "three times the steps": Setting(stretch=3),
    "weight decay 0.1": Setting(weight_decay=0.1),
    "dropout 0.1": Setting(dropout=0.1),
}
VARIED = ("decoder", (1, 8, 64))
"""On which subject and at which ranks variants are measured, under alpha."""


@dataclass(frozen=True)
class Options:
    """Search the best learning rate of short fine-tunes at ranks 1 to 64, and on parts of the modules.

    Models: MiniLM-L6 on newsgroups, its first 3 layers on news topics, a pretrained decoder of rankpilot on tales, and
    SmolLM2-135M on code for a few steps. Rules for the scaling: constant (s is 2 at every rank), rslora (s falls with
    the root of the rank) and alpha (s = 16 / r, PEFT's `lora_alpha`). Each search tries rates in factors of 2 until the
    best has a worse one on both sides, each the mean log loss of all seeds, and a parabola through the three tells the
    best rate. Held-out losses throughout; a model's cells share batches and initial adapters.

    The tables show the range of the best rates over ranks (in factors of 2), the share of cells within a factor of 2 of
    rank 8's, and the regret: how much log loss is lost at rank 8's rate. Then the best rate where half of the layers, a
    quarter, attention or MLPs alone are adapted, at rank 8, with d of rate ~ share^-d; and the same ranges over longer
    runs, with weight decay and with dropout. The full run takes about 40 minutes on a core.

    Attributes:
        subjects: which models: minilm, minilm-3, decoder, smollm2.
        seeds: runs of each rate, at least 1.
        quick: under a minute: one tiny model, one seed.
        json: also write the figures to this file, as flat JSON with names like "minilm.alpha.range"; runs go into a
            .jsonl file beside it as they end.
        resume: go on with the runs of an interrupted benchmark, from the .jsonl file.
    """

    subjects: tuple[str, ...] = tuple(SUBJECTS)
    seeds: int = 2
    quick: bool = False
    json: Path | None = None
    resume: bool = False

    def check(self) -> None:
        """Raise ConfigError or UnknownNameError for values out of range."""
        if self.seeds < 1:
            raise ConfigError(f"--seeds is at least 1; got {self.seeds}.")
        for name in self.subjects:
            if name not in SUBJECTS:
                raise UnknownNameError.of("subject", name, SUBJECTS)


@dataclass(frozen=True)
class Best:
    """What a search found.

    Attributes:
        rate: the best learning rate, between grid points.
        at: the best rate of the grid.
        losses: mean log loss by rate.
    """

    rate: float
    at: float
    losses: dict[float, float]


def search(loss_at: Callable[[float], float], start: float) -> Best:
    """The rate with the lowest loss, on a grid of factors of 2.

    Args:
        loss_at: mean log loss at a rate; infinity where training diverges.
        start: the first rate that is tried.
    """
    losses: dict[int, float] = {}

    def at(power: int) -> float:
        if power not in losses:
            losses[power] = loss_at(start * 2.0**power)
        return losses[power]

    best = 0
    while abs(best) < FARTHEST:
        lower = min((best - 1, best, best + 1), key=at)
        if lower == best:
            break
        best = lower
    offset = _lowest_point(at(best - 1), at(best), at(best + 1))
    grid = {start * 2.0**power: loss for power, loss in sorted(losses.items())}
    return Best(start * 2.0 ** (best + offset), start * 2.0**best, grid)


def _lowest_point(left: float, middle: float, right: float) -> float:
    """Where the parabola through (-1, left), (0, middle) and (1, right) is lowest, within -1/2 to 1/2."""
    if not math.isfinite(left) or not math.isfinite(right):
        return 0.0
    curvature = left - 2 * middle + right
    return float(np.clip((left - right) / (2 * curvature), -0.5, 0.5)) if curvature > 0 else 0.0


class Search:
    """Searches of one subject, whose runs are kept in a ledger."""

    subject: Subject

    def __init__(self, subject: Subject, seeds: int, ledger: Ledger) -> None:
        self.subject, self._seeds, self._ledger = subject, seeds, ledger
        self._found: dict[Setting, Best] = {}

    def loss(self, setting: Setting, rate: float) -> float:
        """Mean log loss over the seeds."""
        return float(np.mean([self._run(setting, rate, seed) for seed in range(self._seeds)]))

    def _run(self, setting: Setting, rate: float, seed: int) -> float:
        work = [asdict(self.subject), asdict(setting), f"{rate:.4g}", seed]
        if self._ledger.get(work) is None:
            value = log_loss(self.subject, setting, rate, seed)
            self._ledger.add(work, value if math.isfinite(value) else "diverged")
        kept = self._ledger.get(work)
        return math.inf if kept == "diverged" else float(kept)

    def best(self, setting: Setting) -> Best:
        """The best rate of a setting; the search begins where the last one of its placement ended."""
        if setting not in self._found:
            near = [found.at for other, found in self._found.items() if other.placement == setting.placement]
            start = near[-1] if near else self.subject.rate
            self._found[setting] = search(lambda rate: self.loss(setting, rate), start)
        return self._found[setting]

    def regret(self, setting: Setting, rate: float) -> float:
        """What a setting loses at a rate, in log loss."""
        found = self.best(setting)
        return max(0.0, self.loss(setting, rate) - found.losses[found.at])


def setting_of(rule: str, rank: int, base: Setting | None = None) -> Setting:
    """A rank under a rule for the scaling."""
    return replace(base or Setting(), rank=rank, scaling=2.0 * (REFERENCE_RANK / rank) ** RULES[rule])


def over_ranks(searches: Search, rule: str, ranks: Sequence[int], base: Setting | None = None) -> Figures:
    """Best rates at these ranks beside that at rank 8, which is one of them."""
    settings = {rank: setting_of(rule, rank, base) for rank in sorted(ranks, key=lambda r: abs(math.log2(r / 8)))}
    reference = searches.best(settings[REFERENCE_RANK])
    powers = {rank: math.log2(searches.best(setting).rate / reference.rate) for rank, setting in settings.items()}
    others = [rank for rank in settings if rank != REFERENCE_RANK]
    regrets = [searches.regret(settings[rank], reference.at) for rank in others]
    return {
        **{f"best_rate.{rank}": searches.best(settings[rank]).rate for rank in sorted(settings)},
        **{
            f"best_loss.{rank}": math.exp(min(searches.best(settings[rank]).losses.values()))
            for rank in sorted(settings)
        },
        "range": max(powers.values()) - min(powers.values()),
        "cells": len(others),
        "within": sum(abs(powers[rank]) <= math.log2(WITHIN) for rank in others),
        "regret": float(np.mean(regrets)),
        "worst_regret": max(regrets),
    }


def over_placements(searches: Search) -> Figures:
    """Best rates at rank 8 on parts of the modules, and how they depend on the share of the modules."""
    whole = searches.best(Setting())
    figures: Figures = {}
    points = []
    for placement in searches.subject.placements:
        setting = Setting(placement=placement)
        share = share_of(searches.subject, placement)
        found = searches.best(setting)
        points.append((math.log2(share), math.log2(found.rate / whole.rate)))
        key = placement.replace(" ", "_")
        figures |= {
            f"{key}.share": share,
            f"{key}.ratio": found.rate / whole.rate,
            f"{key}.regret": searches.regret(setting, whole.at),
        }
    shares, powers = np.array(points).T
    return figures | {"d": float(-(shares @ powers) / (shares @ shares))}


def _summary(figures: Figures, keys: Sequence[str]) -> Figures:
    """The figures of one rule over all subjects."""
    cells = sum(float(figures[f"{key}.cells"]) for key in keys)
    within = sum(float(figures[f"{key}.within"]) for key in keys) / cells
    regret = sum(float(figures[f"{key}.regret"]) * float(figures[f"{key}.cells"]) for key in keys) / cells
    return {"within_factor_2": within, "mean_regret": regret, "passed": within >= SHARE and regret <= REGRET}


def _figures_of(searches: Search, *, varied: bool) -> Figures:
    """All figures of one subject."""
    ranks = searches.subject.ranks
    parts = {rule: over_ranks(searches, rule, ranks) for rule in RULES} | {"placement": over_placements(searches)}
    if varied:
        for variant, base in VARIANTS.items():
            parts[f"alpha, {variant}"] = over_ranks(searches, "alpha", VARIED[1], base)
    return {f"{part}.{key}": value for part, figures in parts.items() for key, value in figures.items()}


def _ranks_table(figures: Figures) -> Table:
    rows = []
    for key in [name.removesuffix(".range") for name in figures if name.endswith(".range")]:
        values = {end: float(figures[f"{key}.{end}"]) for end in ("range", "within", "cells", "regret", "worst_regret")}
        within = f"{values['within']:.0f} of {values['cells']:.0f}"
        name = key.replace(".", ", ", 1)
        rows.append([name, f"{values['range']:.2f}", within, *(f"{values[e]:.2%}" for e in ("regret", "worst_regret"))])
    columns = ("model, rule", "range, log2", "within a factor of 2", "regret", "worst")
    return make_table("best learning rate over ranks, beside that of rank 8", columns, rows)


def _placements_table(figures: Figures, subjects: Mapping[str, Subject]) -> Table:
    rows = []
    for name, subject in subjects.items():
        for placement in subject.placements:
            key = f"{name}.placement.{placement.replace(' ', '_')}"
            share, ratio, regret = (float(figures[f"{key}.{end}"]) for end in ("share", "ratio", "regret"))
            d = float(figures[f"{name}.placement.d"])
            rows.append([name, placement, f"{share:.2f}", f"{ratio:.2f}", f"{regret:.2%}", f"{d:.2f}"])
    columns = ("model", "adapted at rank 8", "share", "best rate over that of all", "regret", "d")
    return make_table("best learning rate over placements", columns, rows)


def benchmark(options: Options, console: Console) -> Figures:
    """Search, print the tables, and return all figures.

    Raises:
        ConfigError, UnknownNameError: bad options, or results that are in the way.
    """
    options.check()
    ledger = Ledger(options.json, resume=options.resume)
    subjects = QUICK if options.quick else {name: SUBJECTS[name] for name in options.subjects}
    figures: Figures = {**machine_facts(torch.device("cpu")), "quick": options.quick}
    for name, subject in with_progress(list(subjects.items()), "searching"):
        found = _figures_of(Search(subject, 1 if options.quick else options.seeds, ledger), varied=name == VARIED[0])
        figures |= {f"{name}.{key}": value for key, value in found.items()}
    console.print(_ranks_table(figures))
    console.print(_placements_table(figures, subjects))
    for rule in RULES:
        summary = _summary(figures, [f"{name}.{rule}" for name in subjects])
        figures |= {f"{rule}.{key}": value for key, value in summary.items()}
        console.print(
            f"{rule}: {summary['within_factor_2']:.0%} of the cells within a factor of 2, mean regret "
            f"{summary['mean_regret']:.2%}; {'within' if summary['passed'] else 'outside'} the bars of "
            f"{SHARE:.0%} and {REGRET:.0%}.",
            highlight=False,
            soft_wrap=True,
        )
    return figures
