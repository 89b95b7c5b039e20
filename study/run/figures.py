"""The learning curve of a policy.

Drawn with the object interface on the Agg canvas: no display, no global state. Sizes suit the 900 pixels of a
README, colours (Okabe and Ito 2008; viridis) suit colour-blind readers, and titles state the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...common.arrays import FloatArray
from ...common.drawing import COLORS, FAINT, clean_axes, draw_legend, finite_points, new_figure, smooth


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


def _learning_title(rows: Sequence[Mapping[str, Any]], checks: FloatArray) -> str:
    """No claim about the trend of returns: each iteration draws other tasks, so they are not comparable."""
    if not len(checks):
        return f"Return over the rule in {len(rows)} iterations, each on newly drawn tasks"
    best = checks[int(np.argmax(checks[:, 1]))]
    where = f"after {best[0]:.0f} iterations" if best[0] else "before PPO"
    return f"Best on validation tasks {where}: {best[1]:+.1%} over the rule".replace("-", "−")
