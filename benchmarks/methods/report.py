"""`python -m benchmarks methods-report`: what the stored rows say, without running anything."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rankpilot.common.files import write_text
from rankpilot.common.text import plural
from rankpilot.errors import ConfigError
from rankpilot.training.results import Estimate
from rich.console import Console

from ..harness import Figures, estimate_figures, machine_facts
from .numbers import (
    FEWEST_TASKS,
    KINDS,
    REFERENCE,
    Comparison,
    Costs,
    Results,
    bullets,
    compare,
    costs_of,
    markdown_table,
    percent,
    time_to_loss,
)
from .pictures import draw_all, draw_savings
from .rows import PACKED, RowStore
from .run import chosen_methods
from .saving import OF_RECORD, saving_blocks, saving_figures, savings_of
from .study import Study
from .tasks import find_suite


@dataclass(frozen=True)
class Options:
    """Write the report on a suite from stored rows alone: Markdown and pictures.

    Nothing is trained. Rows come from `rows.jsonl` of a folder where `python -m benchmarks methods` has run, or from a
    packed file. Each figure has an interval by a bootstrap over tasks; losses and ties are told.

    Attributes:
        suite: quick, standard, full, saving or validation.
        rows: folder with `rows.jsonl`; without it, the rows that ship with the repository.
        packed: a packed file of rows, read without `rows`.
        output: folder of the report: results.md and pictures; saving.md of that suite.
        images: folder of the pictures, if it is another one.
        policies: folders of further policies that were compared.
        json: also write the figures to this file, as flat JSON with names like "ours.gain".
    """

    suite: str = "standard"
    rows: Path | None = None
    packed: Path = PACKED
    output: Path = Path("runs/methods/report")
    images: Path | None = None
    policies: tuple[str, ...] = ()
    json: Path | None = None


def read_results(options: Options) -> Results:
    """What the rows tell.

    Raises:
        ConfigError: there are none.
    """
    if options.rows is not None and not (options.rows / "rows.jsonl").is_file():
        raise ConfigError(
            f"{options.rows} holds no rows.jsonl. Pass the output folder of `python -m benchmarks methods`."
        )
    store = RowStore(options.rows, None if options.rows else options.packed)
    suite = find_suite(options.suite)
    results = Results.of(Study(store, suite), chosen_methods(suite, (), options.policies))
    if not results.found:
        raise ConfigError(
            f"There are no rows of the suite {options.suite!r}. Run `python -m benchmarks methods "
            f"--suite {options.suite}` and pass its folder as --rows."
        )
    return results


def summary(results: Results) -> tuple[dict[str, Comparison], dict[str, Costs]]:
    """Each method against the reference, and what each costs, by name."""
    names = [method.name for method in results.methods]
    versus = {name: one for name in names if (one := compare(results, name, REFERENCE)) is not None}
    costs = {name: cost for name in names if (cost := costs_of(results, name)) is not None}
    return versus, costs


def _images(options: Options) -> str:
    """The folder of the pictures, as the report names it."""
    return os.path.relpath(options.images or options.output, options.output)


def report_blocks(
    options: Options, results: Results, versus: dict[str, Comparison], costs: dict[str, Costs]
) -> list[str]:
    """The report.

    Args:
        options: name the suite and the folders.
        results: of its rows.
        versus: each method against the reference.
        costs: of each method.
    """
    images = _images(options)
    described = "; ".join(f"`{method.name}`: {method.description}" for method in results.methods)
    return [
        "# Results: adaptive and static ranks side by side",
        OF_RECORD,
        f"Written by `python -m benchmarks methods-report --suite {options.suite}` from stored rows; run again with "
        f"`python -m benchmarks methods --suite {options.suite}`. A gain is how much lower the log of the "
        f"held-out loss is than that of `{REFERENCE}`, in per cent, over pairs of runs with the same seed and "
        "batches: interquartile mean and plain mean, with 95 % intervals by a bootstrap over tasks (over runs where "
        "tasks are few). Positive is better.",
        losses_table(results, versus),
        *_kinds(results),
        f"![Version 0.2: loss of all methods versus the time of a step]({images}/methods_time.png)",
        f"![Version 0.2: loss of all methods versus bytes]({images}/methods_bytes.png)",
        f"![Version 0.2: performance profiles]({images}/methods_profiles.png)",
        *answers(results, costs),
        *limits(results),
        "## What each method costs",
        "Bytes at the peak of a step, predicted (measured where no model predicts them) and measured, and the time "
        "of a step, all beside all-linear rank 8; set-up in such steps; the time to the loss at which "
        f"`{REFERENCE}` ends, set-up included, as a share of its time; ranks moved on the way as a share of all; "
        "the largest rise of a loss when ranks changed; runs measured above the limit.",
        costs_table(results, costs),
        "## Cells",
        cells_legend(results),
        "### Held-out loss",
        cells_table(results),
        "### Held-out accuracy, %",
        "Classes or tokens that are right; for numbers, the share of their variance that is explained.",
        cells_table(results, accuracy=True),
        "## Methods",
        f"{described}.",
    ]


def _kinds(results: Results) -> list[str]:
    """The kinds of tasks apart, where there are several."""
    table = kinds_table(results)
    text = (
        "Where a model learns labels, seeds differ by far more than methods: a plan may leave a plateau with one seed, "
        "and stay on it with the next. So here are texts and labels apart (few tasks: intervals over runs)."
    )
    return [text, table] if table else []


def _write(options: Options, name: str, blocks: Sequence[str], console: Console) -> None:
    """Write a report as Markdown."""
    write_text(options.output / f"{name}.md", "\n\n".join(blocks) + "\n")
    console.print(f"{options.output / name}.md", markup=False, soft_wrap=True)


def benchmark(options: Options, console: Console) -> Figures:
    """Write the report and return the figures.

    Raises:
        ConfigError, UnknownNameError: bad options, or no rows.
    """
    results = read_results(options)
    figures: Figures = {**machine_facts(torch.device("cpu")), "suite": options.suite, "rows": len(results.study.rows)}
    if options.suite == "saving":
        draw_savings(savings_of(results), (options.images or options.output) / "saving.png")
        _write(options, "saving", saving_blocks(results, f"{_images(options)}/saving.png"), console)
        return figures | saving_figures(results)
    versus, costs = summary(results)
    draw_all(results, versus, costs, options.images or options.output)
    blocks = report_blocks(options, results, versus, costs)
    _write(options, "results", blocks, console)
    for name, one in versus.items():
        parts: dict[str, Estimate] = {"gain": one.gain, "mean_gain": one.mean, "better": one.pairs.better}
        for part, value in parts.items():
            figures |= estimate_figures(f"{name}.{part}", value)
        figures |= {f"{name}.cells": one.cells, f"{name}.worst": one.worst}
    return figures


def losses_table(results: Results, versus: dict[str, Comparison]) -> str:
    """Each method against the reference: gains, chance of being better, wins, ties, losses, worst case."""
    rows = []
    for method in results.methods:
        fitted = sum((method.name, cell.name) in results.found for cell in results.cells)
        if method.name not in versus:
            rows.append((method.name, f"{fitted}", *("-",) * 5))
            continue
        one = versus[method.name]
        rows.append(
            (
                method.name,
                f"{fitted}",
                percent(one.gain),
                percent(one.mean),
                chance(one),
                f"{one.pairs.wins} / {one.pairs.ties} / {one.pairs.losses}",
                f"{100 * one.worst:+.1f}",
            )
        )
    columns = ("method", "cells that fit", "gain, %", "mean gain, %", "better", "wins / ties / losses", "worst run, %")
    return markdown_table(columns, rows)


def kinds_table(results: Results) -> str:
    """Each method against the reference, on each kind of task alone; empty where there is one kind."""
    parts = [results.of_kind(kind) for kind in KINDS]
    rows = []
    for method in results.methods if all(part.cells for part in parts) else ():
        found = [compare(part, method.name, REFERENCE) for part in parts]
        if method.name != REFERENCE and any(found):
            told = [(f"{one.cells}", percent(one.mean), chance(one)) if one else ("0", "-", "-") for one in found]
            rows.append((method.name, *(cell for part in told for cell in part)))
    columns = [(f"{kind}: cells", "mean gain, %", "better") for kind in KINDS]
    return markdown_table(("method", *(column for part in columns for column in part)), rows) if rows else ""


def chance(one: Comparison) -> str:
    """In how many of the runs the first is better, ties by half, with an interval."""
    better = one.pairs.better
    return f"{100 * better.value:.0f} % ({100 * better.low:.0f} to {100 * better.high:.0f})"


def costs_table(results: Results, costs: dict[str, Costs]) -> str:
    """What each method costs."""
    rows = []
    for method in results.methods:
        if method.name not in costs:
            continue
        cost, reached = costs[method.name], time_to_loss(results, method.name)
        arrival = "-" if reached is None or math.isnan(reached[0]) else f"{reached[0]:.2f}"
        share = "-" if reached is None else f"{reached[1]} of {reached[2]}"
        rows.append(
            (
                method.name,
                f"{100 * cost.bytes:.0f}",
                f"{100 * cost.measured:.0f}",
                f"{cost.step:.2f}",
                f"{cost.setup:.1f}",
                arrival,
                share,
                f"{cost.parameters:,.0f}",
                f"{cost.tuning:.2f}",
                f"{cost.moved:.2f}",
                f"{cost.bump:+.3f}",
                f"{cost.breaches}",
                f"{cost.diverged}",
            )
        )
    columns = (
        "method", "bytes, %", "measured, %", "step", "set-up, steps", "time to loss", "get there", "parameters",
        "tuning, CPU h", "moved", "bump", "breaches", "diverged",
    )  # fmt: skip
    return markdown_table(columns, rows)


def cells_table(results: Results, *, accuracy: bool = False) -> str:
    """The mean held-out loss, or accuracy, of each method in each cell."""
    rows = []
    for method in results.methods:
        row = [method.name]
        for cell in results.cells:
            key = (method.name, cell.name)
            if key in results.found:
                rows_of = results.found[key].outcome.rows
                values = [r["accuracy"] for r in rows_of if r["accuracy"] is not None]
                mean = np.mean(values) if accuracy and values else np.exp(results.found[key].logs).mean()
                row.append(f"{100 * mean:.1f}" if accuracy else f"{mean:.4f}")
            else:
                row.append("does not fit" if key in results.unfit else "-")
        rows.append(tuple(row))
    return markdown_table(("method", *(f"{number}" for number, _ in enumerate(results.cells, 1))), rows)


def cells_legend(results: Results) -> str:
    """What the numbered cells are."""
    rows = []
    for number, cell in enumerate(results.cells, 1):
        task = cell.task
        size = f"{task.steps} x {task.rows} x {task.length}"
        rows.append((f"{number}", task.model, task.data, task.kind, size, cell.budget))
    return markdown_table(("cell", "model", "data", "task", "steps x rows x tokens", "budget"), rows)


OURS, RANK_32 = "ours", "rslora-32"
"""The shipped policy, and rank 32 everywhere, which needs no tool."""

BESIDE = ("all-linear-8-ckpt", "top-half-16", "qv-16", REFERENCE, "simple-ckpt", RANK_32, "adalora-peak", "eva", "tpe")
"""What the shipped policy is compared with in words."""


def verdict(one: Comparison) -> str:
    """Which side the interval of a mean gain is on, where there are tasks enough to tell."""
    if one.tasks < FEWEST_TASKS:
        return f"{plural(one.tasks, 'task')}, too few to tell"
    if one.mean.low > 0:
        return "better"
    return "worse" if one.mean.high < 0 else "not told apart"


def against(results: Results, first: str, second: str) -> str | None:
    """One sentence on two methods; None where they share no cell."""
    one = compare(results, first, second)
    if one is None:
        return None
    pairs = one.pairs
    return (
        f"`{first}` against `{second}`, {plural(one.cells, 'cell')}: {verdict(one)}; mean gain in log "
        f"loss {percent(one.mean)} %, {pairs.wins} wins, {pairs.ties} ties, {pairs.losses} losses, worst run "
        f"{100 * one.worst:+.1f} %."
    )


def answers(results: Results, costs: dict[str, Costs]) -> list[str]:
    """What the shipped policy costs and reaches, in sentences that state what the rows show, losses too."""
    if OURS not in costs:
        return []
    mine = costs[OURS]
    beside = ", ".join(
        f"`{name}` {100 * costs[name].bytes:.0f} % and a step of {costs[name].step:.2f}"
        for name in ("all-linear-8-ckpt", REFERENCE)
        if name in costs
    )
    memory = (
        f"Under the budgets of these cells `{OURS}` takes {100 * mine.bytes:.0f} % of the bytes of all-linear rank 8 "
        f"at the peak, and a step {mine.step:.2f} of its time ({beside}). Steps measured above the limit: in "
        f"{mine.breaches} runs."
    )
    reached = []
    for name in (OURS, "adalora-peak", "all-linear-8-ckpt"):
        found = time_to_loss(results, name)
        if found is not None and name in costs:
            time = f"after {found[0]:.2f} of its time (median)" if found[1] else "never"
            reached.append(
                f"`{name}` reaches the loss at which `{REFERENCE}` ends in {found[1]} of {found[2]} runs, {time}."
            )
    lines = [
        *(against(results, OURS, other) for other in BESIDE),
        *(against(results, "ours-recompute", other) for other in (REFERENCE, "all-linear-8-ckpt", "simple-ckpt")),
        against(results, "top-down", "random"),
        *_by_kind(results, RANK_32, REFERENCE),
        *_by_kind(results, OURS, RANK_32),
        _worst_cells(results),
    ]
    return ["## The shipped policy", memory, bullets([*reached, *(line for line in lines if line)])]


def _by_kind(results: Results, first: str, second: str) -> list[str | None]:
    """Two methods on each kind of task alone, where there are several."""
    parts = {kind: against(results.of_kind(kind), first, second) for kind in KINDS}
    return [f"On {kind} alone, {line}" for kind, line in parts.items() if line] if all(parts.values()) else []


def _worst_cells(results: Results) -> str | None:
    """In which cells ours loses most."""
    cells = results.shared(OURS, REFERENCE)
    if not cells:
        return None
    gains = {
        cell.name: float((results.found[REFERENCE, cell.name].logs - results.found[OURS, cell.name].logs).mean())
        for cell in cells
    }
    worst = sorted(gains, key=lambda name: gains[name])[:3]
    told = "; ".join(f"{name} ({100 * gains[name]:+.1f} %)" for name in worst)
    return f"Cells in which `{OURS}` is weakest against `{REFERENCE}`: {told}."


def limits(results: Results) -> list[str]:
    """What these figures cannot tell."""
    seeds, tasks = len(results.study.suite.seeds), {cell.task.name for cell in results.cells}
    lines = [
        f"{plural(len(results.cells), 'cell')} of {plural(len(tasks), 'task')}, {seeds} seeds each: short runs of "
        "small models, since they run on CPUs. Differences that grow with the size of a model or the length of a run "
        "are not seen.",
        "Methods that do not fit a budget have no figures there, so rows of one table may stand on different cells; "
        "comparisons in sentences are on shared cells.",
        "All methods have their learning rate from the same grid, and `simple` and `tpe` more trainings for their "
        "plans; the column of tuning tells how much. A rate is chosen on one seed and held-out rows of its own, by "
        "factors of two. Where labels are learned in short runs, the loss of one seed is a lottery, and so is such a "
        "rate; that, and the luck of five seeds, is why labels are told apart.",
        "Rivals of one mean rank (`eva`, `gora-style`, AdaLoRA) leave part of the bytes unused; `ours` and `simple` "
        "choose rank and depth by the budget. The column of bytes tells how much each takes.",
        "Times are CPU times of one thread on a busy machine, as ratios of steps that took turns; losses are the same "
        "bit for bit when a run is repeated there.",
        "The shipped policy learned on small proxies that read bytes, some of them on film reviews of "
        "`rotten-tomatoes`, and was chosen on others that read newsgroup posts; of these models it has seen few runs, "
        "on other data (git tag `evidence-0.2`). It was not tuned on these cells, but some of its versions "
        "were dropped after they had been looked at (docs/experiments.md).",
    ]
    if results.missing:
        cells = "; ".join(
            dict.fromkeys(cell.name for cell in results.cells if cell.name in {c for _, c in results.missing})
        )
        lines.append(f"{len(results.missing)} pairs of method and cell have not been run yet, in: {cells}.")
    return ["## Limits", bullets(lines)]
