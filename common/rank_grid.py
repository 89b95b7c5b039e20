"""The heat map of ranks that all pictures share: one set of colours, one scale, one key.

The scale is fixed, so that a colour means the same rank in each picture, and neighbouring rungs differ equally.
Rank 0 is grey, and hatched where there is room. Colours suit colour-blind readers (viridis).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle

from .arrays import FloatArray, IntArray
from .drawing import FAINT, INK

ABSENT = -1
"""In place of a rank where there is no module."""
RUNGS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Ranks whose colours are equally far apart: the default ladder. Ranks above the last look like it."""
NO_ADAPTER = "#e9e9e9"
_GREY = int(NO_ADAPTER[1:3], 16) / 255


def rank_colors(ranks: IntArray | FloatArray) -> FloatArray:
    """RGB of ranks in an array, (..., 3): grey for 0, white where there is no module, else from light to dark."""
    place = np.interp(ranks, RUNGS, np.linspace(0, 1, len(RUNGS)))
    colors = colormaps["viridis_r"](0.04 + 0.93 * place)[..., :3]
    colors[ranks == 0] = _GREY
    colors[ranks == ABSENT] = 1.0
    return np.asarray(colors, dtype=np.float64)


def draw_cells(axes: Axes, ranks: IntArray | FloatArray, edges: Sequence[float], *, gap: float, hatched: bool) -> None:
    """Draw a cell for each rank, and white lines between the rows.

    Args:
        axes: get the limits of the grid, without spines and tick marks.
        ranks: ranks or means of ranks, (rows, columns), the first row at the bottom; `ABSENT` leaves a cell white.
        edges: where each column begins, and where the last one ends, (columns + 1,).
        gap: width of the lines, points; 0 for none.
        hatched: hatch the cells of rank 0.
    """
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


def write_rank(axes: Axes, rank: int, place: tuple[float, float], text: str = "", **style: Any) -> None:
    """Write a rank, or a text in its place, into its cell in a colour that can be read there.

    The place is in data coordinates; `style` overrides the usual style of the text.
    """
    brightness = float(rank_colors(np.array([rank]))[0] @ (0.299, 0.587, 0.114))
    color = FAINT if rank == 0 else "white" if brightness < 0.5 else INK
    usual: dict[str, Any] = {"va": "center_baseline", "fontsize": 8, "color": color, "zorder": 4}
    axes.annotate(text or str(rank), place, **(usual | style))


def draw_key(axes: Axes, rungs: Sequence[int]) -> None:
    """Draw the key: a swatch for each rank, the lowest at the bottom."""
    ranks = np.array(rungs, dtype=np.int64)[:, None]
    draw_cells(axes, ranks, (0, 1), gap=1.5, hatched=True)
    axes.yaxis.tick_right()
    axes.set_yticks(np.arange(len(rungs)) + 0.5, [str(rank) for rank in rungs])
    axes.set_xticks([])
    axes.set_title("rank", fontsize=9, color=FAINT, loc="left", y=1, pad=7)
