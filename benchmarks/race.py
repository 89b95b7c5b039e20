"""`python -m benchmarks race`: what a race of learning rates would choose, beside the best rate of a sweep.

Lanes of a race are bit for bit the runs that they would be alone (`tests/finetune/test_race.py`). So each cell is a
sweep of plain runs, with the losses of their first steps, and the race's own code judges these. Nothing of the race was
fitted on these texts; models of 64 wide learned others for that, and the wider ones are left out as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankpilot.common.text import make_table
from rankpilot.decide.race import RaceLength, staying, time_for_one_more
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.plan_rate import initial_loss, rate_by_rule
from rankpilot.lora.targets import find_target_modules
from rich.console import Console

from .harness import Figures, collect_rows, known_rows, pack_rows, packed_rows
from .no_sweep import PLAIN_OPTIONS, Plain, train
from .text_runs import adapted_model, held_out_loss, new_loader, training_run
from .texts import TextTask, load_data

STORED = Path(__file__).parent / "results" / "race.json"

SCHEDULES = {
    "120": (120, 0.1, "cosine"),
    "400": (400, 0.1, "linear"),
    "400 constant": (400, 0.1, "constant"),
    "1000": (1000, 0.03, "linear"),
}
"""Optimizer steps, the share of them in which the rate rises, and its course from then on."""

SMALL = (
    ("llama-8x64", "language-gl"),
    ("gpt2-8x64", "package-http"),
    ("gpt2-4x64", "group-rec.autos"),
    ("llama-4x64", "language-eu"),
)
WIDE = (("llama-8x256", "french"), ("gpt2-4x384", "package-unittest"), ("llama-8x256", "templates"))
WHOLE = (("smollm2-135m", "news"), ("smollm2-135m", "docstrings"))

CELLS = (
    *((*cell, "120") for cell in WHOLE),
    *((*cell, "400") for cell in (*WHOLE, *WIDE, *SMALL)),
    *((*cell, "1000") for cell in SMALL),
    *((*cell, "120") for cell in SMALL),
    *((*cell, "400 constant") for cell in SMALL[2:]),
)
"""Model, text and schedule of each sweep."""

LANES = (0.5, 1.0, 2.0)
"""The lanes of a race, over the rule's rate."""

SWEPT = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Rates of a sweep, over the rule's; where the lowest or the highest is best, one more follows."""

KEPT = 2.5
"""Losses of so many warm-ups are kept, at least of `LEAST_KEPT` steps."""

LEAST_KEPT = 40


@dataclass(frozen=True)
class Run:
    """One fine-tune: a cell, a seed, and the rate over the rule's; 0 for `learning_rate="auto"`."""

    model: str
    text: str
    schedule: str
    seed: int
    factor: float

    @property
    def task(self) -> TextTask:
        """What is trained."""
        steps, _, _ = SCHEDULES[self.schedule]
        return TextTask(self.model, self.text, steps, 4 if self.model.startswith("smollm2") else 8)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold the choice of a race of learning rates against the best rate of a sweep, on texts left out.

    Attributes:
        output: folder of the rows; an interrupted comparison goes on there.
        workers: processes of one thread each; 0 for as many as there are cores.
        minutes: stop after so many, when the runs that have begun are over; 0 for the rows that are stored.
        only: sweeps of models whose names contain this.
        pack: put the rows into the repository's file.
        quick: under a minute: one small model, 120 steps.
        json: also write figures to this file.
    """

    output: Path = Path("runs/race")
    workers: int = 0
    minutes: float | None = None
    only: str = ""
    pack: bool = False
    quick: bool = False
    json: Path | None = None


def share_at(step: int, schedule: str) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    steps, rises, course = SCHEDULES[schedule]
    warm = round(rises * steps)
    left = (steps - step) / (steps - warm)
    falls = {"linear": left, "constant": 1.0, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[course]
    return min((step + 1) / warm, falls) if step < warm else falls


def perform(run: Run) -> dict[str, Any]:
    """Train a run to its end; its held-out loss, its rate, the losses of its first steps, and CPU seconds."""
    task, data = run.task, load_data(run.task)
    model = adapted_model(task, run.seed)
    training = training_run(task, model, 1e-3, run.seed)
    optimizer, pilot = training.optimizer, None
    initial = initial_loss(training, training.read_first_rows(run.seed))
    rule = rate_by_rule(model, find_target_modules(model), task.steps, initial)
    optimizer.param_groups[0]["lr"] = rate = rule * (run.factor or 1.0)
    begun = time.process_time()
    if not run.factor:
        options = replace(PLAIN_OPTIONS["auto"], budget="99M params")
        pilot = RankPilot(Plain(), options, seed=run.seed, tell=lambda line: None)
        pilot.begin(training)
    torch.manual_seed(run.seed)
    loader = new_loader(task, data, run.seed)
    losses = train(task.steps, model, optimizer, loader, pilot, lambda step: share_at(step, run.schedule))
    spent = time.process_time() - begun
    if pilot and pilot.rates:
        rate = pilot.rates[1]
        pilot.finish()
    loss = held_out_loss(model, data, task)
    kept = max(math.ceil(KEPT * SCHEDULES[run.schedule][1] * task.steps), LEAST_KEPT)
    own = [round(each, 4) for each in losses[:kept]] if run.factor else []
    return {"loss": round(loss, 5), "rate": rate, "losses": own, "seconds": round(spent, 1)}


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
    """The rows of the repository."""
    return packed_rows(Run, STORED)


def next_runs(rows: Mapping[Run, Any], only: str) -> Iterator[Run]:
    """The runs that are missing, as far as the rows so far tell."""
    for cell in CELLS:
        if only not in cell[0]:
            continue
        yield from (run for factor in (*SWEPT, 0.0) if (run := Run(*cell, 0, factor)) not in rows)
        swept = {
            run.factor: row["loss"] for run, row in rows.items() if run == Run(*cell, 0, run.factor) and run.factor
        }
        if set(SWEPT) <= swept.keys():
            best = min(swept, key=lambda factor: swept[factor])
            beyond = {min(swept): best / 2, max(swept): best * 2}.get(best)
            if beyond and len(swept) < len(SWEPT) + 2:
                yield Run(*cell, 0, beyond)


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
    """Run what is missing, and print what races choose."""
    path = options.output / "rows.jsonl"
    rows = known_rows(Run, path, STORED, options.minutes)

    def missing() -> Iterator[Run]:
        if options.quick:
            yield from (run for factor in SWEPT if (run := Run(*SMALL[3], "120", 0, factor)) not in rows)
        else:
            yield from next_runs(rows, options.only)

    def told(run: Run, row: Any) -> str:
        side = f"x {run.factor:g}" if run.factor else "auto"
        return f"{run.model} {run.text} {run.schedule} {side}: {row['loss']} ({row['seconds']} s)"

    collect_rows(path, rows, missing, perform, told, workers=options.workers, minutes=options.minutes)
    if options.pack:
        pack_rows(STORED, rows)
    return report(rows, console)


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
    wide = "256 and 384 wide" if model in {kind for kind, _ in WIDE} else "64 wide"
    return "SmolLM2-135M" if model.startswith("smollm2") else wide
