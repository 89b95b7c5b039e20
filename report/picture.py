"""The picture of a step's memory: by layer and kind, next to the memory of other choices.

It suits the 900 pixels of a README; colours (Okabe and Ito 2008) suit colour-blind readers, and the title states the
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..common import drawing
from ..common.arrays import FloatArray, IntArray
from ..common.text import byte_unit, format_bytes, layer_titles
from ..cost.breakdown import Breakdown, Kind
from ..cost.forecast.outlook import Outlook

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class KindShown(NamedTuple):
    """How one kind of bytes is shown: its colour, its label in a picture, and its name in a sentence."""

    color: str
    label: str
    words: str


KINDS_SHOWN: dict[Kind, KindShown] = {
    "saved": KindShown(drawing.COLORS[0], "saved for backward", "tensors saved for backward"),
    "inputs": KindShown(drawing.COLORS[5], "checkpointed inputs", "inputs of checkpointed layers"),
    "recomputed": KindShown(drawing.COLORS[3], "recomputed layer", "activations of the checkpointed layer in backward"),
    "transient": KindShown(drawing.COLORS[4], "temporary", "temporary: logits, gradients of activations"),
    "weights": KindShown("#004d38", "adapter weights", "adapter weights"),
    "gradients": KindShown(drawing.COLORS[2], "adapter gradients", "adapter gradients"),
    "optimizer": KindShown("#8fd3bd", "optimizer state", "optimizer state"),
    "signals": KindShown(drawing.COLORS[1], "signal buffers", "signal buffers"),
    "others": KindShown(drawing.FAINT, "other trainables", "other trainable parameters"),
}
"""The adapter itself is green."""

HELD_FOR_BACKWARD: tuple[Kind, ...] = ("saved", "inputs", "recomputed")

VISIBLE = 0.002
"""Smallest share of the peak for a kind to be named in the picture."""

RESERVED = "#c9ccd1"
"""Colour of the allocator's reserve beyond the tensors of a step, and of the prediction's margin."""

ALIKE = 0.005
"""Neighbouring layers whose bytes differ by less than this share of the largest are one bar."""


def memory_picture(outlook: Outlook, labels: Sequence[str], note: str) -> Figure:
    """Draw the bytes of the main choice by layer, stacked by kind, and below them the bytes of each choice.

    The line is the memory left by the frozen model and the context.

    Args:
        outlook: outlook of a step.
        labels: labels of its choices.
        note: the subject, in small type.
    """
    breakdowns = [outlook.breakdown(choice) for choice in outlook.choices]
    main = outlook.choices.index(outlook.main)
    shown, groups = breakdowns[main], _alike(breakdowns[main])
    heights = 0.55 + 0.21 * max(len(groups), 6), 0.65 + 0.21 * len(breakdowns)
    saved = sum(shown.of_kind(kind) for kind in HELD_FOR_BACKWARD)
    peak = f"a step peaks at {format_bytes(shown.total)}, {saved / shown.total:.0%} of it for backward"
    title = f"{labels[main][0].upper()}{labels[main][1:]}: {peak}"
    figure = drawing.new_figure(1.15 + sum(heights), title, note)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top = figure.add_subplot(grid[0])
    _draw_layers(top, shown, groups)
    bottom = figure.add_subplot(grid[1])
    room = _draw_choices(bottom, outlook, breakdowns, labels)
    visible = (kind for kind in KINDS_SHOWN if any(each.of_kind(kind) > VISIBLE * each.total for each in breakdowns))
    keys: list[Any] = [Patch(color=KINDS_SHOWN[kind].color, label=KINDS_SHOWN[kind].label) for kind in visible]
    keys += [Patch(color=RESERVED, label="allocator's reserve")]
    keys += [Line2D([], [], color=drawing.BUDGET_RED, label=room)]
    style: dict[str, Any] = {"frameon": False, "borderaxespad": 0, "handlelength": 1, "handleheight": 1}
    top.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9, **style)
    return figure


def _alike(breakdown: Breakdown) -> list[tuple[int, int]]:
    """Return the first and last of neighbouring layers with the same bytes, from the bottom."""
    groups: list[tuple[int, int]] = []
    most = ALIKE * breakdown.bytes.sum(axis=1).max()
    for layer, row in enumerate(breakdown.bytes):
        if groups and np.abs(row - breakdown.bytes[groups[-1][0]]).sum() <= most:
            groups[-1] = groups[-1][0], layer
        else:
            groups.append((layer, layer))
    return groups


def _draw_layers(axes: Axes, breakdown: Breakdown, groups: Sequence[tuple[int, int]]) -> None:
    unit, size = byte_unit(float(breakdown.bytes.sum(axis=1).max()))
    firsts, titles = [first for first, _ in groups], layer_titles(breakdown.layers)
    _stack(axes, np.arange(len(groups)), {kind: breakdown.by_layer(kind)[firsts] / size for kind in KINDS_SHOWN})
    _clean_bars(axes, len(groups), "By layer")
    names = []
    for first, last in groups:
        several = f"{titles[first].replace('layer ', 'layers ')} to {titles[last].removeprefix('layer ')}, each"
        names.append(titles[first] if first == last else several)
    axes.set_yticks(range(len(groups)), names)
    axes.set(xlabel=f"peak, {unit}")


def _draw_choices(axes: Axes, outlook: Outlook, breakdowns: Sequence[Breakdown], labels: Sequence[str]) -> str:
    """Draw bars of the choices, with figures in columns and a line; returns the line's name."""
    choices, limit = outlook.choices, outlook.card.memory_bytes
    held = choices[0].use.base_bytes + choices[0].use.context_bytes
    wholes = np.array([choice.use.total_bytes - held for choice in choices])
    largest = max(float(wholes.max()), limit - held)
    unit, size = byte_unit(largest)
    rows = np.arange(len(choices))[::-1]
    kinds = {kind: np.array([each.of_kind(kind) for each in breakdowns]) / size for kind in KINDS_SHOWN}
    ends = _stack(axes, rows, kinds)
    axes.barh(rows, wholes / size - ends, left=ends, color=RESERVED, height=0.78, linewidth=0)
    beside = f" on top of {format_bytes(held)} for the frozen model and context"
    _clean_bars(axes, len(rows), f"Memory of each choice{beside}", pad=18)
    columns = [("of rank 8", [f"{choice.step_bytes / outlook.reference_bytes:.0%}" for choice in choices])]
    columns += [("on card", [format_bytes(whole + held) for whole in wholes.tolist()])]
    columns += [("time", [f"{choice.time:.2f}" for choice in choices if choice.time is not None])]
    style: dict[str, Any] = {"fontsize": 8.5, "ha": "right", "va": "center", "transform": axes.get_yaxis_transform()}
    for (head, cells), place in zip(columns, (1.13, 1.32, 1.43), strict=True):
        for row, cell in zip((len(rows), *rows.tolist()), (head if cells else "", *cells), strict=False):
            axes.text(place, row, cell, color=drawing.FAINT if cell == head else drawing.INK, **style)
    axes.set_yticks(rows, labels)
    axes.set(xlim=(0, 1.03 * largest / size), xlabel=f"peak, {unit}")
    axes.axvline((limit - held) / size, color=drawing.BUDGET_RED, linewidth=1.6)
    return f"{outlook.card.name} leaves {format_bytes(limit - held)}"


def _stack(axes: Axes, rows: IntArray, sizes: Mapping[Kind, FloatArray]) -> FloatArray:
    """Draw one bar per row, with kinds side by side; returns the ends of the bars, (rows,)."""
    left = np.zeros(len(rows))
    for kind, widths in sizes.items():
        axes.barh(rows, widths, left=left, color=KINDS_SHOWN[kind].color, height=0.78, linewidth=0)
        left = left + widths
    return left


def _clean_bars(axes: Axes, rows: int, title: str, pad: float = 6) -> None:
    from matplotlib.ticker import MaxNLocator

    drawing.clean_axes(axes, title, pad)
    axes.set_ylim(-0.6, rows - 0.4)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#ececec", linewidth=0.8)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
