"""Pictures of a fine-tune and of policy training; each function returns a matplotlib Figure.

Drawn with the object interface on the Agg canvas: no display, no global state. Sizes suit the 900 pixels of a README,
colours (Okabe and Ito 2008; viridis) are told apart by colour-blind readers, and titles say what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ..lora.memory import FloatArray
from .drawing import (
    COLORS,
    FAINT,
    INK,
    MIB,
    Points,
    clean_axes,
    draw_legend,
    finite_points,
    in_mib,
    new_figure,
    run_colors,
    save_figure,
    smooth,
)
from .heatmap import rank_heatmap

__all__ = ["learning_curve", "loss_curves", "memory_timeline", "rank_heatmap", "save_figure"]


def loss_curves(runs: Mapping[str, Mapping[str, Points]], decision_steps: Sequence[int] = ()) -> Figure:
    """Training loss, raw and smoothed, beside the held-out loss.

    Args:
        runs: for each run "train" and "eval", each a list of (step, loss); either may be empty.
        decision_steps: where ranks were moved, drawn as dotted lines.
    """
    curves = {
        run: {part: finite_points(points) for part, points in parts.items()} for run, parts in runs.items()
    }
    titles = {"train": "Training loss", "eval": "Held-out loss"}
    parts = [part for part in titles if any(len(curves[run].get(part, ())) for run in curves)] or ["train"]
    lasts = {run: curve["eval"][-1, 1] for run, curve in curves.items() if len(curve.get("eval", ()))}
    figure = new_figure(3.9, _loss_title(lasts), "Dotted lines: decisions." if len(decision_steps) else "")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, part in zip(panels, parts, strict=True):
        clean_axes(axes)
        _mark_steps(axes, decision_steps)
        ends = []
        for color, (run, curve) in zip(run_colors(len(curves)), curves.items(), strict=True):
            points = curve.get(part, np.empty((0, 2)))
            if len(points):
                ends.append((_draw_loss(axes, points, part, color, run), color))
        axes.set(xlabel="training step", ylabel="loss", xlim=(0, None))
        axes.set_title(titles[part], fontsize=10.5, color=INK, loc="left")
        _limit_loss(axes, [curve.get(part, np.empty((0, 2))) for curve in curves.values()])
        _label_ends(axes, ends)
    if len(curves) > 1 or len(parts) == 1:
        draw_legend(panels[0], loc="upper right")
    return figure


def memory_timeline(
    runs: Mapping[str, Points], limit_bytes: float, predicted: Points = (), *, limit_name: str = "budget"
) -> Figure:
    """Measured peak of each step below the hard budget.

    Args:
        runs: for each run its (step, peak bytes); the headroom of the first one is shaded.
        limit_bytes: the budget.
        predicted: (step, bytes) that the plans were predicted to take from that step on.
        limit_name: what the line is called.
    """
    curves = {run: points for run, given in runs.items() if len(points := finite_points(given))}
    end = max([points[-1, 0] for points in curves.values()], default=1.0)
    figure = new_figure(3.9, _memory_title(curves, limit_bytes))
    axes = clean_axes(figure.subplots())
    for index, (color, (run, points)) in enumerate(zip(run_colors(len(curves)), curves.items(), strict=True)):
        peaks = points[:, 1] / MIB
        axes.step(points[:, 0], peaks, where="post", color=color, linewidth=1.8, label=run, zorder=3)
        if index == 0:
            room = {"step": "post", "color": color, "alpha": 0.10, "linewidth": 0, "label": "headroom"}
            axes.fill_between(
                points[:, 0], peaks, limit_bytes / MIB, where=(peaks <= limit_bytes / MIB).tolist(), **room
            )
    plan = finite_points(predicted)
    if len(plan):
        steps, costs = np.append(plan[:, 0], max(end, plan[-1, 0])), np.append(plan[:, 1], plan[-1, 1]) / MIB
        axes.step(
            steps,
            costs,
            where="post",
            color=INK,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            label="predicted",
            zorder=4,
        )
        axes.plot(steps[:-1], costs[:-1], "o", color=INK, markersize=4, zorder=5)
    axes.axhline(limit_bytes / MIB, color="#b00020", linewidth=2, label="budget", zorder=2)
    highest = max([points[:, 1].max() for points in curves.values()] + [limit_bytes]) / MIB
    axes.set(
        xlabel="training step",
        ylabel="peak memory of training (MiB)",
        xlim=(0, end),
        ylim=(0, highest * 1.14),
    )
    text = f"{limit_name} {in_mib(limit_bytes)} MiB"
    axes.annotate(
        text,
        (end, limit_bytes / MIB),
        (-4, 4),
        textcoords="offset points",
        ha="right",
        color="#b00020",
        fontsize=9.5,
    )
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    draw_legend(axes, loc="lower right", skip="budget")
    return figure


def learning_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Episode returns over the iterations of policy training.

    Args:
        rows: dicts with iteration, episodes (so far), return_mean, return_p10, return_p90 and, now and then,
            validation (mean return on tasks that are not trained on).
    """
    keys = ("iteration", "return_mean", "return_p10", "return_p90")
    table = np.array([[float(row[key]) for key in keys] for row in rows]).reshape(-1, 4)
    checks = finite_points(
        [(row["iteration"], row["validation"]) for row in rows if row.get("validation") is not None]
    )
    figure = new_figure(4.0, _learning_title(table, checks))
    axes = clean_axes(figure.subplots())
    blue, orange = COLORS[:2]
    axes.fill_between(
        table[:, 0],
        table[:, 2],
        table[:, 3],
        color=blue,
        alpha=0.15,
        linewidth=0,
        label="10–90 % of episodes",
    )
    many = len(table) > 40
    axes.plot(table[:, 0], table[:, 1], color=blue, linewidth=1 if many else 2, alpha=0.35 if many else 1)
    line = smooth(table[:, 1], max(1, len(table) // 12)) if many else table[:, 1]
    axes.plot(
        table[:, 0], line, color=blue, linewidth=2, label="mean return" + (", smoothed" if many else "")
    )
    if len(checks):
        axes.plot(
            checks[:, 0],
            checks[:, 1],
            "o-",
            color=orange,
            markersize=5,
            linewidth=1.2,
            label="validation tasks",
        )
    if len(table) and table[:, 2].min() < 0 < table[:, 3].max():
        axes.axhline(0, color=FAINT, linewidth=0.8)
    episodes = f" ({rows[-1]['episodes']:,} episodes in all)" if rows and rows[-1].get("episodes") else ""
    axes.set(xlabel=f"PPO iteration{episodes}", ylabel="episode return")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_legend(axes, loc="lower right")
    return figure


def _mark_steps(axes: Axes, steps: Sequence[int]) -> None:
    for step in steps:
        axes.axvline(step, color="#bbbbbb", linewidth=1, linestyle=":", zorder=1)


def _draw_loss(axes: Axes, points: FloatArray, part: str, color: str, run: str) -> tuple[float, float]:
    """Draw one run and return the end of its line."""
    if part == "eval":
        axes.plot(points[:, 0], points[:, 1], "o-", color=color, markersize=4.5, linewidth=1.6, label=run)
        return points[-1, 0], points[-1, 1]
    line = smooth(points[:, 1], max(1, len(points) // 12))
    axes.plot(points[:, 0], points[:, 1], color=color, linewidth=0.8, alpha=0.25)
    axes.plot(points[:, 0], line, color=color, linewidth=2, label=f"{run} (smoothed)")
    return points[-1, 0], float(line[-1])


def _limit_loss(axes: Axes, curves: Sequence[FloatArray]) -> None:
    """Cut outliers off the loss axis, so that one spike does not flatten all curves."""
    values = np.concatenate([points[:, 1] for points in curves])
    if len(values) >= 20:
        low, high = np.percentile(values, (0.5, 99))
        axes.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low) or None)


def _label_ends(axes: Axes, ends: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write the last value right of each line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, previous = 0.065 * (high - low), -math.inf
    axes.set_xlim(0, axes.dataLim.x1 or 1.0)
    for (step, value), color in sorted(ends, key=lambda end: end[0][1]):
        previous = max(value, previous + gap)
        style = {
            "color": color,
            "fontsize": 9.5,
            "fontweight": "bold",
            "va": "center",
            "annotation_clip": False,
        }
        axes.annotate(f"{value:.3f}", (step, previous), (6, 0), textcoords="offset points", **style)


def _loss_title(lasts: Mapping[str, float]) -> str:
    """What the held-out losses say about the first run."""
    if not lasts:
        return "Training loss; nothing was held out"
    (run, value), *others = lasts.items()
    if not others:
        return f"{run} ends at a held-out loss of {value:.3f}"
    other, reference = others[0]
    change = (value - reference) / reference
    if abs(change) < 0.0005:
        return f"{run} and {other} end level at a held-out loss of {value:.3f}"
    word = "below" if change < 0 else "above"
    return (
        f"{run} ends {abs(change):.1%} {word} {other} on held-out data: {value:.3f} against {reference:.3f}"
    )


def _memory_title(curves: Mapping[str, FloatArray], limit: float) -> str:
    if not curves:
        return f"Budget of {in_mib(limit)} MiB; nothing was measured"
    run, points = next(iter(curves.items()))
    over = int((points[:, 1] > limit).sum())
    share = f"{in_mib(points[:, 1].max())} of {in_mib(limit)} MiB"
    if over:
        return f"{run} exceeds the budget at {over} of {len(points)} measured steps: {share}"
    return f"{run} keeps to the budget at every measured step: at most {share} ({points[:, 1].max() / limit:.0%})"


def _learning_title(table: FloatArray, checks: FloatArray) -> str:
    if len(table) < 2:
        return "Policy training"
    width = max(1, len(table) // 10)
    first, last = table[:width, 1].mean(), table[-width:, 1].mean()
    text = f"Mean return goes from {first:.3g} to {last:.3g} in {len(table)} iterations"
    return f"{text}; {checks[-1, 1]:.3g} on validation tasks" if len(checks) else text
