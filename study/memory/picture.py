"""The picture of a training step's memory: bytes by layer and kind, beside what other choices would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...common.arrays import FloatArray, IntArray
from ...common.drawing import BUDGET_RED, COLORS, FAINT, INK, clean_axes, new_figure
from ...common.module_names import layer_titles
from ...common.units import format_bytes
from ...memory.breakdown import Breakdown, Kind
from ...memory.outlook import Outlook

KIND_COLORS: dict[Kind, tuple[str, str]] = {
    "saved": (COLORS[0], "saved for backward"),
    "inputs": (COLORS[5], "kept inputs"),
    "recomputed": (COLORS[3], "segment run again"),
    "transient": (COLORS[4], "momentary"),
    "weights": ("#004d38", "adapter weights"),
    "gradients": (COLORS[2], "adapter gradients"),
    "optimizer": ("#8fd3bd", "optimiser state"),
    "signals": (COLORS[1], "signal buffers"),
    "others": (FAINT, "outside the adapter"),
}
"""Colour and label of each kind: what the adapter itself takes is green."""

VISIBLE = 0.002
"""A kind with a larger share of the peak than this gets a name in the picture."""

MOST_ROOMY_LAYERS, MOST_NAMED_LAYERS = 24, 45
"""More rows than the first are drawn closer together; of more than the second, not every one is named."""


BESIDE = "#c9ccd1"
"""What is on a card beside the step: the frozen model, the context, what the allocator reserves, the margin."""


def memory_picture(outlook: Outlook, labels: Sequence[str], note: str) -> Figure:
    """Draw the bytes of the first choice by layer, stacked by kind, and below them the bytes that each choice takes.

    On a card, what is there beside the step is drawn as well, and the line is the card's memory; else it is the budget.

    Args:
        outlook: of a step.
        labels: of its choices, in words.
        note: what was looked at, in small type.
    """
    breakdowns = [outlook.breakdown(choice) for choice in outlook.choices]
    layers, choices = len(breakdowns[0].layers), len(breakdowns)
    row = 0.19 if layers <= MOST_ROOMY_LAYERS else 0.15
    heights = 0.55 + row * min(max(layers, 6), 60), 0.55 + 0.21 * choices
    total = breakdowns[0].total
    saved = sum(breakdowns[0].of_kind(kind) for kind in ("saved", "inputs", "recomputed"))
    title = f"A training step peaks at {format_bytes(total)}; {saved / total:.0%} is held for backward"
    figure = new_figure(1.15 + sum(heights), title, note)
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top = figure.add_subplot(grid[0])
    _draw_layers(top, breakdowns[0])
    shown = [
        Patch(color=color, label=label)
        for kind, (color, label) in KIND_COLORS.items()
        if any(breakdown.of_kind(kind) > VISIBLE * breakdown.total for breakdown in breakdowns)
    ]
    shown += [Patch(color=BESIDE, label="card, beside the step")] if outlook.card else []
    style: dict[str, Any] = {"frameon": False, "borderaxespad": 0, "handlelength": 1, "handleheight": 1}
    top.legend(handles=shown, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9, **style)
    _draw_choices(figure.add_subplot(grid[1]), outlook, breakdowns, labels)
    return figure


def _draw_layers(axes: Axes, breakdown: Breakdown) -> None:
    size, unit = _scale(float(breakdown.bytes.sum(axis=1).max()))
    rows = np.arange(len(breakdown.layers))
    _stack(axes, rows, {kind: breakdown.by_layer(kind) / size for kind in KIND_COLORS})
    _clean_bars(axes, len(rows), "By layer")
    every = 1 + len(rows) // MOST_NAMED_LAYERS
    axes.set_yticks(rows[::every], layer_titles(breakdown.layers)[::every])
    axes.tick_params(axis="y", labelsize=8.5 if len(rows) <= MOST_ROOMY_LAYERS else 7.5)
    axes.set(xlabel=f"{unit} at the peak")


def _draw_choices(axes: Axes, outlook: Outlook, breakdowns: Sequence[Breakdown], labels: Sequence[str]) -> None:
    choices, limit = outlook.choices, outlook.limit_bytes
    wholes = np.array([choice.use.total_bytes if choice.use else choice.step_bytes for choice in choices])
    largest = max(float(wholes.max()), limit or 0)
    size, unit = _scale(largest)
    rows = np.arange(len(choices))[::-1]
    kinds = {kind: np.array([each.of_kind(kind) for each in breakdowns]) / size for kind in KIND_COLORS}
    ends = _stack(axes, rows, kinds)
    if outlook.card:
        axes.barh(rows, wholes / size - ends, left=ends, color=BESIDE, height=0.78, linewidth=0)
    for row, choice, whole in zip(rows.tolist(), choices, wholes.tolist(), strict=True):
        text = f"{choice.step_bytes / outlook.reference_bytes:.0%}  {format_bytes(whole)}"
        text += "" if choice.time is None else f"  time {choice.time:.2f}"
        style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "va": "center", "textcoords": "offset points"}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}  # above the limit's line
        axes.annotate(text, (whole / size, row), (5, 0), bbox=box, **style)
    title = "What each choice takes, the step as a share of rank 8 on all modules"
    _clean_bars(axes, len(rows), title, pad=20 if limit else 6)
    axes.set_yticks(rows, labels)
    axes.set(xlim=(0, (1.35 if outlook.card else 1.2) * largest / size), xlabel=f"{unit} at the peak")
    if limit is not None:  # a line behind the numbers, its name above the bars
        axes.axvline(limit / size, color=BUDGET_RED, linewidth=1.6, zorder=0.5)
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
        name = f"{outlook.card.name if outlook.card else 'budget'} {format_bytes(limit)}"
        axes.annotate(name, (limit / size, 1), (0, 3), color=BUDGET_RED, fontsize=9, **place)


def _stack(axes: Axes, rows: IntArray, sizes: Mapping[Kind, FloatArray]) -> FloatArray:
    """One bar a row, its kinds side by side; returns where the bars end, (rows,)."""
    left = np.zeros(len(rows))
    for kind, widths in sizes.items():
        axes.barh(rows, widths, left=left, color=KIND_COLORS[kind][0], height=0.78, linewidth=0)
        left = left + widths
    return left


def _clean_bars(axes: Axes, rows: int, title: str, pad: float = 6) -> None:
    clean_axes(axes, title, pad)
    axes.set_ylim(-0.6, rows - 0.4)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#ececec", linewidth=0.8)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _scale(largest: float) -> tuple[float, str]:
    """A divisor and its binary unit, so that the largest value has few digits before the point."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return float(1024**power), unit
    return 1.0, "bytes"
