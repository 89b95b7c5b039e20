"""Pictures of all methods: loss against time, loss against bytes, performance profiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rankpilot.common.drawing import COLORS, FAINT, INK, clean_axes, new_figure, save_figure

from .numbers import REFERENCE, Comparison, Costs, Results, profile
from .saving import OURS, PEERS, PLAIN, TOLERANCE, Saving

GROUP_COLORS = dict(zip(("ours", "static", "adaptive", "search", "peer"), COLORS, strict=False))

PROFILED = ("simple", "all-linear-8-ckpt", "adalora-final", "top-down", "ours", "ours-recompute")
"""Methods whose profiles are drawn in colours; those of the others are grey."""

LABEL_WIDTH, LABEL_HEIGHT = 110, 13
"""Room of a name in a picture, in pixels."""


def draw_all(results: Results, versus: dict[str, Comparison], costs: dict[str, Costs], folder: Path) -> dict[str, Path]:
    """Write all pictures into a folder; returns them by name."""
    pictures = {
        "methods_time": ("Held-out loss against the time of a step", "time of a step, all-linear rank 8 = 1", _step),
        "methods_bytes": ("Held-out loss against bytes", "peak bytes, all-linear rank 8 = 1", _bytes),
    }
    paths = {}
    for name, (title, label, of) in pictures.items():
        paths[name] = _scatter(results, versus, costs, title, label, of, folder / f"{name}.png")
    paths["methods_profiles"] = _profiles(results, folder / "methods_profiles.png")
    return paths


def _step(costs: Costs) -> float:
    return costs.step


def _bytes(costs: Costs) -> float:
    return costs.bytes


def _scatter(
    results: Results,
    versus: dict[str, Comparison],
    costs: dict[str, Costs],
    title: str,
    label: str,
    of: Callable[[Costs], float],
    path: Path,
) -> Path:
    most = max((one.cells for one in versus.values()), default=0)
    note = f"means of {most} cells, hollow: of fewer; up: a lower loss than {REFERENCE}; 95 % intervals; no ablations"
    figure = new_figure(5.4, title, note)
    axes = clean_axes(figure.subplots())
    seen: set[str] = set()
    places: list[tuple[float, float, str]] = []
    for method in results.methods:
        ablation = method.group == "ours" and method.name not in PROFILED
        if method.name not in versus or ablation:
            continue
        gain, x, color = versus[method.name].mean, of(costs[method.name]), GROUP_COLORS[method.group]
        spread = [[gain.value - gain.low], [gain.high - gain.value]]
        axes.errorbar(
            x, gain.value, yerr=np.maximum(spread, 0), fmt="o", ms=5, lw=0.8, color=color,
            mfc=color if versus[method.name].cells == most else "white",
            label=None if method.group in seen else method.group,
        )  # fmt: skip
        places.append((x, gain.value, method.name))
        seen.add(method.group)
    axes.axhline(0, color=FAINT, lw=0.8, ls=":")
    axes.set_xlabel(label)
    axes.set_ylabel("gain in log loss")
    axes.margins(x=0.12)
    label_points(axes, places)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)


def label_points(axes: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Write the names of points beside them; where points are close, above or below, with a line to the point."""
    written: list[tuple[float, float]] = []
    bottom, top = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    for x, y, name in sorted(places, key=lambda place: place[1]):
        across, up = axes.transData.transform((x, y))

        def free(height: float, across: float = across) -> bool:
            beside = (level for other, level in written if abs(across - other) < LABEL_WIDTH)
            return bottom < height < top and all(abs(height - level) >= LABEL_HEIGHT for level in beside)

        heights = (up + sign * step for step in range(int(top - bottom)) for sign in (1, -1))
        height = next(filter(free, heights), up)
        written.append((across, height))
        shift = (height - up) * 72 / axes.figure.dpi
        line = {"arrowstyle": "-", "lw": 0.5, "color": FAINT} if abs(height - up) > LABEL_HEIGHT else None
        axes.annotate(
            name, (x, y), (6 if line is None else 12, shift - 2), textcoords="offset points", fontsize=7, color=INK,
            arrowprops=line,
        )  # fmt: skip


def _profiles(results: Results, path: Path) -> Path:
    figure = new_figure(
        4.4,
        "Performance profiles",
        "share of runs within a distance of the best method's loss, budgets that do not fit counted as never; "
        "methods of fewer cells left out",
    )
    left_out = Counter(name for name, _ in results.missing)
    axes = clean_axes(figure.subplots())
    points = np.linspace(0, 0.3, 61)
    colors = dict(zip(PROFILED, COLORS, strict=True))
    for method in sorted(results.methods, key=lambda m: m.name in PROFILED):
        ran = left_out[method.name] <= left_out[REFERENCE] and any(key[0] == method.name for key in results.found)
        if not ran:
            continue
        color = colors.get(method.name)
        style: dict[str, Any] = (
            {"color": color, "lw": 1.8, "label": method.name} if color else {"color": "#dddddd", "lw": 0.8}
        )
        axes.plot(100 * (np.exp(points) - 1), profile(results, method.name, points), **style)
    axes.set_xlabel("loss above the best, %")
    axes.set_ylabel("share of runs")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


AXES = (("time of a step", "step", "ours-saves-bytes"), ("bytes at the peak", "bytes", "ours-saves-time"))
"""What is over the horizontal axis: its label, where `Saving` has it, and the method that aims at the other one."""

WORDS = {
    PLAIN: "plain LoRA",
    "attention-8": "attention",
    "mlp-8": "MLPs",
    "top-three-quarters-8": "top ¾",
    "top-half-8": "top ½",
    "top-quarter-8": "top ¼",
    "every-other-layer-8": "every other layer",
    "attention-top-half-8": "attention, top ½",
    "mlp-top-half-8": "MLPs, top ½",
    "attention-2": "attention, rank 2",
    "mlp-2": "MLPs, rank 2",
    "top-half-2": "top ½, rank 2",
    "everything-2": "rank 2",
    **PEERS,
    "ours-saves-time": "rankpilot",
    "ours-saves-bytes": "rankpilot",
}
"""What the methods are called in the picture; where no rank is named, it is 8."""


def draw_savings(found: Mapping[str, Saving], path: Path) -> Path:
    """Write the picture.

    Args:
        found: what each plan saves, by the name of its method.
        path: of the file.
    """
    most = max(one.cells for one in found.values())
    figure = new_figure(
        4.6,
        "What plans save and lose beside plain LoRA, rank 8 on all modules",
        f"mean of {most} fine-tunes of small models, hollow: of fewer; 95 % intervals; grey: within {TOLERANCE:.0%}",
    )
    panels = [clean_axes(axes) for axes in figure.subplots(1, 2, sharey=True)]
    places: list[list[tuple[float, float, str]]] = [[(1.0, 0.0, WORDS[PLAIN])] for _ in panels]
    for axes, place, (label, part, other) in zip(panels, places, AXES, strict=True):
        axes.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color=FAINT, alpha=0.15, lw=0)
        axes.plot(1, 0, "s", ms=5, color=INK)
        for name, one in found.items():
            if name == other:
                continue
            x, y = getattr(one, part).value, 100 * one.loss.value
            spread = [[y - 100 * one.loss.low], [100 * one.loss.high - y]]
            color = COLORS[0 if name in OURS else 2 if name in PEERS else 1]
            axes.errorbar(x, y, yerr=np.maximum(spread, 0), fmt="none", lw=0.7, color=color, alpha=0.5)
            axes.plot(x, y, "o", ms=5, color=color, mfc=color if one.cells == most else "white")
            place.append((x, y, WORDS[name]))
        axes.set_xlabel(f"{label}, plain LoRA = 1")
        axes.margins(x=0.15)
    panels[0].set_ylabel("log loss, % higher")
    figure.draw_without_rendering()  # from here on places in pixels are those of the picture
    for axes, place in zip(panels, places, strict=True):
        label_points(axes, place)
    return save_figure(figure, path)
