"""The picture of what plans save and lose: loss over the time of a step and over bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ....common.drawing import COLORS, FAINT, INK, clean_axes, new_figure, save_figure
from .pictures import label_points
from .saving import OURS, PEERS, PLAIN, TOLERANCE, Saving

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
