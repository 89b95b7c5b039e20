"""Shared parts of all pictures: size, colors, titles and file output.

All pictures use the object interface on the Agg canvas: no display, no global state. Sizes suit the 900 pixels of a
README, colors (Okabe and Ito 2008) suit color-blind readers, and titles state the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import FloatArray
from .errors import naming_extras
from .files import atomic_path

if TYPE_CHECKING:  # a run and its page need rank colors from here, without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

WIDTH = 9.0
"""Inches; 1350 pixels at `DPI`, shown at 900."""
DPI = 150
INK, FAINT, RULE = "#333333", "#767676", "#bbbbbb"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BUDGET_RED = "#b00020"
"""Color of the budget line."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG atomically, and return the path; equal figures give equal bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", facecolor="white", metadata={"Software": None})
    return path


def new_figure(height: float, title: str, note: str = "") -> Figure:
    """Create an empty figure with a title and automatic layout.

    Args:
        height: inches, title included.
        title: the finding, one line; in smaller type if it is long.
        note: how to read the picture, in small gray type; smaller if it is long.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    with naming_extras():
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

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
    """Keep the left and bottom spine, small gray ticks and a faint grid; add a title, `pad` points above."""
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


def finite_points(points: Points) -> FloatArray:
    """Points as (n, 2) without NaN or infinity."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[np.isfinite(table).all(axis=1)]
