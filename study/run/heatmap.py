"""The picture of a run: the rank of every module over the steps of a fine-tune.

A run with many modules has a panel for each kind of module, see `panels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...common.arrays import IntArray
from ...common.drawing import INK, new_figure
from ...common.module_names import ShortName, short_names
from ...common.rank_grid import draw_cells, draw_key, write_rank
from ...lora.ladder import DEFAULT_RANKS
from .panels import rank_panels

ROW_INCHES = 0.19
MOST_LABELLED_ROWS = 72
"""Above this many modules there is no row for each."""


@dataclass(frozen=True)
class _Rows:
    """Modules from the bottom of the picture to its top.

    Attributes:
        ranks: (modules, changes).
        names: short names.
        edges: row at which each layer begins, and the number of rows at the end.
        edge_steps: step at which each column begins, and the last step.
    """

    ranks: IntArray
    names: list[ShortName]
    edges: list[int]
    edge_steps: list[float]


def rank_heatmap(
    steps: Sequence[int], ranks: IntArray, modules: Sequence[str], blocks: IntArray, total_steps: int
) -> Figure:
    """Rank of each module over the run; layers as in the network, its output at the top.

    Args:
        steps: steps at which ranks took effect, rising, (changes,).
        ranks: ranks from that step on, int (changes, modules).
        modules: full names, (modules,).
        blocks: layer of each module, 0 at the bottom, int (modules,).
        total_steps: where the run ends.
    """
    ranks = np.asarray(ranks)
    title, rungs = ranks_sentence(ranks[-1]), _rungs(ranks)
    if len(modules) > MOST_LABELLED_ROWS:
        return rank_panels(steps, ranks, modules, blocks, total_steps, title, rungs)
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
    figure = new_figure(1.25 + ROW_INCHES * max(len(order), 12), title, note)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 0.022), wspace=0.03)
    axes = figure.add_subplot(grid[0])
    draw_cells(axes, rows.ranks, rows.edge_steps, gap=0.8, hatched=True)
    axes.hlines(rows.edges[1:-1], 0, total_steps, color="white", linewidth=3, zorder=2)
    axes.set(xlim=(0, total_steps), xlabel="training step")
    _write_ranks(axes, rows)
    _draw_labels(axes, rows)
    _draw_decisions(axes, rows)
    draw_key(figure.add_subplot(grid[1]), rungs)
    return figure


def _rungs(ranks: IntArray) -> list[int]:
    """Ranks of the colour key: the ladder up to the highest rank in use, and to 8 at least."""
    highest = max(int(ranks.max(initial=0)), 8)
    rungs = [rank for rank in DEFAULT_RANKS if rank <= highest]
    return rungs if rungs[-1] == highest else [*rungs, highest]


def _write_ranks(axes: Axes, rows: _Rows) -> None:
    """Number the cells where a rank is new, if the cell is wide enough."""
    steps, total = rows.edge_steps, rows.edge_steps[-1]
    for column, (left, right) in enumerate(pairwise(steps)):
        if right - left < 0.03 * total:
            continue
        for row, rank in enumerate(rows.ranks[:, column].tolist()):
            if not column or rank != rows.ranks[row, column - 1]:
                write_rank(axes, rank, (left, row + 0.5), xytext=(5, 0), textcoords="offset points", ha="left")


def _draw_labels(axes: Axes, rows: _Rows) -> None:
    """Kinds beside their rows, layers as groups left of them."""
    middles = [(low + high) / 2 for low, high in pairwise(rows.edges)]
    # A module outside the layers has its name beside its row already.
    layers = [rows.names[low].layer for low in rows.edges[:-1]]
    axes.tick_params(axis="y", labelsize=8.5)
    axes.tick_params(axis="x", length=3, color="#bbbbbb", labelsize=9)
    kinds = [name.kind if len(name.kind) <= 28 else f"…{name.kind[-27:]}" for name in rows.names]
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    groups = axes.secondary_yaxis(-0.02 - 0.0115 * max(len(kind) for kind in kinds))
    groups.set_yticks(middles, layers)
    groups.tick_params(length=0, labelsize=9, labelcolor=INK, pad=4)
    for label in groups.get_yticklabels():
        label.set_fontweight("bold")
    groups.spines[:].set_visible(False)


def _draw_decisions(axes: Axes, rows: _Rows) -> None:
    """A line and, above the picture, the step of each change; steps that would overlap stay unnamed."""
    total = rows.edge_steps[-1]
    marks = axes.secondary_xaxis("top")
    labels, previous = [], -total
    for step in rows.edge_steps[:-1]:
        clear = step - previous >= 0.045 * total
        labels.append(f"{step:g}" if clear else "")
        previous = step if clear else previous
        axes.axvline(step, color="white", linewidth=1.6, zorder=3)
        axes.plot([step], [1.004], marker="v", markersize=6, color=INK, clip_on=False, zorder=5,
                  transform=axes.get_xaxis_transform(), linestyle="none")  # fmt: skip
    marks.set_xticks(rows.edge_steps[:-1], labels)
    marks.tick_params(length=0, labelsize=9, labelcolor=INK, pad=6)
    marks.spines[:].set_visible(False)


def ranks_sentence(final: IntArray) -> str:
    """How concentrated the final ranks are, int (modules,)."""
    if not final.any():
        return "No module ends with an adapter"
    if np.unique(final).size == 1:
        return f"All {len(final)} modules end at rank {final[0]}"
    reached = np.cumsum(np.sort(final)[::-1]) / final.sum()
    few = int(np.searchsorted(reached, 0.8 - 1e-9)) + 1
    without = int((final == 0).sum())
    ending = f"; {without} {_end(without)} without an adapter" if without else ""
    return f"{few} of {len(final)} modules {_end(few)} with {reached[few - 1]:.0%} of all rank{ending}"


def _end(count: int) -> str:
    return "ends" if count == 1 else "end"
