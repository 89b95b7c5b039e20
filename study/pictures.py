"""Pictures: ranks over the steps of a run, and a policy's learning curve.

With many modules, ranks get a panel per kind of module, with a row per layer.

All pictures use the object interface on the Agg canvas: no display, no global state. Sizes suit the 900 pixels of a
README, colours (Okabe and Ito 2008; viridis) suit colour-blind readers, and titles state the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common import drawing
from ..common.arrays import FloatArray, IntArray
from ..common.text import ShortName, plural, short_names, shortest_ends
from ..lora.spec import DEFAULT_RANKS

if TYPE_CHECKING:  # the memory picture does not need torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .run_data import RunData


def learning_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw returns of episodes over an agent's training rounds, and its gain on validation tasks.

    Args:
        rows: rows of progress.jsonl. Those with "over_rule", "over_rule_p10" and "over_rule_p90" are rounds; those with
            "validation" hold the loss above the rule's, in hundredths of its log.
    """
    rounds = [row for row in rows if "over_rule" in row]
    checks = drawing.finite_points([(row["round"], -row["validation"]) for row in rows if "validation" in row])
    note = "Both panels: held-out loss below the rule's, in hundredths of its log."
    figure = drawing.new_figure(4.1, learning_sentence(rows), note)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    training = drawing.clean_axes(panels[0], "Training, on new tasks each round")
    columns = ("round", "over_rule", "over_rule_p10", "over_rule_p90")
    numbers, means, low, high = (np.array([float(row[key]) for row in rounds]) for key in columns)
    training.fill_between(numbers, low, high, color=drawing.COLORS[0], alpha=0.15, linewidth=0, label="10-90% of runs")
    training.plot(numbers, means, color=drawing.COLORS[0], linewidth=2, label="mean")
    validation = drawing.clean_axes(panels[1], "Validation tasks, which decide what is kept")
    if len(checks):
        validation.plot(*checks.T, color=drawing.COLORS[1], linewidth=2, marker="o", label="agent")
    for axes in panels:
        axes.axhline(0, color=drawing.FAINT, linewidth=0.8, zorder=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def learning_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the result of training an agent; see `learning_curve`."""
    checks = [(row["validation"], row["round"]) for row in rows if "validation" in row]
    if not checks:
        return f"An agent was trained for {plural(sum('over_rule' in row for row in rows), 'round')}"
    value, number = min(checks)
    told = f"its losses on validation tasks are {abs(value):.1f} % {'below' if value <= 0 else 'above'} the rule's"
    return f"The agent of round {number} is kept: {told}" if number else f"The copy of the rule is kept: {told}"


PICTURE = "ranks.png"
"""The picture's name in the folder of a run."""

ROW_INCHES = 0.19
MOST_LABELLED_ROWS = 72
"""Number of modules above which they share rows."""

PANELS_IN_A_ROW = 8
PANEL_ROW_INCHES = 0.045, 0.16
"""Least and largest height of a panel's row."""
LABEL_INCHES = 0.14
"""Height of a layer's name."""
MOST_LINES = 6
"""Maximum number of decisions drawn as lines through the panel."""
ONE_LINE = 16
"""Maximum length of a name on one line above a panel."""
OTHER = "other"


@dataclass(frozen=True)
class _Rows:
    """Modules from the bottom of the picture to its top.

    Attributes:
        ranks: (modules, changes).
        names: short names.
        edges: first row of each layer, and the total number of rows.
        edge_steps: first step of each column, and the last step.
    """

    ranks: IntArray
    names: list[ShortName]
    edges: list[int]
    edge_steps: list[int]


def write_rank_picture(run: RunData) -> Path | None:
    """Write ranks.png into a run's folder; None without decisions, or if ranks are equal or modules differ."""
    decisions, steps = run.decisions, [record.step for record in run.decisions]
    if len({record.modules for record in decisions}) != 1:
        return None
    ranks = np.stack([record.rank_after for record in decisions])
    if steps[0] > 0:  # before the first decision
        ranks, steps = np.vstack([decisions[0].rank_before, ranks]), [0, *steps]
    if np.unique(ranks).size == 1:  # a sheet of one colour; its sentence suffices
        return None
    figure = rank_heatmap(steps, ranks, decisions[0].modules, decisions[0].problem.blocks, run.steps)
    return drawing.save_figure(figure, run.folder / PICTURE)


def rank_heatmap(
    steps: Sequence[int], ranks: IntArray, modules: Sequence[str], blocks: IntArray, total_steps: int
) -> Figure:
    """Draw the rank of each module over the run, layers as in the network with its output at the top.

    Args:
        steps: steps at which ranks took effect, ascending, (changes,).
        ranks: ranks from that step on, int (changes, modules).
        modules: full names, (modules,).
        blocks: layer of each module, 0 at the bottom, int (modules,).
        total_steps: the last step of the run.
    """
    ranks = np.asarray(ranks)
    from .verdict import ranks_sentence  # imports torch

    title, rungs = ranks_sentence(ranks, modules), _rungs(ranks)
    names, edge_steps = short_names(modules), [*steps, total_steps]
    if len(modules) > MOST_LABELLED_ROWS:
        return _rank_panels(_grid(ranks, names, np.asarray(blocks), edge_steps), title, rungs)
    order = np.argsort(blocks, kind="stable")
    starts = np.flatnonzero(np.diff(np.asarray(blocks)[order], prepend=-1))
    rows = _Rows(ranks[:, order].T, [names[i] for i in order], [*starts.tolist(), len(order)], edge_steps)
    note = "Network output at the top. Triangles: decisions. Numbers: new ranks."
    figure = drawing.new_figure(1.25 + ROW_INCHES * max(len(order), 12), title, note)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 0.022), wspace=0.03)
    axes = figure.add_subplot(grid[0])
    drawing.draw_cells(axes, rows.ranks, rows.edge_steps, gap=0.8, hatched=True)
    axes.hlines(rows.edges[1:-1], 0, total_steps, color="white", linewidth=3, zorder=2)
    axes.set(xlim=(0, total_steps), xlabel="training step")
    _write_ranks(axes, rows)
    _draw_labels(axes, rows)
    _draw_decisions(axes, rows)
    drawing.draw_key(figure.add_subplot(grid[1]), rungs)
    return figure


def _rungs(ranks: IntArray) -> list[int]:
    """Return the ranks of the colour key: the ladder up to the highest rank in use, at least 8."""
    highest = max(int(ranks.max(initial=0)), 8)
    rungs = [rank for rank in DEFAULT_RANKS if rank <= highest]
    return rungs if rungs[-1] == highest else [*rungs, highest]


def _write_ranks(axes: Axes, rows: _Rows) -> None:
    """Label the cells with new ranks, if they are wide enough."""
    steps, total = rows.edge_steps, rows.edge_steps[-1]
    for column, (left, right) in enumerate(pairwise(steps)):
        if right - left < 0.03 * total:
            continue
        for row, rank in enumerate(rows.ranks[:, column].tolist()):
            if not column or rank != rows.ranks[row, column - 1]:
                drawing.write_rank(axes, rank, (left, row + 0.5))


def _draw_labels(axes: Axes, rows: _Rows) -> None:
    """Draw kinds next to their rows, with layers as groups to their left."""
    middles = [(low + high) / 2 for low, high in pairwise(rows.edges)]
    # A module outside the layers already has its name next to its row.
    layers = [rows.names[low].layer for low in rows.edges[:-1]]
    axes.tick_params(axis="y", labelsize=8.5)
    axes.tick_params(axis="x", length=3, color="#bbbbbb", labelsize=9)
    kinds = [name.kind if len(name.kind) <= 28 else f"…{name.kind[-27:]}" for name in rows.names]
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    groups = axes.secondary_yaxis(-0.02 - 0.0115 * max(len(kind) for kind in kinds))
    groups.set_yticks(middles, layers)
    groups.tick_params(length=0, labelsize=9, labelcolor=drawing.INK, pad=4)
    for label in groups.get_yticklabels():
        label.set_fontweight("bold")
    groups.spines[:].set_visible(False)


def _draw_decisions(axes: Axes, rows: _Rows) -> None:
    """Draw a line and, above the picture, the step of each change; overlapping steps stay unlabelled."""
    total = rows.edge_steps[-1]
    marks = axes.secondary_xaxis("top")
    labels, previous = [], -total
    for step in rows.edge_steps[:-1]:
        clear = step - previous >= 0.045 * total
        labels.append(f"{step:g}" if clear else "")
        previous = step if clear else previous
        axes.axvline(step, color="white", linewidth=1.6, zorder=3)
        axes.plot([step], [1.004], marker="v", markersize=6, color=drawing.INK, clip_on=False, zorder=5,
                  transform=axes.get_xaxis_transform(), linestyle="none")  # fmt: skip
    marks.set_xticks(rows.edge_steps[:-1], labels)
    marks.tick_params(length=0, labelsize=9, labelcolor=drawing.INK, pad=6)
    marks.spines[:].set_visible(False)


# Many modules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Grid:
    """Ranks by kind of module and layer.

    Attributes:
        layers: name of each layer, its first at the bottom.
        kinds: ranks of each kind of module, (layers, changes); the mean if a layer has several such modules.
        shared: whether a cell represents several modules.
        edge_steps: first step of each column, and the last step.
    """

    layers: list[str]
    kinds: dict[str, FloatArray]
    shared: bool
    edge_steps: list[int]


def _rank_panels(grid: _Grid, title: str, rungs: Sequence[int]) -> Figure:
    """Draw the rank of each kind of module in each layer over the run; `rungs` are the ranks of the colour key."""
    lines = math.ceil(len(grid.kinds) / PANELS_IN_A_ROW)
    columns = math.ceil(len(grid.kinds) / lines)
    row_inches = float(np.clip(5.0 / len(grid.layers), *PANEL_ROW_INCHES))
    shared = " Cells with several modules show their mean." if grid.shared else ""
    note = f"Network output at the top. Triangles: decisions.{shared}"
    panel_inches = max(row_inches * len(grid.layers), 1.2)
    figure = drawing.new_figure(1.2 + lines * (panel_inches + 0.45), title, note)
    panels = figure.add_gridspec(lines, columns + 1, width_ratios=(*[1.0] * columns, 0.14), wspace=0.04)
    for number, (kind, cells) in enumerate(grid.kinds.items()):
        line, column = divmod(number, columns)
        axes = figure.add_subplot(panels[line, column])
        _draw_panel(axes, kind, cells, grid.edge_steps, row_inches)
        every = math.ceil(LABEL_INCHES / row_inches)
        names = grid.layers[::every] if column == 0 else []
        axes.set_yticks(np.arange(len(grid.layers))[::every][: len(names)] + 0.5, names)
        axes.tick_params(axis="y", labelsize=8.5)
    figure.supxlabel("training step", fontsize=10, color=drawing.INK)
    drawing.draw_key(figure.add_subplot(panels[0, columns]), rungs)
    return figure


def _grid(ranks: IntArray, names: Sequence[ShortName], blocks: IntArray, edge_steps: list[int]) -> _Grid:
    order, rows = np.unique(blocks, return_inverse=True)
    kinds = module_kinds(names)
    within = {kind: {row for row, other in zip(rows, kinds, strict=True) if other == kind} for kind in set(kinds)}
    # Panels for modules in a single layer would be empty, so they share one.
    rare = {kind for kind in within if len(within[kind]) == 1}
    if 1 < len(rare) < len(within):
        kinds = [OTHER if kind in rare else kind for kind in kinds]
    labels = {row: name.layer or name.kind for row, name in zip(rows.tolist(), names, strict=True)}
    panels, shared = {}, False
    for kind in sorted(dict.fromkeys(kinds), key=lambda kind: kind == OTHER or kind in rare):
        inside = np.array([other == kind for other in kinds])
        cells = np.full((len(order), len(ranks)), float(drawing.ABSENT))
        for row in np.unique(rows[inside]):
            cells[row] = ranks[:, inside & (rows == row)].mean(axis=1)
        shared |= bool(np.bincount(rows[inside]).max() > 1)
        panels[kind] = cells
    return _Grid([labels[row] for row in range(len(order))], panels, shared, edge_steps)


def module_kinds(names: Sequence[ShortName]) -> list[str]:
    """Return the kind of each module, equal across layers and experts: such as "mlp.up_proj"."""
    # Without the number of an expert: "experts.3.up_proj" -> "experts.up_proj".
    full = [re.sub(r"(^|\.)\d+(?=\.|$)", "", name.kind).lstrip(".") or name.kind for name in names]
    different = list(dict.fromkeys(full))
    ends = dict(zip(different, shortest_ends(different, [0] * len(different)), strict=True))
    return [ends[kind] for kind in full]


def _draw_panel(axes: Axes, kind: str, cells: FloatArray, edge_steps: Sequence[int], row_inches: float) -> None:
    """Draw one kind of module, with rows of a given height."""
    total = edge_steps[-1]
    drawing.draw_cells(axes, cells, edge_steps, gap=0.5 if len(cells) <= 60 else 0.0, hatched=False)
    axes.set_title(_in_two_lines(kind), fontsize=9 if len(kind) <= ONE_LINE else 8, color=drawing.INK, pad=8)
    axes.set_xticks([0, total], ["0", f"{total:g}"])
    axes.tick_params(axis="x", length=3, color="#bbbbbb", labelsize=8.5)
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    starts = list(edge_steps[:-1])
    if len(starts) <= MOST_LINES:
        axes.vlines(starts, 0, len(cells), color="white", linewidth=1, zorder=3)
    style: dict[str, Any] = {"marker": "v", "color": drawing.INK, "linestyle": "none", "clip_on": False, "zorder": 5}
    places = [len(cells) + 0.02 / row_inches] * len(starts)
    axes.plot(starts, places, markersize=min(3.5, 24 / len(starts)), **style)
    axes.set_ylim(0, len(cells))


def _in_two_lines(kind: str) -> str:
    """Break a long name of a kind at its last dot."""
    first, dot, last = kind.rpartition(".")
    return f"{first}{dot}\n{last}" if dot and len(kind) > ONE_LINE else kind
