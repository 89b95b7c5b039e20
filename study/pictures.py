"""Pictures: ranks over the steps of a run, the memory of a training step, and a policy's learning curve.

With many modules, ranks get a panel per kind of module, with a row per layer. Memory is drawn by layer and kind, next
to the memory of other choices.

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
from ..common.text import ShortName, format_bytes, layer_titles, plural, short_names, shortest_ends
from ..cost.breakdown import Breakdown, Kind
from ..cost.outlook import Outlook
from ..lora.spec import DEFAULT_RANKS

if TYPE_CHECKING:  # the memory picture does not need torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .run_data import RunData

KIND_COLORS: dict[Kind, tuple[str, str]] = {
    "saved": (drawing.COLORS[0], "saved for backward"),
    "inputs": (drawing.COLORS[5], "checkpointed inputs"),
    "recomputed": (drawing.COLORS[3], "one checkpointed layer"),
    "transient": (drawing.COLORS[4], "temporary"),
    "weights": ("#004d38", "adapter weights"),
    "gradients": (drawing.COLORS[2], "adapter gradients"),
    "optimizer": ("#8fd3bd", "optimizer state"),
    "signals": (drawing.COLORS[1], "signal buffers"),
    "others": (drawing.FAINT, "outside the adapter"),
}
"""Colour and label of each kind: the adapter itself is green."""

VISIBLE = 0.002
"""Smallest share of the peak for a kind to be named in the picture."""

RESERVED = "#c9ccd1"
"""Colour of the allocator's reserve beyond the tensors of a step, and of the prediction's margin."""

ALIKE = 0.005
"""Neighbouring layers whose bytes differ by less than this share of the largest are one bar."""


def memory_picture(outlook: Outlook, labels: Sequence[str], note: str) -> Figure:
    """Draw the bytes of the main choice by layer, stacked by kind, and below them the bytes of each choice.

    The line is the budget; on a card, it is the memory left by the frozen model and the context.

    Args:
        outlook: outlook of a step.
        labels: labels of its choices.
        note: the subject, in small type.
    """
    breakdowns = [outlook.breakdown(choice) for choice in outlook.choices]
    main = outlook.choices.index(outlook.main)
    shown, groups = breakdowns[main], _alike(breakdowns[main])
    heights = 0.55 + 0.21 * max(len(groups), 6), 0.65 + 0.21 * len(breakdowns)
    saved = sum(shown.of_kind(kind) for kind in ("saved", "inputs", "recomputed"))
    title = (
        f"{labels[main][0].upper()}{labels[main][1:]}: a step peaks at {format_bytes(shown.total)}, "
        f"{saved / shown.total:.0%} of it for backward"
    )
    figure = drawing.new_figure(1.15 + sum(heights), title, note)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top = figure.add_subplot(grid[0])
    _draw_layers(top, shown, groups)
    bottom = figure.add_subplot(grid[1])
    room = _draw_choices(bottom, outlook, breakdowns, labels)
    keys: list[Any] = [
        Patch(color=color, label=label)
        for kind, (color, label) in KIND_COLORS.items()
        if any(breakdown.of_kind(kind) > VISIBLE * breakdown.total for breakdown in breakdowns)
    ]
    keys += [Patch(color=RESERVED, label="allocator's reserve")] if outlook.card else []
    keys += [Line2D([], [], color=drawing.BUDGET_RED, label=room)] if room else []
    style: dict[str, Any] = {"frameon": False, "borderaxespad": 0, "handlelength": 1, "handleheight": 1}
    top.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9, **style)
    return figure


def _alike(breakdown: Breakdown) -> list[tuple[int, int]]:
    """Return the first and last of neighbouring layers with the same bytes, from the bottom."""
    groups: list[tuple[int, int]] = []
    most = ALIKE * breakdown.bytes.sum(axis=1).max()
    for layer, row in enumerate(breakdown.bytes):
        if groups and np.abs(row - breakdown.bytes[groups[-1][0]]).sum() <= most:
            groups[-1] = groups[-1][0], layer
        else:
            groups.append((layer, layer))
    return groups


def _draw_layers(axes: Axes, breakdown: Breakdown, groups: Sequence[tuple[int, int]]) -> None:
    size, unit = _scale(float(breakdown.bytes.sum(axis=1).max()))
    firsts, titles = [first for first, _ in groups], layer_titles(breakdown.layers)
    _stack(axes, np.arange(len(groups)), {kind: breakdown.by_layer(kind)[firsts] / size for kind in KIND_COLORS})
    _clean_bars(axes, len(groups), "By layer")
    names = [
        titles[first]
        if first == last
        else f"{titles[first].replace('layer ', 'layers ')} to {titles[last].removeprefix('layer ')}, each"
        for first, last in groups
    ]
    axes.set_yticks(range(len(groups)), names)
    axes.set(xlabel=f"{unit} at the peak")


def _draw_choices(axes: Axes, outlook: Outlook, breakdowns: Sequence[Breakdown], labels: Sequence[str]) -> str:
    """Draw bars of the choices, with figures in columns and a line; returns the line's name, if any."""
    choices, limit, card = outlook.choices, outlook.limit_bytes, outlook.card
    held = choices[0].use.base_bytes + choices[0].use.context_bytes if choices[0].use else 0
    wholes = np.array([choice.use.total_bytes - held if choice.use else choice.step_bytes for choice in choices])
    largest = max(float(wholes.max()), limit - held if limit else 0)
    size, unit = _scale(largest)
    rows = np.arange(len(choices))[::-1]
    kinds = {kind: np.array([each.of_kind(kind) for each in breakdowns]) / size for kind in KIND_COLORS}
    ends = _stack(axes, rows, kinds)
    if card:
        axes.barh(rows, wholes / size - ends, left=ends, color=RESERVED, height=0.78, linewidth=0)
    beside = f" beside {format_bytes(held)} of frozen model and context" if card else ""
    _clean_bars(axes, len(rows), f"What each choice takes{beside}", pad=18)
    columns = [("of rank 8", [f"{choice.step_bytes / outlook.reference_bytes:.0%}" for choice in choices])]
    columns += [("on card" if card else "step", [format_bytes(whole + held) for whole in wholes.tolist()])]
    columns += [("time", [f"{choice.time:.2f}" for choice in choices if choice.time is not None])]
    style: dict[str, Any] = {"fontsize": 8.5, "ha": "right", "va": "center", "transform": axes.get_yaxis_transform()}
    for (head, cells), place in zip(columns, (1.13, 1.32, 1.43), strict=True):
        for row, cell in zip((len(rows), *rows.tolist()), (head if cells else "", *cells), strict=False):
            axes.text(place, row, cell, color=drawing.FAINT if cell == head else drawing.INK, **style)
    axes.set_yticks(rows, labels)
    axes.set(xlim=(0, 1.03 * largest / size), xlabel=f"{unit} at the peak")
    if limit is None:
        return ""
    axes.axvline((limit - held) / size, color=drawing.BUDGET_RED, linewidth=1.6)
    return f"{card.name} leaves {format_bytes(limit - held)}" if card else f"budget, {format_bytes(limit)}"


def _stack(axes: Axes, rows: IntArray, sizes: Mapping[Kind, FloatArray]) -> FloatArray:
    """Draw one bar per row, with kinds side by side; returns the ends of the bars, (rows,)."""
    left = np.zeros(len(rows))
    for kind, widths in sizes.items():
        axes.barh(rows, widths, left=left, color=KIND_COLORS[kind][0], height=0.78, linewidth=0)
        left = left + widths
    return left


def _clean_bars(axes: Axes, rows: int, title: str, pad: float = 6) -> None:
    from matplotlib.ticker import MaxNLocator

    drawing.clean_axes(axes, title, pad)
    axes.set_ylim(-0.6, rows - 0.4)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#ececec", linewidth=0.8)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _scale(largest: float) -> tuple[float, str]:
    """Return a divisor and its binary unit, to give the largest value few digits before the point."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return float(1024**power), unit
    return 1.0, "bytes"


def learning_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw returns of episodes over an agent's training rounds, and its gain on validation tasks.

    Args:
        rows: rows of progress.jsonl. Those with "over_rule", "over_rule_p10" and "over_rule_p90" are rounds; those with
            "validation" hold the loss above the rule's, in hundredths of its log.
    """
    rounds = [row for row in rows if "over_rule" in row]
    checks = drawing.finite_points([(row["round"], -row["validation"]) for row in rows if "validation" in row])
    note = "Both panels: by how much the held-out loss is below that under the rule, in hundredths of its log."
    figure = drawing.new_figure(4.1, learning_sentence(rows), note)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    training = drawing.clean_axes(panels[0], "Training, on new tasks each round")
    numbers, means, low, high = (
        np.array(
            [[float(row[key]) for key in ("round", "over_rule", "over_rule_p10", "over_rule_p90")] for row in rounds]
        )
        .reshape(-1, 4)
        .T
    )
    training.fill_between(numbers, low, high, color=drawing.COLORS[0], alpha=0.15, linewidth=0, label="10-90% of runs")
    training.plot(numbers, means, color=drawing.COLORS[0], linewidth=2, label="mean")
    validation = drawing.clean_axes(panels[1], "Validation tasks, which choose what is kept")
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
        return f"An agent was trained in {plural(sum('over_rule' in row for row in rows), 'round')}"
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
    edge_steps: list[float]


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
    if len(modules) > MOST_LABELLED_ROWS:
        return _rank_panels(steps, ranks, modules, blocks, total_steps, title, rungs)
    order = np.argsort(blocks, kind="stable")
    starts = np.flatnonzero(np.diff(np.asarray(blocks)[order], prepend=-1))
    names = short_names(modules)
    rows = _Rows(
        ranks[:, order].T,
        [names[i] for i in order],
        [*starts.tolist(), len(order)],
        [*steps, total_steps],
    )
    note = "Output of the network at the top. Triangles: decisions. A number stands where a rank is new."
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
                drawing.write_rank(axes, rank, (left, row + 0.5), xytext=(5, 0), textcoords="offset points", ha="left")


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


def _rank_panels(
    steps: Sequence[int],
    ranks: IntArray,
    modules: Sequence[str],
    blocks: IntArray,
    total_steps: int,
    title: str,
    rungs: Sequence[int],
) -> Figure:
    """Draw the rank of each kind of module in each layer over the run; `rungs` are the ranks of the colour key."""
    grid = _grid(np.asarray(ranks), short_names(modules), np.asarray(blocks), [*steps, total_steps])
    lines = math.ceil(len(grid.kinds) / PANELS_IN_A_ROW)
    columns = math.ceil(len(grid.kinds) / lines)
    row_inches = float(np.clip(5.0 / len(grid.layers), *PANEL_ROW_INCHES))
    shared = " A cell with several modules has their mean." if grid.shared else ""
    note = f"Output of the network at the top. Triangles: decisions.{shared}"
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
    full = [_without_numbers(name.kind) for name in names]
    different = list(dict.fromkeys(full))
    ends = dict(zip(different, shortest_ends(different, [0] * len(different)), strict=True))
    return [ends[kind] for kind in full]


def _without_numbers(kind: str) -> str:
    """Return the kind of a module without the expert number: "experts.3.up_proj" -> "experts.up_proj"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", kind).lstrip(".") or kind


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
