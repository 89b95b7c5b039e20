"""The picture of the memory benchmark: what loss and what speed a plan buys with its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..study.drawing import COLORS, clean_axes, new_figure
from .pareto import Point
from .plans import REFERENCE

MARKS = ("o", "s", "D", "^", "v")


def pareto_figure(points: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """One row of panels for each task: held-out loss and step time over bytes.

    Args:
        points: of each task, by its title.
        title: the finding.
    """
    note = "Bytes and step time as shares of all-linear rank 8; bars are 95 % intervals of the paired difference"
    figure = new_figure(0.6 + 3.1 * len(points), title, note)
    axes = figure.subplots(len(points), 2, squeeze=False)
    for row, (task, measured) in zip(axes, points.items(), strict=True):
        _losses(clean_axes(row[0]), measured, task)
        _times(clean_axes(row[1]), measured)
    handles, labels = axes[0][1].get_legend_handles_labels()
    axes[0][1].legend(handles, labels, fontsize=8, frameon=False, loc="lower right")
    return figure


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.plan.group, []).append(point)
    return groups


def _losses(axes: Axes, points: Sequence[Point], task: str) -> None:
    reference = next(point.loss for point in points if point.plan.name == REFERENCE)
    for index, (group, members) in enumerate(_groups(points).items()):
        for point in sorted((p for p in members if p.difference), key=lambda p: p.share):
            spread = point.difference
            assert spread is not None
            bar = [[spread.value - spread.low], [spread.high - spread.value]]
            label = group if point is members[0] else None
            axes.errorbar(
                point.share, spread.value, bar, fmt=MARKS[index], color=COLORS[index], ms=5, lw=1, label=label
            )
    axes.axhline(0, color="#8a8a8a", lw=0.8, zorder=0)
    axes.set_title(f"{task}: all-linear rank 8 reaches {reference:.3f} nats", fontsize=9, loc="left")
    axes.set_ylabel("held-out loss, difference (nats)", fontsize=8)
    axes.set_xlabel("peak bytes", fontsize=8)


def _times(axes: Axes, points: Sequence[Point]) -> None:
    for index, (group, members) in enumerate(_groups(points).items()):
        shares, ratios = [p.share for p in members], [p.step_ratio.value for p in members]
        axes.plot(shares, ratios, MARKS[index], color=COLORS[index], ms=5, label=group)
    axes.set_ylabel("time of a step", fontsize=8)
    axes.set_xlabel("peak bytes", fontsize=8)
