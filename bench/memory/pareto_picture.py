"""The picture of the comparison: held-out loss and step time against bytes at the peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from ...common.drawing import COLORS, DPI, FAINT, INK, clean_axes, new_figure
from ...common.files import atomic_path
from ..harness import Estimate
from .pareto import Outcome
from .plans import REFERENCE, REQUIRED

STYLES: dict[str, dict[str, Any]] = {
    "all-linear": {"color": FAINT, "marker": "s"},
    "top layers, rank 8": {"color": COLORS[5], "marker": "v"},
    "top layers, rank 16": {"color": COLORS[0], "marker": "^"},
    "rule16": {"color": COLORS[4], "marker": "D"},
    "fracrule": {"color": COLORS[1], "marker": "o"},
}
PALETTE = 64
"""Colours in the file: half the bytes, and no difference to see."""


def pareto_picture(tasks: Mapping[str, Mapping[str, Outcome]]) -> Figure:
    """A row for each fine-tune: loss against bytes, step time against bytes.

    Args:
        tasks: outcomes by plan, by title.
    """
    note = (
        "Relative to all-linear rank 8 (dotted). Along a line, ranks or layers or bytes grow. Bars: 95 % bootstrap "
        f"intervals. Filled: {REQUIRED}."
    )
    figure = new_figure(0.9 + 2.6 * len(tasks), _title(list(tasks.values())), note)
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), (title, outcomes) in zip(panels, tasks.items(), strict=True):
        reference = outcomes[REFERENCE]
        _draw(left, outcomes, {name: o.loss_difference(reference) for name, o in outcomes.items()}, base=0)
        _draw(right, outcomes, {name: o.step_ratio(reference) for name, o in outcomes.items()}, base=1)
        left.set_ylabel("loss - rank 8's (nats)")
        right.set_ylabel("step time / rank 8's")
        left.set_title(title, fontsize=10.5, color=INK, loc="left")
        for axes in (left, right):
            axes.set_xlabel("bytes at the peak, measured")
    shown = {name: mark for axes in panels.flat for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [name for name in STYLES if name in shown]
    marks = [shown[name] for name in order]
    figure.legend(marks, order, loc="outside lower center", ncols=len(order), fontsize=9, frameon=False)
    return figure


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG with a small palette, in one step."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png", facecolor="white")
    small = Image.open(drawn).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        small.save(temporary, format="png", optimize=True)


def _title(tasks: Sequence[Mapping[str, Outcome]]) -> str:
    ratios = [outcomes[REQUIRED].step_ratio(outcomes[REFERENCE]).value for outcomes in tasks]
    differences = [outcomes[REQUIRED].loss_difference(outcomes[REFERENCE]).value for outcomes in tasks]
    times = " and ".join(f"{ratio:.0%}" for ratio in ratios)
    losses = " and ".join(f"{difference:+.3f}" for difference in differences)
    return f"At 65% of all-linear rank 8's bytes, fracrule's step takes {times} of its time; loss {losses} nats"


def _draw(axes: Axes, outcomes: Mapping[str, Outcome], estimates: Mapping[str, Estimate], base: float) -> None:
    clean_axes(axes)
    whole = outcomes[REFERENCE].measured_bytes
    axes.axhline(base, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    for group, style in STYLES.items():
        names = [name for name, outcome in outcomes.items() if outcome.plan.group == group]
        if not names:
            continue
        shares = np.array([outcomes[name].measured_bytes / whole for name in names])
        values = np.array([estimates[name].value for name in names])
        bars = np.array([[e.value - e.low, e.high - e.value] for e in (estimates[name] for name in names)]).T
        looks: dict[str, Any] = style | {"linewidth": 1.3, "markersize": 6, "markerfacecolor": "white"}
        axes.errorbar(shares, values, np.maximum(bars, 0), label=group, elinewidth=0.8, capsize=0, **looks)
        if REQUIRED in names:
            index = names.index(REQUIRED)
            axes.plot(shares[index], values[index], style["marker"], color=style["color"], markersize=9, zorder=5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(x=0.05, y=0.08)
