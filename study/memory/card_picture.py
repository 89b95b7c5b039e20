"""The picture of what fits a card: bytes on the card over the time of a step, for every choice."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...common.drawing import BUDGET_RED, COLORS, FAINT, INK, clean_axes, new_figure
from ...common.units import byte_unit
from ...memory.outlook import Choice, Outlook


def card_picture(outlook: Outlook) -> Figure:
    """Draw each choice as a point, with the card's memory as a line; joined are the points that no other one beats."""
    title = f"Bytes and time of a step on {outlook.card.name}"
    note = "Each point is one choice; left of the red line it fits. Joined: none takes fewer bytes and less time."
    figure = new_figure(4.6, title, note)
    axes = clean_axes(figure.add_subplot())
    unit, size = byte_unit(outlook.card.memory_bytes)
    points = [(choice.use.total_bytes / size, _time(outlook, choice), choice) for choice in outlook.choices]
    for layers, color in zip(dict.fromkeys(choice.layers for choice in outlook.choices), COLORS, strict=False):
        own = [(x, y) for x, y, choice in points if choice.layers == layers]
        label = "all layers" if layers == outlook.blocks else f"top {layers} layers"
        axes.scatter(*zip(*own, strict=True), s=36, color=color, label=label, zorder=3)
    frontier = _frontier([(x, y) for x, y, _ in points])
    axes.plot(*zip(*frontier, strict=True), color=FAINT, linewidth=1, zorder=2)
    axes.axvline(outlook.card.memory_bytes / size, color=BUDGET_RED, linewidth=1.2)
    for x, y, choice in points:
        text = f"r{choice.rank}, {len(choice.recomputed)} again"
        axes.annotate(text, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7.5, color=INK)
    axes.set_xlabel(f"{unit} on the card")
    axes.set_ylabel("time of a step / plain LoRA's" if _timed(outlook) else "layers that run again")
    _legend(axes)
    return figure


def _timed(outlook: Outlook) -> bool:
    return all(choice.time is not None for choice in outlook.choices)


def _time(outlook: Outlook, choice: Choice) -> float:
    """The height of a choice: its time, or the layers that run again where times are not known."""
    return choice.time if _timed(outlook) and choice.time is not None else float(len(choice.recomputed))


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, loc="best")
