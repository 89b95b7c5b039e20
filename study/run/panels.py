"""The picture of a run with many modules: a panel for each kind of module, in it a row for each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...common.arrays import FloatArray, IntArray
from ...common.drawing import INK, new_figure
from ...common.module_names import ShortName, short_names, shortest_ends
from ...common.rank_grid import ABSENT, draw_cells, draw_key

PANELS_IN_A_ROW = 8
ROW_INCHES = 0.045, 0.16
"""Least and largest height of a row."""
LABEL_INCHES = 0.14
"""Height that a name of a layer takes."""
MOST_LINES = 6
"""Up to so many decisions have a line through the panel."""
ONE_LINE = 16
"""Letters of a name above a panel."""
OTHER = "other"


@dataclass(frozen=True, eq=False)
class _Grid:
    """Ranks by kind of module and layer.

    Attributes:
        layers: name of each layer, its first at the bottom.
        kinds: ranks of each kind of module, (layers, changes); the mean where a layer has several such modules.
        shared: whether a cell stands for several modules.
        edge_steps: step at which each column begins, and the last step.
    """

    layers: list[str]
    kinds: dict[str, FloatArray]
    shared: bool
    edge_steps: list[int]


def rank_panels(
    steps: Sequence[int],
    ranks: IntArray,
    modules: Sequence[str],
    blocks: IntArray,
    total_steps: int,
    title: str,
    rungs: Sequence[int],
) -> Figure:
    """Rank of each kind of module in each layer over the run; see `rank_heatmap`.

    Args:
        steps: steps at which ranks took effect, rising, (changes,).
        ranks: ranks from that step on, int (changes, modules).
        modules: full names, (modules,).
        blocks: layer of each module, 0 at the bottom, int (modules,).
        total_steps: where the run ends.
        title: of the picture.
        rungs: ranks of the colour key.
    """
    grid = _grid(np.asarray(ranks), short_names(modules), np.asarray(blocks), [*steps, total_steps])
    lines = math.ceil(len(grid.kinds) / PANELS_IN_A_ROW)
    columns = math.ceil(len(grid.kinds) / lines)
    row_inches = float(np.clip(5.0 / len(grid.layers), *ROW_INCHES))
    shared = " A cell with several modules has their mean." if grid.shared else ""
    note = f"Output of the network at the top. Triangles: decisions.{shared}"
    panel_inches = max(row_inches * len(grid.layers), 1.2)
    figure = new_figure(1.2 + lines * (panel_inches + 0.45), title, note)
    panels = figure.add_gridspec(lines, columns + 1, width_ratios=(*[1.0] * columns, 0.14), wspace=0.04)
    for number, (kind, cells) in enumerate(grid.kinds.items()):
        line, column = divmod(number, columns)
        axes = figure.add_subplot(panels[line, column])
        _draw_panel(axes, kind, cells, grid.edge_steps, row_inches)
        every = math.ceil(LABEL_INCHES / row_inches)
        names = grid.layers[::every] if column == 0 else []
        axes.set_yticks(np.arange(len(grid.layers))[::every][: len(names)] + 0.5, names)
        axes.tick_params(axis="y", labelsize=8.5)
    figure.supxlabel("training step", fontsize=10, color=INK)
    draw_key(figure.add_subplot(panels[0, columns]), rungs)
    return figure


def _grid(ranks: IntArray, names: Sequence[ShortName], blocks: IntArray, edge_steps: list[int]) -> _Grid:
    order, rows = np.unique(blocks, return_inverse=True)
    kinds = module_kinds(names)
    within = {kind: {row for row, other in zip(rows, kinds, strict=True) if other == kind} for kind in set(kinds)}
    # Panels for modules that one layer alone has would be empty, so they share one.
    rare = {kind for kind in within if len(within[kind]) == 1}
    if 1 < len(rare) < len(within):
        kinds = [OTHER if kind in rare else kind for kind in kinds]
    labels = {row: name.layer or name.kind for row, name in zip(rows.tolist(), names, strict=True)}
    panels, shared = {}, False
    for kind in sorted(dict.fromkeys(kinds), key=lambda kind: kind == OTHER or kind in rare):
        inside = np.array([other == kind for other in kinds])
        cells = np.full((len(order), len(ranks)), float(ABSENT))
        for row in np.unique(rows[inside]):
            cells[row] = ranks[:, inside & (rows == row)].mean(axis=1)
        shared |= bool(np.bincount(rows[inside]).max() > 1)
        panels[kind] = cells
    return _Grid([labels[row] for row in range(len(order))], panels, shared, edge_steps)


def module_kinds(names: Sequence[ShortName]) -> list[str]:
    """The kind of each module, the same in all layers and for all experts: such as "mlp.up_proj"."""
    full = [_without_numbers(name.kind) for name in names]
    different = list(dict.fromkeys(full))
    ends = dict(zip(different, shortest_ends(different, [0] * len(different)), strict=True))
    return [ends[kind] for kind in full]


def _without_numbers(kind: str) -> str:
    """The kind of a module without the number of an expert: "experts.3.up_proj" -> "experts.up_proj"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", kind).lstrip(".") or kind


def _draw_panel(axes: Axes, kind: str, cells: FloatArray, edge_steps: Sequence[int], row_inches: float) -> None:
    """Draw one kind of module, in rows of a height."""
    total = edge_steps[-1]
    draw_cells(axes, cells, edge_steps, gap=0.5 if len(cells) <= 60 else 0.0, hatched=False)
    axes.set_title(_in_two_lines(kind), fontsize=9 if len(kind) <= ONE_LINE else 8, color=INK, pad=8)
    axes.set_xticks([0, total], ["0", f"{total:g}"])
    axes.tick_params(axis="x", length=3, color="#bbbbbb", labelsize=8.5)
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    starts = list(edge_steps[:-1])
    if len(starts) <= MOST_LINES:
        axes.vlines(starts, 0, len(cells), color="white", linewidth=1, zorder=3)
    style: dict[str, Any] = {"marker": "v", "color": INK, "linestyle": "none", "clip_on": False, "zorder": 5}
    places = [len(cells) + 0.02 / row_inches] * len(starts)
    axes.plot(starts, places, markersize=min(3.5, 24 / len(starts)), **style)
    axes.set_ylim(0, len(cells))


def _in_two_lines(kind: str) -> str:
    """A long name of a kind, broken at its last dot."""
    first, dot, last = kind.rpartition(".")
    return f"{first}{dot}\n{last}" if dot and len(kind) > ONE_LINE else kind
