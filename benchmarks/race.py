"""`python -m benchmarks race`: what a race of learning rates would choose, beside the best rate of a sweep.

Lanes of a race are bit for bit the runs that they would be alone (`tests/finetune/test_race.py`). So each cell is a
stored sweep of plain runs, with the losses of their first steps, and the race's own code judges these. Nothing of the
race was fitted on these texts; models of 64 wide learned others for that, and the wider ones are left out as a whole.
What ran the sweeps is at commit c5bd684f.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rankpilot.common.text import make_table
from rankpilot.decide.rate_control import RaceLength, staying, time_for_one_more
from rich.console import Console

from .harness import Figures

STORED = Path(__file__).parent / "results" / "race.json"

SCHEDULES = {
    "120": (120, 0.1, "cosine"),
    "400": (400, 0.1, "linear"),
    "400 constant": (400, 0.1, "constant"),
    "1000": (1000, 0.03, "linear"),
}
"""Optimizer steps, the share of them in which the rate rises, and its course from then on."""

LANES = (0.5, 1.0, 2.0)
"""The lanes of a race, over the rule's rate."""

SWEPT = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Rates of a sweep, over the rule's; where the lowest or the highest was best, one more followed."""


@dataclass(frozen=True)
class Run:
    """One fine-tune: a cell, a seed, and the rate over the rule's; 0 for `learning_rate="auto"`."""

    model: str
    text: str
    schedule: str
    seed: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold the choice of a race of learning rates against the best rate of stored sweeps.

    Attributes:
        json: also write figures to this file.
    """

    json: Path | None = None


def race(losses: Mapping[float, list[float]], schedule: str, start: float) -> tuple[float, float]:
    """The rate that a race goes on with, by its factor, and the steps of further lanes as a share of the run's.

    Args:
        losses: losses of first steps, by factor of the rate: those of the lanes, and of ones that may be called.
        schedule: of `SCHEDULES`.
        start: the lane of the run itself.
    """
    steps, rises, course = SCHEDULES[schedule]
    lanes, further, decays = [start * lane for lane in LANES], 0, course != "constant"
    length = RaceLength.of(round(rises * steps), steps, len(lanes))
    ends, step = (lanes[0], lanes[-1]), 0
    while len(lanes) > 1:
        step += 1
        further += len(lanes) - 1
        if not length.looks(step):
            continue
        at = min(range(len(lanes)), key=lambda lane: abs(math.log(lanes[lane] / start)))
        kept = staying(np.array([losses[lane][:step] for lane in lanes]), at, length, decays=decays)
        lanes = [lanes[lane] for lane in kept]
        beyond = {ends[0]: ends[0] / 2, ends[1]: ends[1] * 2}.get(lanes[0])
        one_more = decays and beyond in losses and time_for_one_more(further, step, steps)
        if len(lanes) == 1 and beyond is not None and one_more:
            further += step  # it repeats them
            lanes, ends = sorted((lanes[0], beyond)), (min(ends[0], beyond), max(ends[1], beyond))
            length = replace(length, first=step + 1, last=step + 1)
    return lanes[0], further / steps


def stored_rows() -> dict[Run, Any]:
    """The losses of each run."""
    return {Run(*run): row for run, row in json.loads(STORED.read_text(encoding="utf-8"))}


def regrets(rows: Mapping[Run, Any], start: float = 1.0) -> dict[tuple[str, str, str, int], dict[str, float]]:
    """By cell in per cent of the loss above the best rate's: the race, its start kept, auto; and the further time.

    Args:
        rows: rows of runs.
        start: where races begin, over the rule's rate.
    """
    found = {}
    for cell in {(run.model, run.text, run.schedule, run.seed) for run in rows}:
        own = {run.factor: row for run, row in rows.items() if (run.model, run.text, run.schedule, run.seed) == cell}
        auto, lanes = own.pop(0.0, None), [start * lane for lane in LANES]
        least = min(own, key=lambda factor: own[factor]["loss"])
        if not {*lanes} <= own.keys() or not ({*SWEPT} <= own.keys() or min(own) < least < max(own)):
            continue
        best = own[least]["loss"]
        chosen, further = race({factor: row["losses"] for factor, row in own.items()}, cell[2], start)
        found[cell] = {
            "race": 100 * math.log(own[chosen]["loss"] / best),
            "start": 100 * math.log(own[start]["loss"] / best),
            "chosen": chosen / least,
            "further": further,
        } | ({"auto": 100 * math.log(auto["loss"] / best)} if auto else {})
    return found


def benchmark(options: Options, console: Console) -> Figures:
    """Print what races choose."""
    return report(stored_rows(), console)


def report(rows: Mapping[Run, Any], console: Console) -> Figures:
    """Print a line for each group of models and schedule, and return the figures."""
    figures: Figures = {}
    table = []
    for start in (0.5, 1.0, 2.0):
        found = regrets(rows, start)
        for schedule in SCHEDULES:
            for name in ("SmolLM2-135M", "256 and 384 wide", "64 wide"):
                own = [each for cell, each in found.items() if cell[2] == schedule and _group(cell[0]) == name]
                if not own:
                    continue
                key, worst = f"{name}, {schedule}, {start:g} of the rule", max(each["race"] for each in own)
                means = {side: float(np.mean([each[side] for each in own])) for side in ("start", "race", "further")}
                figures |= {f"{key}: {side}": means[side] for side in ("start", "race")}
                figures |= {f"{key}: worst": worst, f"{key}: time": 1 + means["further"], f"{key}: cells": len(own)}
                auto = [each["auto"] for each in own if "auto" in each]
                if start == 1 and len(auto) == len(own):
                    figures[f"{key}: auto"] = float(np.mean(auto))
                spread = f"{means['race']:+.2f}", f"{worst:+.2f}", f"{1 + means['further']:.2f}"
                corrected = f"{figures[f'{key}: auto']:+.2f}" if f"{key}: auto" in figures else ""
                table.append(
                    (name, schedule, f"{start:g}", str(len(own)), f"{means['start']:+.2f}", corrected, *spread)
                )
    columns = ("models", "steps", "start", "cells", "start kept, %", "auto", "race", "worst", "time")
    console.print(make_table("Loss above the best rate of a sweep", columns, table))
    return figures


def _group(model: str) -> str:
    width = "256 and 384 wide" if model.endswith(("x256", "x384")) else "64 wide"
    return "SmolLM2-135M" if model.startswith("smollm2") else width
