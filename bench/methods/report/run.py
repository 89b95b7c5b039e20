"""`rankpilot bench methods-report`: what the stored rows say, without running anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ....common.files import write_text
from ....common.statistics import Estimate
from ....errors import ConfigError
from ...harness import Figures, estimate_figures, machine_facts
from ..rows import PACKED, RowStore
from ..run import chosen_methods
from ..study import Study
from ..tasks import find_suite
from .answers import answers, check_results, checks, limits
from .document import Block, Heading, Paragraph, Picture, to_html, to_markdown
from .numbers import REFERENCE, Comparison, Costs, Results, compare, costs_of
from .pictures import draw_all
from .saving import saving_blocks, saving_figures, savings_of
from .saving_picture import draw_savings
from .tables import cells_legend, cells_table, costs_table, kinds_table, losses_table


@dataclass(frozen=True)
class Options:
    """Write the report on a suite from stored rows alone: Markdown, HTML and pictures.

    Nothing is trained. Rows come from `rows.jsonl` of a folder where `rankpilot bench methods` has run, or from a
    packed file. Each figure has an interval by a bootstrap over tasks; losses and ties are told,
    and so is what must be found if the benchmark works: a method that is worse by construction, and one that is better.

    Attributes:
        suite: quick, standard, full, saving or validation.
        rows: folder with `rows.jsonl`; without it, the rows that ship with the repository.
        packed: a packed file of rows, read without `rows`.
        output: folder of the report: results.md, results.html and pictures; saving.md and saving.html of that suite.
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
        raise ConfigError(f"{options.rows} holds no rows.jsonl. Pass the output folder of `rankpilot bench methods`.")
    store = RowStore(options.rows, None if options.rows else options.packed)
    suite = find_suite(options.suite)
    results = Results.of(Study(store, suite), chosen_methods(suite, (), options.policies))
    if not results.found:
        raise ConfigError(
            f"There are no rows of the suite {options.suite!r}. Run `rankpilot bench methods --suite {options.suite}` "
            "and pass its folder as --rows."
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
) -> list[Block]:
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
        Heading("Results: adaptive and static ranks side by side", 1),
        Paragraph(
            f"Written by `rankpilot bench methods-report --suite {options.suite}` from stored rows; run again with "
            f"`rankpilot bench methods --suite {options.suite}`. A gain is how much lower the log of the held-out loss "
            f"is than that of `{REFERENCE}`, in per cent, over pairs of runs with the same seed and batches: "
            "interquartile mean and plain mean, with 95 % intervals by a bootstrap over tasks (over runs where tasks "
            "are few). Positive is better."
        ),
        losses_table(results, versus),
        *_kinds(results),
        Picture(f"{images}/methods_time.png", "Loss of all methods against the time of a step"),
        Picture(f"{images}/methods_bytes.png", "Loss of all methods against bytes"),
        Picture(f"{images}/methods_profiles.png", "Performance profiles"),
        *answers(results, costs),
        *checks(results),
        *limits(results),
        Heading("What each method costs"),
        Paragraph(
            "Bytes at the peak of a step, predicted (measured where no model predicts them) and measured, and the time "
            "of a step, all beside all-linear rank 8; set-up in such steps; the time to the loss at which "
            f"`{REFERENCE}` ends, set-up included, as a share of its time; ranks moved on the way as a share of all; "
            "the largest rise of a loss when ranks changed; runs measured above the limit."
        ),
        costs_table(results, costs),
        Heading("Cells"),
        cells_legend(results),
        Heading("Held-out loss", 3),
        cells_table(results),
        Heading("Held-out accuracy, %", 3),
        Paragraph("Classes or tokens that are right; for numbers, the share of their variance that is explained."),
        cells_table(results, accuracy=True),
        Heading("Methods"),
        Paragraph(f"{described}."),
    ]


def _kinds(results: Results) -> list[Block]:
    """The kinds of tasks apart, where there are several."""
    table = kinds_table(results)
    text = (
        "Where a model learns labels, seeds differ by far more than methods: a plan may leave a plateau with one seed, "
        "and stay on it with the next. So here are texts and labels apart (few tasks: intervals over runs)."
    )
    return [Paragraph(text), table] if table.rows else []


def _write(options: Options, name: str, blocks: Sequence[Block], console: Console) -> None:
    """Write a report as Markdown and as HTML."""
    write_text(options.output / f"{name}.md", to_markdown(blocks))
    write_text(options.output / f"{name}.html", to_html(blocks))
    console.print(f"{options.output / name}.md and {name}.html", markup=False, soft_wrap=True)


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
    figures |= {f"{name}.found": found for name, found in check_results(results).items()}
    for name, one in versus.items():
        parts: dict[str, Estimate] = {"gain": one.gain, "mean_gain": one.mean, "better": one.pairs.better}
        for part, value in parts.items():
            figures |= estimate_figures(f"{name}.{part}", value)
        figures |= {f"{name}.cells": one.cells, f"{name}.worst": one.worst}
    return figures
