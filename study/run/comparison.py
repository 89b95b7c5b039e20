"""The results of fine-tunes, beside those of other ranks: as a table for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...common.tables import make_table
from ...common.units import cost_text, format_bytes
from .run_data import RunData, run_names

Column = Mapping[str, Any]
"""The results of one run, with the unit of its budget."""


@dataclass(frozen=True)
class _Measure:
    """One row of the comparison; `better` is +1 if high values are good, -1 if low ones are, else 0.

    `text` writes a value, in the unit of the run's budget where that matters.
    """

    label: str
    key: str
    text: Callable[[float, str], str]
    better: int = 0


_MEASURES = (
    _Measure("held-out loss", "held_out_loss", lambda value, _: f"{value:.4f}" if value < 1e4 else f"{value:.4g}", -1),
    _Measure("held-out accuracy", "held_out_accuracy", lambda value, _: f"{value:.2%}", +1),
    _Measure("peak memory", "peak_bytes", lambda value, _: format_bytes(value), -1),
    _Measure("budget", "budget_bytes", cost_text),
    _Measure("adapter parameters", "adapter_parameters", lambda value, _: f"{value:,.0f}"),
    _Measure("adapted modules", "adapted", lambda value, _: f"{value:,.0f}"),
    _Measure("median step", "median_step_s", lambda value, _: f"{1000 * value:.1f} ms", -1),
    _Measure("training time", "train_s", lambda value, _: f"{value:.1f} s", -1),
    _Measure("energy", "energy_joules", lambda value, _: f"{value / 1000:.3g} kJ", -1),
)


def summary_table(*runs: RunData) -> Table:
    """The comparison for a terminal: one column for each run, the best values bold."""
    subjects = {subject(run) for run in runs}
    table = make_table(escape(subjects.pop()) if len(subjects) == 1 else "", ["", *_columns(runs)], first_wraps=True)
    for label, cells, best in comparison_rows(runs):
        styled = [f"[bold]{cell}[/bold]" if index in best else cell for index, cell in enumerate(cells)]
        table.add_row(label, *styled)
    return table


def markdown_table(run: RunData) -> str:
    """The comparison for Markdown, the best values bold; empty without results."""
    if not run.results:
        return ""
    lines = [f"| | {' | '.join(run.results)} |", "|---|" + "---:|" * len(run.results)]
    for label, cells, best in comparison_rows([run]):
        shown = [f"**{cell}**" if index in best else cell for index, cell in enumerate(cells)]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def subject(run: RunData) -> str:
    """What was trained on what; empty if the folder does not tell."""
    return " on ".join(str(run.summary[key]) for key in ("model", "data") if run.summary.get(key))


def comparison_rows(runs: Sequence[RunData]) -> list[tuple[str, list[str], set[int]]]:
    """Label, cells and the indices of the best cells of each row; no cell is best where all read the same.

    Args:
        runs: whose results are the columns, one after another.
    """
    rows, results = [], list(_columns(runs).values())
    for measure in _MEASURES:
        values = [result.get(measure.key) for result in results]
        cells = [
            "–" if value is None else measure.text(value, result["unit"])
            for value, result in zip(values, results, strict=True)
        ]
        known = [(measure.better * value, cells[index]) for index, value in enumerate(values) if value is not None]
        if not known:
            continue
        top = max(known)[1]
        told_apart = measure.better != 0 and len({cell for _, cell in known}) > 1
        rows.append((measure.label, cells, {i for i, cell in enumerate(cells) if told_apart and cell == top}))
    return rows


def _columns(runs: Sequence[RunData]) -> dict[str, Column]:
    """The results of each run by the head of its column, with the name of the folder where there are several."""
    folders = [f"{name}: " for name in run_names(runs)] if len(runs) > 1 else [""]
    columns: dict[str, Column] = {}
    for folder, run in zip(folders, runs, strict=True):
        for name, result in run.results.items():
            adapted = sum(rank > 0 for rank in result["ranks"].values()) if result.get("ranks") else None
            columns[escape(folder + name)] = {**result, "adapted": adapted, "unit": run.unit}
    return columns
