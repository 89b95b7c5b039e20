"""Curves of a fine-tune's losses and of policy training; each function returns a matplotlib Figure.

Drawn with the object interface on the Agg canvas: no display, no global state. Sizes suit the 900 pixels of a
README, colours (Okabe and Ito 2008; viridis) suit colour-blind readers, and titles state the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...common.arrays import FloatArray
from ...common.drawing import (
    COLORS,
    FAINT,
    Points,
    clean_axes,
    draw_legend,
    finite_points,
    mark_steps,
    new_figure,
    smooth,
)

FEW_POINTS = 24
"""Training losses fewer than this are drawn as they are, with a mark each; more are smoothed."""


def loss_curves(runs: Mapping[str, Mapping[str, Points]], decision_steps: Sequence[int] = ()) -> Figure:
    """Training loss, raw and smoothed, beside the held-out loss.

    Args:
        runs: for each run "train" and "eval", each a list of (step, loss); either may be empty.
        decision_steps: where ranks were moved, drawn as dotted lines.
    """
    curves = {run: {part: finite_points(points) for part, points in parts.items()} for run, parts in runs.items()}
    titles = {"train": "Training loss", "eval": "Held-out loss"}
    parts = [part for part in titles if any(len(curves[run].get(part, ())) for run in curves)] or ["train"]
    lasts = {run: curve["eval"][-1, 1] for run, curve in curves.items() if len(curve.get("eval", ()))}
    end = max((points[-1, 0] for curve in curves.values() for points in curve.values() if len(points)), default=0) or 1
    figure = new_figure(3.9, loss_sentence(lasts), "Dotted lines: decisions." if len(decision_steps) else "")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, part in zip(panels, parts, strict=True):
        mark_steps(clean_axes(axes, titles[part]), decision_steps)
        ends, values = [], []
        for color, (run, curve) in zip(cycle(COLORS), curves.items(), strict=False):
            if len(points := curve.get(part, np.empty((0, 2)))):
                ends.append((_draw_loss(axes, points, part, color, run), color))
                values += points[:, 1].tolist()
        axes.set(xlabel="training step", ylabel="loss")
        if len(values) >= 20:  # one spike must not flatten all curves
            middle, usual = np.percentile(values, (50, 99))
            low, high = min(values), min(max(values), 2 * usual - middle)
            if high > low:
                axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_xlim(0, 1.02 * end)  # room for the last mark
        _label_ends(axes, ends)
    if len(curves) > 1 or len(parts) == 1:
        draw_legend(panels[0])
    return figure


def learning_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns of episodes over the iterations of policy training, and what the policy gains on validation tasks.

    Args:
        rows: progress of a training. That of iteration 0 holds validation_over_start and validation_over_uniform, if it
            was measured, and the same with warm_ in front after a warm start; later ones episodes, return_mean,
            return_p10 and return_p90 over the rule, and now and then those of validation.
    """
    checks = {}
    for name in ("over_start", "over_uniform"):  # the untrained policy first, the one after the warm start second
        keys = (f"validation_{name}", f"warm_validation_{name}")
        checks[name] = finite_points([(row["iteration"], row[key]) for row in rows for key in keys if key in row])
    returns = [row for row in rows if "return_mean" in row]
    note = "Gains are in shares of a task's headroom: what the best known allocation gains over uniform ranks."
    figure = new_figure(4.1, _learning_title(returns, checks["over_start"]), note)
    measured = len(checks["over_start"]) > 0
    panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    _draw_returns(clean_axes(panels[0], "Training, on new tasks each time"), returns)
    if measured:
        _draw_validation(clean_axes(panels[1], "Validation tasks"), checks)
    last = max((float(row["iteration"]) for row in rows), default=0) or 1.0
    for axes in panels:
        axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.margins(y=0.18)  # room for the legend
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_returns(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean and the spread of each iteration's episodes."""
    keys = ("iteration", "return_mean", "return_p10", "return_p90")
    iterations, means, low, high = np.array([[float(row[key]) for key in keys] for row in rows]).reshape(-1, 4).T
    blue = COLORS[0]
    axes.fill_between(iterations, low, high, color=blue, alpha=0.15, linewidth=0, label="10–90% of episodes")
    if len(rows) > 40:
        axes.plot(iterations, means, color=blue, linewidth=1, alpha=0.35)
        axes.plot(iterations, smooth(means, len(means) // 12), color=blue, linewidth=2, label="mean, smoothed")
    else:
        axes.plot(iterations, means, "o-", color=blue, linewidth=2, markersize=3, label="mean")
    episodes = sum(int(row.get("episodes", 0)) for row in rows)
    axes.set(xlabel="PPO iteration" + (f" ({episodes:,} episodes in all)" if episodes else ""))
    axes.set_ylabel("return: gain over the rule")
    draw_legend(axes)


def _draw_validation(axes: Axes, checks: Mapping[str, FloatArray]) -> None:
    """Draw what the policy gains on tasks that stay the same; on them alone iterations can be compared."""
    labels = "over the rule it starts from", "over uniform ranks"
    for points, color, label in zip(checks.values(), COLORS[1:3], labels, strict=True):
        if len(points):
            axes.plot(*points.T, "o-", color=color, markersize=5, linewidth=1.5, label=label)
    points = checks["over_start"]
    if len(points) > 1 and points[1, 0] == points[0, 0]:
        style: dict[str, Any] = {"textcoords": "offset points", "xytext": (2, 7), "fontsize": 9, "color": COLORS[1]}
        axes.annotate("warm start", points[1], **style)
    axes.set(xlabel="PPO iteration", ylabel="gain")
    draw_legend(axes)


def _draw_loss(axes: Axes, points: FloatArray, part: str, color: str, run: str) -> tuple[float, float]:
    """Draw one run and return the end of its line."""
    if part == "eval" or len(points) < FEW_POINTS:
        axes.plot(points[:, 0], points[:, 1], "o-", color=color, markersize=4.5, linewidth=1.6, label=run)
        return points[-1, 0], points[-1, 1]
    line = smooth(points[:, 1], max(1, len(points) // 12))
    axes.plot(points[:, 0], points[:, 1], color=color, linewidth=0.8, alpha=0.25)
    axes.plot(points[:, 0], line, color=color, linewidth=2, label=f"{run} (smoothed)")
    return points[-1, 0], float(line[-1])


def _label_ends(axes: Axes, ends: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write the last value right of each line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, previous = 0.065 * (high - low), -math.inf
    for (step, value), color in sorted(ends, key=lambda end: end[0][1]):
        previous = max(min(value, high), previous + gap)  # a spike may end above the axis
        style: dict[str, Any] = {
            "color": color,
            "fontsize": 9.5,
            "fontweight": "bold",
            "va": "center",
            "annotation_clip": False,
        }
        axes.annotate(f"{value:.3f}", (step, previous), (6, 0), textcoords="offset points", **style)


def loss_sentence(lasts: Mapping[str, float]) -> str:
    """What the held-out losses say about the first run."""
    if not lasts:
        return "Training loss; no held-out loss was measured"
    (run, value), *others = lasts.items()
    if not others:
        return f"{run} ends at a held-out loss of {value:.3f}"
    other, reference = others[0]
    change = (value - reference) / reference
    if abs(change) < 0.0005:
        return f"{run} and {other} end level at a held-out loss of {value:.3f}"
    word = "below" if change < 0 else "above"
    return f"{run} ends {abs(change):.1%} {word} {other} on held-out data: {value:.3f} against {reference:.3f}"


def _learning_title(rows: Sequence[Mapping[str, Any]], checks: FloatArray) -> str:
    """No claim about the trend of returns: each iteration draws other tasks, so they are not comparable."""
    if not len(checks):
        return f"Return over the rule in {len(rows)} iterations, each on newly drawn tasks"
    best = checks[int(np.argmax(checks[:, 1]))]
    where = f"after {best[0]:.0f} iterations" if best[0] else "before PPO"
    return f"Best on validation tasks {where}: {best[1]:+.1%} over the rule".replace("-", "−")
