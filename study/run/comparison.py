"""The results of a fine-tune, beside those of uniform ranks: as a table for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from ...common.tables import make_table
from ...common.units import cost_text, format_bytes
from .run_data import RunData


@dataclass(frozen=True)
class _Measure:
    """One row of the comparison; `better` is +1 if high values are good, -1 if low ones are, else 0."""

    label: str
    key: str
    text: Callable[[float], str]
    better: int = 0


def _measures(unit: str) -> tuple[_Measure, ...]:
    return (
        _Measure("held-out loss", "held_out_loss", "{:.4f}".format, -1),
        _Measure("held-out accuracy", "held_out_accuracy", "{:.2%}".format, +1),
        _Measure("peak memory", "peak_bytes", format_bytes, -1),
        _Measure("budget", "budget_bytes", lambda limit: cost_text(limit, unit)),
        _Measure("adapter parameters", "adapter_parameters", "{:,.0f}".format),
        _Measure("adapted modules", "adapted", "{:,.0f}".format),
        _Measure("median step", "median_step_s", lambda value: f"{1000 * value:.1f} ms", -1),
        _Measure("training time", "train_s", "{:.1f} s".format, -1),
    )


def summary_table(run: RunData) -> Table:
    """The comparison for a terminal: one column for each run, the best values bold."""
    table = make_table(escape(subject(run)), ["", *run.results], first_wraps=True)
    for label, cells, best in comparison_rows(run):
        styled = [f"[bold]{cell}[/bold]" if index in best else cell for index, cell in enumerate(cells)]
        table.add_row(label, *styled)
    return table


def markdown_table(run: RunData) -> str:
    """The comparison for Markdown, the best values bold; empty without results."""
    if not run.results:
        return ""
    lines = [f"| | {' | '.join(run.results)} |", "|---|" + "---:|" * len(run.results)]
    for label, cells, best in comparison_rows(run):
        shown = [f"**{cell}**" if index in best else cell for index, cell in enumerate(cells)]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def subject(run: RunData) -> str:
    """What was trained on what; empty if the folder does not tell."""
    return " on ".join(str(run.summary[key]) for key in ("model", "data") if run.summary.get(key))


def comparison_rows(run: RunData) -> list[tuple[str, list[str], set[int]]]:
    """Label, cells and the indices of the best cells of each row; no cell is best where all read the same."""
    rows, results = [], []
    for result in run.results.values():
        adapted = sum(rank > 0 for rank in result["ranks"].values()) if result.get("ranks") else None
        results.append({**result, "adapted": adapted})
    for measure in _measures(run.unit):
        values = [result.get(measure.key) for result in results]
        cells = ["–" if value is None else measure.text(value) for value in values]
        known = [(measure.better * value, cells[index]) for index, value in enumerate(values) if value is not None]
        if not known:
            continue
        top = max(known)[1]
        told_apart = measure.better != 0 and len({cell for _, cell in known}) > 1
        rows.append((measure.label, cells, {i for i, cell in enumerate(cells) if told_apart and cell == top}))
    return rows
