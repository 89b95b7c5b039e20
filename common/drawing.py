"""What all pictures share: size, colours, titles, and writing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .arrays import FloatArray
from .files import atomic_path

Points = Sequence[tuple[float, float]]

WIDTH = 9.0
"""Inches; 1350 pixels at `DPI`, shown at 900."""
DPI = 150
INK, FAINT, RULE = "#333333", "#767676", "#bbbbbb"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BUDGET_RED = "#b00020"
"""The line that no step may cross."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG in one step, and return the path; equal figures give equal bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", facecolor="white", metadata={"Software": None})
    return path


def new_figure(height: float, title: str, note: str = "") -> Figure:
    """An empty figure that lays itself out below its title.

    Args:
        height: inches, title included.
        title: the finding, one line; set smaller if it is long.
        note: how to read the picture, in small grey type; smaller if it is long.
    """
    top = 0.36 + 0.22 * bool(note)
    room = (0.005, 0.005, 0.99, 1 - top / height - 0.005)
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(rect=room, w_pad=0.06))
    style: dict[str, Any] = {"va": "top", "ha": "left"}
    size = min(12.5, 1090 / len(title))
    figure.text(0.012, 1 - 0.10 / height, title, fontsize=size, fontweight="bold", color=INK, **style)
    if note:
        figure.text(0.012, 1 - 0.36 / height, note, fontsize=min(9, 1180 / len(note)), color=FAINT, **style)
    return figure


def clean_axes(axes: Axes, title: str = "", pad: float = 6) -> Axes:
    """Leave the left and bottom spine, small grey ticks and a faint grid; write a title, `pad` points above."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    axes.tick_params(labelsize=9, color=RULE, labelcolor=INK, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=10, color=INK)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=pad)
    return axes


def mark_steps(axes: Axes, steps: Sequence[int]) -> None:
    """A dotted line at each of these steps."""
    for step in steps:
        axes.axvline(step, color=RULE, linewidth=1, linestyle=":", zorder=1)


def smooth(values: FloatArray, span: int) -> FloatArray:
    """Exponential moving average over about `span` values, free of bias at the start; shape as given."""
    decay = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        result[index] = total / weight
    return result


def finite_points(points: Points) -> FloatArray:
    """Points as (n, 2) without NaN or infinity."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[np.isfinite(table).all(axis=1)]


def draw_legend(axes: Axes) -> None:
    """Put a borderless legend where it hides least, if anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=9, framealpha=0.9, edgecolor="none").set_zorder(10)
