"""Shared parts of all pictures: size, colors, titles, file output, and the heat map of ranks.

The color scale of the heat map is fixed, so a color means the same rank in every picture, with equal steps between
neighboring rungs. Rank 0 is gray, and hatched if there is room. Colors suit color-blind readers (viridis).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import FloatArray, IntArray
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


ABSENT = -1
"""Placeholder rank for a missing module."""
RUNGS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Ranks with equally spaced colors: the default ladder. Higher ranks use the last color."""
NO_ADAPTER = "#e9e9e9"
_GREY = int(NO_ADAPTER[1:3], 16) / 255
_VIRIDIS = "e5e419 addc30 75d054 46c06f 27ad81 1f998a 25848e 2d718e 375b8d 414287 482979 460b5e"
"""Color of each rung: matplotlib's viridis at 12 evenly spaced points from light to dark, without its ends."""
_CHANNELS = np.array([list(bytes.fromhex(color)) for color in _VIRIDIS.split()]).T / 255


def rank_colors(ranks: IntArray | FloatArray) -> FloatArray:
    """RGB of ranks in an array, (..., 3): gray for 0, white for a missing module, else from light to dark."""
    colors = np.stack([np.interp(ranks, RUNGS, channel) for channel in _CHANNELS], axis=-1)
    colors[ranks == 0] = _GREY
    colors[ranks == ABSENT] = 1.0
    return colors


def draw_cells(axes: Axes, ranks: IntArray | FloatArray, edges: Sequence[float], *, gap: float, hatched: bool) -> None:
    """Draw a cell for each rank, and white lines between the rows.

    Args:
        axes: their limits are set to the grid, without spines and tick marks.
        ranks: ranks or mean ranks, (rows, columns), the first row at the bottom; `ABSENT` leaves a cell white.
        edges: start of each column, and end of the last one, (columns + 1,).
        gap: width of the lines, points; 0 for none.
        hatched: hatch the cells of rank 0.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    rows = len(ranks)
    axes.pcolormesh(edges, np.arange(rows + 1), rank_colors(ranks), zorder=1)
    if hatched:
        cells = np.argwhere(ranks == 0).tolist()
        patches = [Rectangle((edges[column], row), edges[column + 1] - edges[column], 1) for row, column in cells]
        style: dict[str, Any] = {"facecolor": NO_ADAPTER, "edgecolor": "#d2d2d2", "hatch": "///", "linewidth": 0}
        axes.add_collection(PatchCollection(patches, **style, zorder=1.5), autolim=False)
    if gap:
        axes.hlines(range(1, rows), edges[0], edges[-1], color="white", linewidth=gap, zorder=2)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, rows))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)


def write_rank(axes: Axes, rank: int, place: tuple[float, float]) -> None:
    """Write a rank into its cell in a readable color, right of a place in data coordinates."""
    brightness = float(rank_colors(np.array([rank]))[0] @ (0.299, 0.587, 0.114))
    color = FAINT if rank == 0 else "white" if brightness < 0.5 else INK
    style: dict[str, Any] = {"ha": "left", "va": "center_baseline", "fontsize": 8, "color": color, "zorder": 4}
    axes.annotate(str(rank), place, xytext=(5, 0), textcoords="offset points", **style)


def draw_key(axes: Axes, rungs: Sequence[int]) -> None:
    """Draw the key: a swatch for each rank, the lowest at the bottom."""
    ranks = np.array(rungs, dtype=np.int64)[:, None]
    draw_cells(axes, ranks, (0, 1), gap=1.5, hatched=True)
    axes.yaxis.tick_right()
    axes.set_yticks(np.arange(len(rungs)) + 0.5, [str(rank) for rank in rungs])
    axes.set_xticks([])
    axes.set_title("rank", fontsize=9, color=FAINT, loc="left", y=1, pad=7)
