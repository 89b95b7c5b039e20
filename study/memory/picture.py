"""The picture of a training step's memory: bytes by layer and kind, beside what other choices would take."""

from __future__ import annotations

from collections.abc import Mapping
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
from ...memory.breakdown import Kind
from .alternatives import MemoryUse

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


def memory_picture(use: MemoryUse) -> Figure:
    """Draw bytes by layer, stacked by kind, and below them the bytes that other choices would take."""
    layers, choices = len(use.breakdown.layers), len(use.alternatives)
    row = 0.19 if layers <= MOST_ROOMY_LAYERS else 0.15
    heights = 0.55 + row * min(max(layers, 6), 60), 0.55 + 0.21 * choices
    figure = new_figure(1.15 + sum(heights), _title(use), _note(use))
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    _draw_layers(figure.add_subplot(grid[0]), use)
    _draw_choices(figure.add_subplot(grid[1]), use)
    return figure


def _draw_layers(axes: Axes, use: MemoryUse) -> None:
    breakdown = use.breakdown
    divisor, unit = _scale(float(breakdown.bytes.sum(axis=1).max()))
    rows = np.arange(len(breakdown.layers))
    _stack(axes, rows, {kind: breakdown.by_layer(kind) / divisor for kind in KIND_COLORS})
    _clean_bars(axes, len(rows), "By layer")
    every = 1 + len(rows) // MOST_NAMED_LAYERS
    axes.set_yticks(rows[::every], layer_titles(breakdown.layers)[::every])
    axes.tick_params(axis="y", labelsize=8.5 if len(rows) <= MOST_ROOMY_LAYERS else 7.5)
    axes.set(xlabel=f"{unit} at the peak")
    shown = [
        Patch(color=color, label=label)
        for kind, (color, label) in KIND_COLORS.items()
        if any(choice.breakdown.of_kind(kind) > VISIBLE * choice.peak_bytes for choice in use.alternatives)
    ]
    style: dict[str, Any] = {"frameon": False, "borderaxespad": 0, "handlelength": 1, "handleheight": 1}
    axes.legend(handles=shown, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9, **style)


def _draw_choices(axes: Axes, use: MemoryUse) -> None:
    choices = use.alternatives
    largest = max(*(choice.peak_bytes for choice in choices), use.limit_bytes or 0)
    divisor, unit = _scale(largest)
    rows = np.arange(len(choices))[::-1]
    for_kind = {kind: np.array([choice.breakdown.of_kind(kind) for choice in choices]) for kind in KIND_COLORS}
    _stack(axes, rows, {kind: sizes / divisor for kind, sizes in for_kind.items()})
    for row, choice in zip(rows.tolist(), choices, strict=True):
        text = f"{choice.peak_bytes / use.reference_bytes:.0%}  {format_bytes(choice.peak_bytes)}"
        style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "va": "center", "textcoords": "offset points"}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}  # above the budget's line
        axes.annotate(text, (choice.peak_bytes / divisor, row), (5, 0), bbox=box, **style)
    title = "What other choices take, as shares of rank 8 on all modules"
    _clean_bars(axes, len(rows), title, pad=20 if use.limit_bytes else 6)
    axes.set_yticks(rows, [choice.label for choice in choices])
    axes.set(xlim=(0, 1.2 * largest / divisor), xlabel=f"{unit} at the peak")
    if use.limit_bytes is not None:  # a line behind the numbers, its name above the bars
        axes.axvline(use.limit_bytes / divisor, color=BUDGET_RED, linewidth=1.6, zorder=0.5)
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
        name = f"budget {format_bytes(use.limit_bytes)}"
        axes.annotate(name, (use.limit_bytes / divisor, 1), (0, 3), color=BUDGET_RED, fontsize=9, **place)


def _stack(axes: Axes, rows: IntArray, sizes: Mapping[Kind, FloatArray]) -> None:
    """One bar a row, its kinds side by side."""
    left = np.zeros(len(rows))
    for kind, widths in sizes.items():
        axes.barh(rows, widths, left=left, color=KIND_COLORS[kind][0], height=0.78, linewidth=0)
        left = left + widths


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


def _title(use: MemoryUse) -> str:
    total = use.breakdown.total
    saved = sum(use.breakdown.of_kind(kind) for kind in ("saved", "inputs", "recomputed"))
    return f"A training step peaks at {format_bytes(total)}; {saved / total:.0%} is held for backward"


def _note(use: MemoryUse) -> str:
    config = use.config
    extras = ", ".join(["bf16"] * config.bf16 + ["gradient checkpointing"] * config.checkpointing)
    name = config.model.rstrip("/").rpartition("/")[2]
    return (
        f"{name}: rank {config.rank} on {len(use.modules)} modules, {use.shape} tokens, {config.optimizer}"
        f"{', ' + extras if extras else ''}. The frozen model ({format_bytes(use.frozen_bytes)}) comes on top."
    )
