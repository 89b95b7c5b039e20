"""`python -m benchmarks agent-runs`: real fine-tunes steered by agents and by hand rules, at equal budgets.

An encoder learns labels, and SmolLM2 whole learns texts that no proxy has, with a quarter of the parameters that rank 8
on all modules takes. All begin at the rate of a rule, with the same adapters and batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankpilot.agents.policy_file import load_policy
from rankpilot.common.statistics import estimate
from rankpilot.common.text import make_table
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from rich.console import Console

from . import labels, text_runs
from .harness import Figures, collect_rows, known_rows, pack_rows
from .labels import Run
from .no_sweep import CONTROLLED, rule_of, train
from .texts import TextTask, load_data

STORED = Path(__file__).parent / "results" / "agent_runs.json"

SHARE = 1 / 4
"""Budget, as a share of the parameters of rank 8 on all modules."""

RULE = "union"
SIDES = (RULE, "left-alone", "rate", "halving", "uniform")
TASKS = (
    ("all-minilm-l6-v2", "rotten-tomatoes"), ("all-minilm-l6-v2", "reuters-r8"),
    ("smollm2-135m", "docstrings"), ("smollm2-135m", "language-uk"),
)  # fmt: skip
SEEDS = (1, 2, 3)
STEPS, ROWS = 60, 4
"""Steps and rows of SmolLM2; those of encoders are in `labels`."""


@dataclass(frozen=True, kw_only=True)
class Options(labels.Options):
    """Hold agents against hand rules on real fine-tunes.

    Attributes:
        policies: folders of agents, or "agent" for the packaged one.
        output: folder of the rows; an interrupted comparison goes on there.
        quick: a minute: the encoder, one text, one seed, the rule and the packaged agent.
    """

    policies: tuple[str, ...] = ("agent",)
    output: Path = Path("runs/agent-runs")


def perform(run: Run) -> dict[str, Any]:
    """Train a run to its end; its held-out loss, mean rank and the rate at the end over that at the start."""
    policy = load_policy(run.side)
    task = TextTask(run.encoder, run.text, STEPS, ROWS, 48, 600)
    if run.encoder in labels.ENCODERS:
        model, optimizer, loader = labels.prepared(run, labels.ENCODERS_RATE)
        training = TrainingRun.of_loader(model, optimizer, loader, total_steps=labels.STEPS)
    else:
        model = text_runs.adapted_model(task, run.seed)
        training = text_runs.training_run(task, model, 1e-3, run.seed)
        optimizer, loader = training.optimizer, text_runs.new_loader(task, load_data(task), run.seed)
        for group in optimizer.param_groups:
            group["lr"] = rule_of(training, run.seed)
    parameters = sum((target.d_in + target.d_out) * target.rank for target in find_target_modules(model))
    options = replace(CONTROLLED, budget=f"{round(SHARE * parameters)} params", control=None)
    pilot = RankPilot(policy, options, seed=run.seed, tell=lambda line: None)
    pilot.begin(training)
    torch.manual_seed(run.seed)
    train(training.total_steps, model, optimizer, loader, pilot)
    assert pilot.applier is not None
    rank, moved = float(np.mean(pilot.applier.ranks)), pilot.rate_factor
    pilot.finish()
    encodes = run.encoder in labels.ENCODERS
    loss = labels.held_out_loss(run, model) if encodes else text_runs.held_out_loss(model, load_data(task), task)
    return {"loss": round(loss, 5), "mean_rank": round(rank, 3), "moved": round(moved, 4)}


def benchmark(options: Options, console: Console) -> Figures:
    """Run what is missing, and print each side's losses above the rule's."""
    path = options.output / "rows.jsonl"
    rows = known_rows(Run, path, STORED, options.minutes)
    sides = (RULE, "agent") if options.quick else (*SIDES, *options.policies)

    def missing() -> Iterator[Run]:
        tasks, seeds = (TASKS[:1], SEEDS[:1]) if options.quick else (TASKS, SEEDS)
        every = (Run(model, text, *rest) for (model, text), *rest in product(tasks, seeds, sides))
        return (run for run in every if run not in rows)

    def told(run: Run, row: Any) -> str:
        return f"{run.encoder} {run.text} {run.side}, seed {run.seed}: {row['loss']}"

    collect_rows(path, rows, missing, perform, told, workers=options.workers, minutes=options.minutes)
    if options.pack:
        pack_rows(STORED, rows)
    found = {side: changes(rows, side) for side in dict.fromkeys(run.side for run in rows if run.side != RULE)}
    console.print(make_table(f"Held-out loss above that of the rule {RULE}, %", COLUMNS, table_rows(rows)))
    figures: Figures = {f"{side}: mean": float(np.mean(each)) for side, each in found.items() if each}
    return figures | {f"{side}: worst": max(each) for side, each in found.items() if each}


def changes(rows: dict[Run, Any], side: str) -> list[float]:
    """Losses of a side above the rule's, %, of all runs that both have."""
    return [change for task in TASKS for change in _beside(rows, side, *task)]


COLUMNS = ("", *(f"{model}, {text}" for model, text in TASKS), "all", "worst")


def table_rows(rows: dict[Run, Any]) -> list[tuple[str, ...]]:
    """The mean of each side by task, the mean of all with its interval, and the worst run."""
    lines = []
    for side in dict.fromkeys(run.side for run in rows if run.side != RULE):
        if found := changes(rows, side):
            cells = [_beside(rows, side, *task) for task in TASKS]
            each = [f"{np.mean(cell):+.1f} %" if cell else "" for cell in cells]
            named = f"agent {side}" if side.startswith("seed") else side
            lines.append((named, *each, f"{estimate(found, range(len(found))):+.1f} %", f"{max(found):+.1f} %"))
    return lines


def _beside(rows: dict[Run, Any], side: str, model: str, text: str) -> list[float]:
    """100 log(loss / loss of the rule) by seed."""
    pairs = [(Run(model, text, seed, side), Run(model, text, seed, RULE)) for seed in SEEDS]
    known = [(rows[own]["loss"], rows[other]["loss"]) for own, other in pairs if own in rows and other in rows]
    return [100 * math.log(own / other) for own, other in known]
