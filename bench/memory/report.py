"""The memory benchmark as tables and flat figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console

from ...common.statistics import Estimate
from ...common.tables import make_table
from ...common.units import format_bytes
from ..harness import Figures, estimate_figures
from .accuracy import Errors
from .settings import Setting

KINDS = {"saved": "Saved for backward", "peak": "Peak of a step"}
BARS = {"saved": "Bars: 0.5, 2, 4, -4", "peak": "Bars: 0.5, 3, 4, -4"}
"""The largest errors that are allowed: median and 95th percentile of their size, the worst over and under, in %."""

GROUPS: tuple[Callable[[Setting, Mapping[str, Any]], str], ...] = (
    lambda setting, plan: f"{setting.family}, {setting.checkpointing}",
    lambda setting, plan: f"all, {setting.precision}",
    lambda setting, plan: "calibrated shape" if plan["calibrated"] else "other shapes",
    lambda setting, plan: "no checkpointing" if setting.checkpointing == "none" else "checkpointing",
)
"""Titles of the lines that a plan counts in."""


def accuracy(results: Mapping[Setting, Mapping[str, Any]], console: Console) -> Figures:
    """Print the errors of random plans by setting, shape and precision; returns the figures."""
    groups: dict[str, list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
    for title_of in GROUPS:
        for setting, result in results.items():
            for plan in result["plans"]:
                groups[title_of(setting, plan)].append((plan, result["calibration_steps"]))
    figures: Figures = {"accuracy.plans": sum(len(result["plans"]) for result in results.values())}
    for kind, what in KINDS.items():
        rows = []
        for title, plans in groups.items():
            pairs = [plan[kind] for plan, _ in plans if plan[kind]]
            errors = Errors.of(pairs)
            if errors is None:
                continue
            steps = float(np.median([steps for _, steps in plans]))
            sizes = (f"{100 * size:.3f}" for size in (errors.median, errors.high))
            worst = (f"{100 * error:+.3f}" for error in (errors.over, errors.under))
            rows.append((title, str(len(pairs)), *sizes, *worst, f"{steps:.1f}"))
            prefix = f"accuracy.{title.replace(', ', '.').replace(' ', '_')}"
            figures[f"{prefix}.calibration_steps"] = steps
            figures |= {f"{prefix}.{kind}_error_{name}": value for name, value in vars(errors).items()}
        columns = ("model, checkpointing", "plans", "median", "95th", "over", "under", "calibr.")
        console.print(make_table(f"{what}, predicted over measured - 1, in %. {BARS[kind]}", columns, rows))
    console.print("calibr.: time of the calibration, in training steps", highlight=False)
    return figures


def guard(results: Mapping[str, Mapping[str, Any]], console: Console) -> Figures:
    """Print what the system reports of single steps, and what the guard costs; returns the figures."""
    figures: Figures = {}
    for family, result in results.items():
        seen = result.get("outside") or {}
        if seen:
            names = [name for name in next(iter(seen.values())) if name != "predicted"]
            rows = []
            for plan, sizes in seen.items():
                predicted = sizes["predicted"]
                beside = (f"{format_bytes(sizes[name])} ({sizes[name] / predicted - 1:+.1%})" for name in names)
                rows.append((plan, format_bytes(predicted), *beside))
            titles = [name.replace("resident_given_back", "resident, freed\nheap returned") for name in names]
            console.print(make_table(f"{family}, one step from outside", ("plan", "predicted", *titles), rows))
            figures |= {f"outside.{family}.{p}.{n}": v for p, sizes in seen.items() for n, v in sizes.items()}
        ratio, share = Estimate(*result["guard"]["step_ratio"]), result["guard"]["look_share"]
        console.print(
            f"{family}: a measured step takes {ratio:.3f} of a plain one; other steps carry the look at the batch, "
            f"{share:.3%} of a step.",
            highlight=False,
        )
        figures |= estimate_figures(f"guard.{family}.step_ratio", ratio) | {f"guard.{family}.look_share": share}
    return figures
