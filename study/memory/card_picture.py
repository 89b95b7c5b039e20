"""The picture of what fits a card: the bytes that recomputation saves, and the time that it costs."""

from __future__ import annotations

from matplotlib.figure import Figure

from ...common.drawing import BUDGET_RED, COLORS, INK, clean_axes, new_figure
from ...common.units import byte_unit, format_bytes
from ...memory.outlook import Outlook


def card_picture(outlook: Outlook) -> Figure:
    """Draw a line for each depth, from all its layers running again to none, with the card's memory beside them."""
    name = outlook.card.name
    memory = "" if outlook.card.rates is None else f" ({format_bytes(outlook.card.memory_bytes)})"
    title = f"What the next GiB buys on {name}{memory}, at rank {outlook.rank}"
    note = "From left to right fewer layers run again in the backward pass; left of the red line it fits."
    figure = new_figure(4.6, title, note)
    axes = clean_axes(figure.add_subplot())
    unit, size = byte_unit(outlook.card.memory_bytes)
    for layers, color in zip(outlook.depths, COLORS, strict=False):
        points = outlook.trade(layers)
        label = f"adapters in {f'all {layers}' if layers == outlook.blocks else f'the top {layers}'} layers"
        x, y = [used / size for _, used, _ in points], [time for *_, time in points]
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.5, color=color, label=label)
        for end in (0, -1):
            text = f"{points[end][0]} again"
            axes.annotate(text, (x[end], y[end]), xytext=(0, 6), textcoords="offset points", fontsize=8, color=INK)
    axes.axvline(outlook.card.memory_bytes / size, color=BUDGET_RED, linewidth=1.2)
    axes.set_xlabel(f"{unit} on the card")
    axes.set_ylabel("time of a step / plain LoRA's")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
