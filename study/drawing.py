"""What all pictures share: size, colours, titles, and writing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import atomic_path
from ..lora.memory import FloatArray

Points = Sequence[tuple[float, float]]

WIDTH = 9.0
"""Inches; 1350 pixels at `DPI`, shown at 900."""
DPI = 150
INK, FAINT = "#333333", "#8a8a8a"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MIB = 2**20


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG in one step; equal figures give equal bytes.

    Returns:
        The path.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", facecolor="white", metadata={"Software": None})
    return path


def new_figure(height: float, title: str, note: str = "") -> Figure:
    """An empty figure that lays itself out below its title.

    Args:
        height: inches, title included.
        title: the finding, one line.
        note: how to read the picture, in small grey type.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    top = 0.36 + 0.22 * bool(note)
    figure.get_layout_engine().set(rect=(0.005, 0.005, 0.99, 1 - top / height - 0.005), w_pad=0.06)  # type: ignore[union-attr]
    figure.text(
        0.012, 1 - 0.10 / height, title, va="top", ha="left", fontsize=12.5, fontweight="bold", color=INK
    )
    if note:
        figure.text(0.012, 1 - 0.36 / height, note, va="top", ha="left", fontsize=9, color=FAINT)
    return figure


def clean_axes(axes: Axes) -> Axes:
    """Leave the left and bottom spine, small grey ticks and a faint grid."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bbbbbb")
    axes.tick_params(labelsize=9, color="#bbbbbb", labelcolor=INK, length=3)
    axes.xaxis.label.set(fontsize=10, color=INK)
    axes.yaxis.label.set(fontsize=10, color=INK)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def smooth(values: FloatArray, span: int) -> FloatArray:
    """Exponential moving average over about `span` values, free of bias at the start; shape as given."""
    decay = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        result[index] = total / weight
    return result


def run_colors(count: int) -> list[str]:
    """One colour for each run; repeated beyond six."""
    return [COLORS[index % len(COLORS)] for index in range(count)]


def finite_points(points: Points) -> FloatArray:
    """Points as (n, 2) without NaN or infinity."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[np.isfinite(table).all(axis=1)]


def in_mib(count: float) -> str:
    """A byte count in MiB, three digits at least."""
    value = count / MIB
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_legend(axes: Axes, loc: str, skip: str = "") -> None:
    handles, labels = axes.get_legend_handles_labels()
    kept = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label != skip]
    legend = axes.legend(*zip(*kept, strict=True), loc=loc, fontsize=9, framealpha=0.9, edgecolor="none")
    legend.set_zorder(10)
