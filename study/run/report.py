"""The report of a fine-tune: a page of Markdown with pictures, made from the run folder alone.

    config.json  summary.json  metrics-rankpilot.jsonl  metrics-uniform.jsonl  decisions/
      -> report.md  figures/*.png

It can be made again at any time; parts whose input is missing are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from ...allocation.decision_log import DecisionLog
from ...common.drawing import save_figure
from ...common.files import read_json, read_json_lines, write_text
from ...common.tables import make_table
from ...common.units import format_bytes
from ...errors import RunFolderError
from .decisions import describe_decisions
from .figures import loss_curves, memory_timeline
from .heatmap import rank_heatmap

Summary = Mapping[str, Any]
Metrics = dict[str, list[dict[str, Any]]]
RUNS = ("rankpilot", "uniform")


def write_report(folder: Path) -> Path:
    """Make `report.md` and `figures/*.png` of a run folder, again if they exist; returns the path of the report.

    Raises:
        RunFolderError: the folder or its summary is missing or unreadable, or a decision is corrupt.
    """
    summary = _read_summary(folder)
    log = DecisionLog(folder / "decisions")
    table = log.read() if len(log) else None
    metrics = {run: read_json_lines(folder / f"metrics-{run}.jsonl") for run in RUNS if run in summary["runs"]}
    sections = [
        _head(summary),
        _result(summary),
        _ranks(folder, table, metrics),
        _losses(folder, table, metrics),
        _memory(folder, table, metrics, summary),
        _decisions(table),
        _reload(summary),
        _setup(folder, summary),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run folder; RunFolderError if it is missing, unreadable or without the run "rankpilot"."""
    path = folder / "summary.json"
    if not path.is_file():
        raise RunFolderError(f"{folder} holds no finished run: summary.json is missing.")
    try:
        summary = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is unreadable: {error}") from error
    runs = summary.get("runs") if isinstance(summary, dict) else None
    if not isinstance(runs, dict) or not isinstance(runs.get("rankpilot"), dict):
        raise RunFolderError(f"{path} has no run 'rankpilot' in it.")
    return dict(summary)


def summary_table(summary: Summary) -> Table:
    """The comparison for a terminal: one column for each run, the best values bold."""
    runs = _runs(summary)
    table = make_table(_subject(summary), ["", *runs], first_wraps=True)
    for label, cells, best in _rows(summary):
        styled = [f"[bold]{cell}[/bold]" if index in best else cell for index, cell in enumerate(cells)]
        table.add_row(label, *styled)
    return table


@dataclass(frozen=True)
class _Measure:
    """One row of the comparison; `better` is +1 if high values are good, -1 if low ones are, else 0."""

    label: str
    key: str
    text: Callable[[float], str]
    better: int = 0


_MEASURES = (
    _Measure("held-out loss", "held_out_loss", "{:.4f}".format, -1),
    _Measure("held-out accuracy", "held_out_accuracy", "{:.2%}".format, +1),
    _Measure("peak memory", "peak_bytes", format_bytes, -1),
    _Measure("budget", "budget_bytes", format_bytes),
    _Measure("adapter parameters", "adapter_parameters", "{:,.0f}".format),
    _Measure("adapted modules", "adapted", "{:,.0f}".format),
    _Measure("median step", "median_step_s", lambda value: f"{1000 * value:.1f} ms", -1),
    _Measure("training time", "train_s", "{:.1f} s".format, -1),
)


def _runs(summary: Summary) -> list[str]:
    return [run for run in RUNS if summary["runs"].get(run)]


def _rows(summary: Summary) -> list[tuple[str, list[str], set[int]]]:
    """Label, cells and the indices of the best cells of each row; no cell is best where all read the same."""
    rows, runs = [], []
    for name in _runs(summary):
        run = summary["runs"][name]
        adapted = sum(rank > 0 for rank in run["ranks"].values()) if run.get("ranks") else None
        runs.append({**run, "adapted": adapted})
    for measure in _MEASURES:
        values = [run.get(measure.key) for run in runs]
        cells = ["–" if value is None else measure.text(value) for value in values]
        known = [(measure.better * value, cells[index]) for index, value in enumerate(values) if value is not None]
        if not known:
            continue
        top = max(known)[1]
        told_apart = measure.better != 0 and len({cell for _, cell in known}) > 1
        rows.append((measure.label, cells, {i for i, cell in enumerate(cells) if told_apart and cell == top}))
    return rows


def _subject(summary: Summary) -> str:
    """What was trained on what."""
    model, data = summary.get("model"), summary.get("data")
    return " on ".join(str(part) for part in (model, data) if part)


def _head(summary: Summary) -> str:
    subject = _subject(summary)
    title = "# Fine-tune report" + (f": {subject}" if subject else "")
    losses = {run: summary["runs"][run].get("held_out_loss") for run in _runs(summary)}
    if len(losses) < 2 or None in losses.values() or not losses["uniform"]:
        return title
    change = losses["rankpilot"] / losses["uniform"] - 1
    word = "lower" if change < 0 else "higher"
    return f"{title}\n\nrankpilot's held-out loss is {abs(change):.1%} {word} than that of uniform ranks."


def _result(summary: Summary) -> str:
    lines = [f"| | {' | '.join(_runs(summary))} |", "|---|" + "---:|" * len(_runs(summary))]
    for label, cells, best in _rows(summary):
        shown = [f"**{cell}**" if index in best else cell for index, cell in enumerate(cells)]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "## Result\n\n" + "\n".join(lines)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have the value."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and "step" in row]


def _decision_values(table: pa.Table | None, column: str) -> list[Any]:
    """One value for each decision."""
    if table is None:
        return []
    return table.filter(pc.equal(table["module_index"], 0))[column].to_pylist()  # type: ignore[no-any-return]


def _ranks(folder: Path, table: pa.Table | None, metrics: Metrics) -> str:
    if table is None:
        return ""
    steps = _decision_values(table, "step")
    modules = table["module"].to_pylist()[: table.num_rows // len(steps)]
    if modules * len(steps) != table["module"].to_pylist():
        raise RunFolderError(f"The decisions in {folder / 'decisions'} are not all about the same modules.")
    ranks = table["rank_after"].to_numpy().reshape(len(steps), -1)
    if steps[0] > 0:  # before the first decision
        ranks = np.vstack([table["rank_before"].to_numpy()[: len(modules)], ranks])
    total = max([row.get("step", 0) for row in metrics["rankpilot"]] + [steps[-1] + 1])
    blocks = table["block"].to_numpy()[: len(modules)]
    starts = steps if len(ranks) == len(steps) else [0, *steps]
    save_figure(rank_heatmap(starts, ranks, modules, blocks, total), folder / "figures" / "ranks.png")
    return "## Where the rank went\n\n![Rank of every module over the run](figures/ranks.png)"


def _losses(folder: Path, table: pa.Table | None, metrics: Metrics) -> str:
    curves = {
        run: {"train": _points(rows, "loss"), "eval": _points(rows, "eval_loss")} for run, rows in metrics.items()
    }
    if not any(points for curve in curves.values() for points in curve.values()):
        return ""
    save_figure(loss_curves(curves, _decision_values(table, "step")), folder / "figures" / "loss.png")
    return "## Loss\n\n![Training and held-out loss](figures/loss.png)"


def _memory(folder: Path, table: pa.Table | None, metrics: Metrics, summary: Summary) -> str:
    peaks = {run: points for run, rows in metrics.items() if (points := _points(rows, "peak_bytes"))}
    limit = summary["runs"]["rankpilot"].get("budget_bytes")
    if not peaks or not limit:
        return ""
    plans = zip(*(_decision_values(table, name) for name in ("step", "predicted_cost", "unit")), strict=True)
    predicted = [(step, cost) for step, cost, unit in plans if unit == "bytes"]
    save_figure(memory_timeline(peaks, limit, predicted), folder / "figures" / "memory.png")
    return "## Memory\n\n![Peak memory against the budget](figures/memory.png)"


def _decisions(table: pa.Table | None) -> str:
    if table is None:
        return ""
    note = (
        "The largest moves of each decision, with the features in which the module stood out from all others "
        "(sd: standard deviations from their mean). They show what was unusual, not what the policy weighed."
    )
    return "\n\n".join(["## Decisions", note, *describe_decisions(table)])


def _reload(summary: Summary) -> str:
    check = summary.get("reload")
    if not check:
        return ""
    same = "gives identical outputs" if check.get("identical") else "**does not give identical outputs**"
    largest = check.get("max_abs_difference")
    detail = f" (largest difference {largest:.3g})" if largest is not None else ""
    return f"## Reload\n\nThe saved adapter, loaded by plain PEFT, {same}{detail}."


def _setup(folder: Path, summary: Summary) -> str:
    lines = [f"* {key}: {summary[key]}" for key in ("model", "data", "policy", "seed") if summary.get(key) is not None]
    path = folder / "config.json"
    if path.is_file():
        config = path.read_text(encoding="utf-8").strip()
        lines.append(f"\n<details><summary>config.json</summary>\n\n```json\n{config}\n```\n\n</details>")
    return "## Set-up\n\n" + "\n".join(lines) if lines else ""
