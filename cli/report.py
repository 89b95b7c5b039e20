"""`rankpilot report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..errors import ConfigError
from .progress import console

if TYPE_CHECKING:
    from ..study.run.report import Report


@dataclass(frozen=True)
class ReportOptions:
    """Write the report of a run: report.md and pictures of ranks, losses and memory, in the run's own folder.

    FOLDER is the folder of rankpilot finetune, the output folder of a Trainer with RankPilotCallback, or the folder of
    a decision log (decisions). The run may go on meanwhile: what is not there yet is left out. Several runs are also
    shown side by side.

    Attributes:
        folders: the folders of the runs.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]


def main(arguments: Sequence[str]) -> None:
    """Write the report, and show its decisions."""
    options = tyro.cli(ReportOptions, args=arguments, prog="rankpilot report")
    from ..study.run.comparison import summary_table
    from ..study.run.report import write_report

    if not options.folders:
        raise ConfigError("Give the folder of a run: rankpilot report runs/finetune.")
    reports = [write_report(folder) for folder in options.folders]
    if finished := [report.run for report in reports if report.run.results]:
        console.print(summary_table(*finished))
    for report in reports:
        for record in report.run.decisions:
            console.print(record.line(), markup=False, highlight=False, soft_wrap=True)
        print_ending(report)


def print_ending(report: Report) -> None:
    """Show what is wrong with a run, what came out, and where its adapter and its report are."""
    for sentence in report.verdict.warnings:
        console.print(sentence, style="bold red", markup=False, highlight=False)
    lines = [*report.verdict.results, *(f"Left out of the report: {part}." for part in report.run.missing)]
    if report.run.adapter:
        lines.append(f"Adapter (the report says how to load, merge and export it): {report.run.adapter}")
    for line in (*lines, f"Report and pictures: {report.path}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
