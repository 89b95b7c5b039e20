"""Pictures and text of an episode, for people who watch a policy at work.

`draw` gives one frame and `describe` the same in plain text. All frames have one size and the same colours, so that
they can be joined to a film. Colours suit colour-blind readers (Okabe and Ito 2008; viridis).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..common.arrays import FloatArray, IntArray
from ..common.drawing import COLORS, FAINT, INK, clean_axes, mark_steps
from ..common.module_names import kinds_in_layers
from ..common.rank_grid import ABSENT, draw_cells, draw_key, write_rank
from ..common.units import format_bytes
from ..lora.ladder import DEFAULT_RANKS

WIDTH, HEIGHT, DPI = 900, 600, 100
"""Pixels of a frame, and pixels per inch."""
BLUE, VERMILION, GREEN = COLORS[:3]
LONGEST_TITLE, LONGEST_KIND = 76, 16


@dataclass(frozen=True, eq=False)
class EpisodeTrace:
    """What an episode has done so far, for people.

    Attributes:
        title: id of the task.
        names: module names, such as "model.layers.0.self_attn.q_proj", (modules,).
        blocks: layer of each module, 0 at the bottom, int (modules,).
        total_steps: optimiser steps of the whole episode.
        steps: optimiser steps at which ranks were set, rising.
        ranks: ranks from each of those steps on, int (len(steps), modules).
        costs: cost of each of those plans, in `unit`, (len(steps),).
        limit: the budget, in `unit`.
        unit: "bytes" or "parameters".
        losses: (step at the end of an interval, mean training loss in it); may be empty or hold NaN.
        held_out_loss: at the end; None before it.
        uniform_loss: held-out loss at the end of the uniform run, for comparison, if known.
    """

    title: str
    names: tuple[str, ...]
    blocks: IntArray
    total_steps: int
    steps: tuple[int, ...]
    ranks: IntArray
    costs: tuple[float, ...]
    limit: float
    unit: str
    losses: tuple[tuple[int, float], ...]
    held_out_loss: float | None
    uniform_loss: float | None

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        if self.held_out_loss is not None:
            return self.total_steps
        return max((*self.steps[-1:], *(step for step, _ in self.losses[-1:])), default=0)

    @property
    def shares(self) -> FloatArray:
        """Cost of each plan as a percentage of the budget, (len(steps),)."""
        return 100 * np.asarray(self.costs, dtype=np.float64) / self.limit

    def plan(self, back: int = 0) -> IntArray:
        """The ranks now, or that many plans before; zeros before the first, (modules,)."""
        at = len(self.steps) - 1 - back
        return np.asarray(self.ranks[at]) if at >= 0 else np.zeros(len(self.names), dtype=np.int64)


def draw(trace: EpisodeTrace) -> NDArray[np.uint8]:
    """One frame: ranks now, training loss and budget use so far.

    Returns:
        RGB, uint8 (HEIGHT, WIDTH, 3).
    """
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    # A canvas by hand: pyplot would keep every figure and pick a window system.
    canvas = FigureCanvasAgg(figure)
    title = _literal(_shortened(trace.title))
    figure.text(0.02, 0.975, title, fontsize=12, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 0.93, _status(trace), fontsize=9.5, color=FAINT, va="top")
    ranks = figure.add_axes((0.085, 0.18, 0.37, 0.62))
    key = figure.add_axes((0.47, 0.18, 0.018, 0.62))
    loss = figure.add_axes((0.605, 0.51, 0.37, 0.29))
    budget = figure.add_axes((0.605, 0.09, 0.37, 0.29))
    _draw_ranks(ranks, _grid(trace, trace.plan()), _grid(trace, trace.plan(1)), moved=len(trace.steps) > 1)
    draw_key(key, DEFAULT_RANKS)
    _draw_loss(loss, trace)
    _draw_budget(budget, trace)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)  # type: ignore[no-untyped-call]
    return pixels[..., :3].copy()


def describe(trace: EpisodeTrace) -> str:
    """The same as text: title, where the episode stands, then the ranks of each layer from the top down."""
    grid = _grid(trace, trace.plan())
    number = max((len(str(layer)) for layer in grid.layers), default=0)
    width = max((len(str(rank)) for rank in grid.cells.flat), default=0)
    lines = [trace.title, _status(trace)]
    for layer, row in zip(reversed(grid.layers), grid.cells[::-1].tolist(), strict=True):
        cells = [
            " " * (len(kind) + 1 + width) if rank == ABSENT else f"{kind} {rank:>{width}}"
            for kind, rank in zip(grid.kinds, row, strict=True)
        ]
        lines.append("  ".join([f"layer {layer:>{number}} ", *cells]).rstrip())
    return "\n".join(lines)


def _status(trace: EpisodeTrace) -> str:
    """Where the episode stands, in one line."""
    parts = [f"step {trace.step} of {trace.total_steps}"]
    if trace.losses:
        parts.append(f"loss {trace.losses[-1][1]:.3f}")
    limit = format_bytes(trace.limit) if trace.unit == "bytes" else f"{trace.limit:,.0f} {trace.unit}"
    parts.append(f"{trace.shares[-1]:.1f} % of {limit}" if trace.costs else f"no plan yet for {limit}")
    if trace.held_out_loss is not None:
        uniform = "" if trace.uniform_loss is None else f" (uniform {trace.uniform_loss:.3f})"
        parts.append(f"held-out loss {trace.held_out_loss:.3f}{uniform}")
    return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Ranks by layer and kind.

    Attributes:
        layers: from the bottom up.
        kinds: short names of the columns, in the order of the modules.
        cells: int (layers, kinds); `ABSENT` where there is no such module.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: IntArray


def _grid(trace: EpisodeTrace, ranks: IntArray) -> _Grid:
    layers, rows = np.unique(np.asarray(trace.blocks, dtype=np.int64), return_inverse=True)
    labels = kinds_in_layers(trace.names, np.asarray(trace.blocks).tolist())
    kinds = tuple(dict.fromkeys(labels))
    cells = np.full((len(layers), len(kinds)), ABSENT, dtype=np.int64)
    cells[rows, [kinds.index(label) for label in labels]] = ranks
    return _Grid(tuple(layers.tolist()), kinds, cells)


def _shortened(title: str) -> str:
    """At most `LONGEST_TITLE` characters: the middle goes, as both ends tell tasks apart."""
    half = LONGEST_TITLE // 2
    return title if len(title) <= LONGEST_TITLE else f"{title[:half]}…{title[1 - half :]}"


def _literal(text: str) -> str:
    """The same text for matplotlib, which would read what stands between two dollars as a formula."""
    return text.replace("$", r"\$")


def _headline(axes: Axes, text: str) -> None:
    # A fixed height: to find a free one, matplotlib would lay out all ticks once more, a fifth of a frame's time.
    axes.set_title(text, fontsize=10.5, fontweight="bold", color=INK, loc="left", y=1, pad=22)


def _remark(axes: Axes, text: str) -> None:
    """A small line below a headline, above the panel."""
    axes.annotate(text, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8.5, color=FAINT)


def _draw_ranks(axes: Axes, now: _Grid, before: _Grid, *, moved: bool) -> None:
    """The heat map; `moved` if there was a plan before this one, so that arrows make sense."""
    rows, columns = now.cells.shape
    gap = 1.5 if max(rows, columns) <= 12 else 0.6
    numbered = rows <= 16 and columns <= 10
    draw_cells(axes, now.cells, range(columns + 1), gap=gap, hatched=numbered)
    axes.vlines(range(1, columns), 0, rows, color="white", linewidth=gap, zorder=2)
    if numbered:
        _write_ranks(axes, now.cells, now.cells - before.cells if moved else np.zeros_like(now.cells))
    every, skip = 1 + (rows - 1) // 32, 1 + (columns - 1) // 18
    axes.set_yticks(np.arange(0, rows, every) + 0.5, [str(layer) for layer in now.layers[::every]])
    # Names of modules differ at their ends.
    kinds = [kind if len(kind) <= LONGEST_KIND else f"…{kind[1 - LONGEST_KIND :]}" for kind in now.kinds[::skip]]
    turned: dict[str, Any] = {"rotation": 45, "fontsize": 8.5, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(0, columns, skip) + 0.5, map(_literal, kinds), **turned)
    axes.set_ylabel("layer", fontsize=9.5, color=INK)
    _headline(axes, "Rank of each module")
    _remark(axes, "arrows: changed by the last decision" if numbered and moved else "the network's output at the top")


def _write_ranks(axes: Axes, ranks: IntArray, changes: IntArray) -> None:
    """The rank in each cell, with an arrow up or down where it changed; both int (layers, kinds)."""
    size = 10 if ranks.shape[1] <= 7 else 8
    for row, column in np.argwhere(ranks != ABSENT).tolist():
        rank, arrow = int(ranks[row, column]), ("", " ↑", " ↓")[int(np.sign(changes[row, column]))]
        write_rank(axes, rank, (column + 0.5, row + 0.5), f"{rank}{arrow}", ha="center", fontsize=size)


def _prepare(axes: Axes, trace: EpisodeTrace) -> None:
    """Axes over the whole episode, a dotted line at each decision."""
    mark_steps(clean_axes(axes), trace.steps)
    axes.set_xlim(0, max(trace.total_steps, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_loss(axes: Axes, trace: EpisodeTrace) -> None:
    _prepare(axes, trace)
    points = np.asarray(trace.losses, dtype=np.float64).reshape(-1, 2)
    points[~np.isfinite(points)] = np.nan  # a gap in the line
    shown = points[~np.isnan(points[:, 1]), 1].tolist()
    if shown:
        axes.plot(*points.T, "o-", color=BLUE, markersize=5, linewidth=1.8, label="training", clip_on=False, zorder=3)
    if trace.uniform_loss is not None and math.isfinite(trace.uniform_loss):
        shown.append(trace.uniform_loss)
        axes.axhline(trace.uniform_loss, color=INK, linewidth=1.4, linestyle="--", label="uniform, held-out")
    if trace.held_out_loss is not None and math.isfinite(trace.held_out_loss):
        shown.append(trace.held_out_loss)
        style: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white", "clip_on": False, "zorder": 4}
        axes.plot([trace.total_steps], [trace.held_out_loss], "D", color=VERMILION, label="held-out", **style)
    _headline(axes, "Loss")
    if not shown:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no loss yet" if not trace.losses else "no finite loss", transform=axes.transAxes,
                  ha="center", va="center", fontsize=10, color=FAINT)  # fmt: skip
        return
    room = 0.12 * (max(shown) - min(shown)) or 0.05 * abs(shown[0]) or 1.0
    axes.set_ylim(min(shown) - room, max(shown) + room)
    _draw_legend(axes)


def _draw_budget(axes: Axes, trace: EpisodeTrace) -> None:
    _prepare(axes, trace)
    axes.axhline(100, color=VERMILION, linewidth=1.8, linestyle="--", label="budget", zorder=5)
    shares = trace.shares
    if len(shares):
        # The plan now holds until the next decision.
        steps, heights = [*trace.steps, trace.step], [*shares, shares[-1]]
        axes.fill_between(steps, heights, step="post", color=GREEN, alpha=0.15, linewidth=0)
        axes.plot(steps, heights, drawstyle="steps-post", color=GREEN, linewidth=2, label="ranks", zorder=3)
        axes.plot(trace.steps, shares, "o", color=GREEN, markersize=5, clip_on=False, zorder=4)
    axes.set_ylim(0, 1.12 * shares[np.isfinite(shares)].max(initial=100))
    axes.set_xlabel("training step", fontsize=9.5, color=INK)
    _headline(axes, "Budget used, %")
    _draw_legend(axes)


def _draw_legend(axes: Axes) -> None:
    """One row above the panel, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.985), ncols=3, fontsize=8.5, frameon=False, labelcolor=INK,
                handlelength=1.6, columnspacing=1.2, handletextpad=0.5, borderpad=0.2)  # fmt: skip
