"""The picture of what a run's plans cost: predicted and measured, below the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ...common.arrays import FloatArray
from ...common.drawing import (
    BUDGET_RED,
    COLORS,
    FAINT,
    INK,
    Points,
    clean_axes,
    finite_points,
    mark_steps,
    new_figure,
)
from ...common.units import byte_unit, part_of, three_digits

FROM_ZERO = 0.4
"""The axis starts at zero if the lowest value is below this share of the highest."""


@dataclass(frozen=True, eq=False)
class _Costs:
    """What is drawn, in the unit of the axis.

    Attributes:
        measured: (step, cost) of each measured run.
        predicted: (step, cost of the plan from that step on).
        limits: (step, budget from that step on).
        unit: name of the unit.
        end: the last step.
    """

    measured: dict[str, FloatArray]
    predicted: FloatArray
    limits: FloatArray
    unit: str
    end: float

    @property
    def limit(self) -> float:
        """The last budget."""
        return float(self.limits[-1, 1])

    @property
    def axis(self) -> tuple[float, float]:
        """Where the axis begins and ends: near the data, the budget included."""
        costs = np.concatenate([points[:, 1] for points in (self.limits, self.predicted, *self.measured.values())])
        low, high = float(costs.min()), float(costs.max())
        pad = max(0.18 * (high - low), 0.0005 * high)
        return (0.0 if low < FROM_ZERO * high else low - pad), high + pad

    def errors(self) -> FloatArray:
        """(step, measured cost beside the predicted one in per cent) of the first run, (points, 2)."""
        points = next(iter(self.measured.values()), np.empty((0, 2)))
        points = points[points[:, 0] > self.predicted[0, 0]]
        return np.column_stack([points[:, 0], 100 * (points[:, 1] / in_force(self.predicted, points[:, 0]) - 1)])


def in_force(changes: FloatArray, steps: FloatArray) -> FloatArray:
    """What each of some steps was run under, (steps,).

    Args:
        changes: (step, value from that step on), by step. A change takes effect after its step.
        steps: numbers of steps, the first being 1. Before the first change its value counts.
    """
    rows = np.searchsorted(changes[:, 0], steps, side="left") - 1
    return np.asarray(changes[np.maximum(rows, 0), 1])


def cost_timeline(
    measured: Mapping[str, Points], limits: Points, predicted: Points = (), unit: str = "bytes", steps: int = 0
) -> Figure:
    """What plans cost below the hard budget, and in a thin panel how far the prediction was off.

    Args:
        measured: for each run (step, measured cost), such as the bytes at the peak of that step.
        limits: (step, budget from that step on), one at least.
        predicted: (step, cost) that each plan was predicted to take from that step on.
        unit: of all costs: "bytes" or "parameters".
        steps: where the run ends; by default at the last point.
    """
    costs = _costs(measured, limits, predicted, unit, steps)
    plan, name = costs.predicted, costs.unit
    errors, low = costs.errors() if len(plan) else np.empty((0, 2)), costs.axis[0]
    note = f"The axis starts at {three_digits(low)} {name}." if low else ""
    figure = new_figure(4.9 if len(errors) else 3.9, _title(costs, unit), note)
    grid = figure.add_gridspec(2 if len(errors) else 1, 1, height_ratios=(3.2, 1) if len(errors) else (1,))
    axes = clean_axes(figure.add_subplot(grid[0]))
    _draw_costs(axes, costs)
    axes.set_ylabel(f"peak of a step ({name})" if unit == "bytes" else unit)
    if len(errors):
        axes.tick_params(labelbottom=False)
        axes = clean_axes(figure.add_subplot(grid[1], sharex=axes))
        _draw_errors(axes, errors)
        mark_steps(axes, plan[:, 0].astype(int).tolist())
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def cost_sentence(
    measured: Mapping[str, Points], limits: Points, predicted: Points = (), unit: str = "bytes", steps: int = 0
) -> str:
    """Whether the first run keeps to the budget, and how near it comes; arguments as of `cost_timeline`."""
    return _title(_costs(measured, limits, predicted, unit, steps), unit)


def _costs(measured: Mapping[str, Points], limits: Points, predicted: Points, unit: str, steps: int) -> _Costs:
    name, size = byte_unit(limits[-1][1]) if unit == "bytes" else (unit, 1)
    scale = np.array([1, size])
    runs = {run: points / scale for run, given in measured.items() if len(points := finite_points(given))}
    plan = finite_points(predicted) / scale
    end = max([steps, *(points[-1, 0] for points in (*runs.values(), plan) if len(points))]) or 1
    return _Costs(runs, plan, finite_points(limits) / scale, name, end)


def _draw_costs(axes: Axes, costs: _Costs) -> None:
    """Draw predicted costs as steps, measured ones as points, and the headroom below the budget."""
    plan, (low, high) = costs.predicted, costs.axis
    if len(plan):
        steps, values = np.append(plan[:, 0], costs.end), np.append(plan[:, 1], plan[-1, 1])
        shade: dict[str, Any] = {"color": COLORS[0], "alpha": 0.09, "linewidth": 0, "label": "headroom"}
        tops = np.maximum(values, in_force(costs.limits, steps + 1))
        axes.fill_between(steps, values, tops, step="post", **shade)
        axes.plot(steps, values, drawstyle="steps-post", color=INK, linewidth=1.5, label="predicted", zorder=3)
        mark_steps(axes, plan[:, 0].astype(int).tolist())
    for color, (run, points) in zip(cycle(COLORS), costs.measured.items(), strict=False):
        dots: dict[str, Any] = {"color": color, "markersize": 5 if len(points) <= 60 else 3, "zorder": 4}
        axes.plot(*points.T, "o", alpha=0.8, label=f"{run}, measured", **dots)
    places = np.concatenate([[0], costs.limits[1:, 0], [costs.end]])
    limits = np.append(costs.limits[:, 1], costs.limit)
    axes.plot(places, limits, drawstyle="steps-post", color=BUDGET_RED, linewidth=2, zorder=2)
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
    text = f"budget {three_digits(costs.limit)} {costs.unit}"
    axes.annotate(text, (1, costs.limit), (-4, 4), color=BUDGET_RED, fontsize=9.5, **place)
    axes.set(xlim=(0, costs.end), ylim=(low, high))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 4, "borderaxespad": 0.2}
    axes.legend(**place, fontsize=9, edgecolor="none", handlelength=1.4, columnspacing=1.4)


def _draw_errors(axes: Axes, errors: FloatArray) -> None:
    """Draw how far each measured cost was from the predicted one."""
    worst = errors[int(np.argmax(np.abs(errors[:, 1]))), 1]
    title = f"Measured beside predicted: {worst:+.2g}% where they differ most"
    axes.set_title(title.replace("-", "−"), fontsize=10.5, color=INK, loc="left", pad=4)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.vlines(errors[:, 0], 0, errors[:, 1], color=COLORS[0], linewidth=1, alpha=0.5)
    axes.plot(*errors.T, "o", color=COLORS[0], markersize=4 if len(errors) <= 60 else 2.5, clip_on=False, zorder=4)
    reach = max(1.25 * abs(worst), 0.1)
    axes.set(ylim=(-reach, reach), ylabel="%")


def _title(costs: _Costs, unit: str) -> str:
    if not costs.measured:
        if not len(costs.predicted):
            return f"Budget of {three_digits(costs.limit)} {costs.unit}; nothing was measured"
        text, _ = _most(costs.predicted, 1, costs)
        what = "" if unit == "parameters" else "; nothing was measured"
        return f"Plans take at most {text}{what}"
    run, points = next(iter(costs.measured.items()))
    text, share = _most(points, 0, costs)
    if share > 1:
        over = int((points[:, 1] > in_force(costs.limits, points[:, 0])).sum())
        return f"{run} exceeds the budget at {over} of {len(points)} measured steps: {text}"
    percent = f"{min(share, 0.999):.1%}" if share > 0.99 else f"{share:.0%}"
    return f"{run} keeps to the budget at every measured step: at most {text} ({percent})"


def _most(points: FloatArray, later: int, costs: _Costs) -> tuple[str, float]:
    """The cost that took the largest share of the budget in force `later` steps on, and that share."""
    limits = in_force(costs.limits, points[:, 0] + later)
    most = int(np.argmax(points[:, 1] / limits))
    cost, limit = float(points[most, 1]), float(limits[most])
    if costs.unit == "parameters":
        return part_of(cost, limit, costs.unit), cost / limit
    return f"{three_digits(cost)} of {three_digits(limit)} {costs.unit}", cost / limit
