"""The memory benchmark as tables and flat figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from ...common.statistics import Estimate
from ...common.units import format_bytes
from ..harness import Figures, estimate_figures, make_table
from .accuracy import Errors
from .settings import Setting

Results = Mapping[Setting, Mapping[str, Any]]
Chosen = Callable[[Setting, Mapping[str, Any]], bool]

KINDS = {"saved": "Saved for backward", "peak": "Peak of a step"}
BARS = {"saved": "Bars: 0.5, 2, 4, -4", "peak": "Bars: 0.5, 3, 4, -4"}
"""The largest errors that are allowed: median and 95th percentile of their size, the worst over and under, in %."""


def accuracy(results: Results, console: Console) -> Figures:
    """Print the errors of random plans by setting, shape and precision; returns the figures."""
    figures: Figures = {"accuracy.plans": sum(len(result["plans"]) for result in results.values())}
    for kind, what in KINDS.items():
        rows = []
        for title, chosen in _lines(results):
            count, errors = _errors(results, chosen, kind)
            if errors is None:
                continue
            steps = float(np.median([r["calibration_steps"] for s, r in results.items() if _any(chosen, s, r)]))
            rows.append((title, str(count), *_cells(errors), f"{steps:.1f}"))
            prefix = f"accuracy.{title.replace(', ', '.').replace(' ', '_')}"
            figures[f"{prefix}.calibration_steps"] = steps
            figures |= {f"{prefix}.{kind}_error_{name}": value for name, value in vars(errors).items()}
        columns = ("model, checkpointing", "plans", "median", "95th", "over", "under", "calibr.")
        console.print(make_table(f"{what}, predicted over measured - 1, in %. {BARS[kind]}", columns, rows))
    console.print("calibr.: time of the calibration, in training steps", highlight=False)
    return figures


def _is(setting: Setting, plan: Mapping[str, Any], **wanted: str) -> bool:
    """Whether a setting has these fields."""
    return all(getattr(setting, name) == value for name, value in wanted.items())


def _lines(results: Results) -> Iterable[tuple[str, Chosen]]:
    """Titles of rows, and the plans of each."""
    for family, checkpointing in dict.fromkeys((setting.family, setting.checkpointing) for setting in results):
        yield f"{family}, {checkpointing}", partial(_is, family=family, checkpointing=checkpointing)
    for precision in dict.fromkeys(setting.precision for setting in results):
        yield f"all, {precision}", partial(_is, precision=precision)
    yield "calibrated shape", lambda setting, plan: bool(plan["calibrated"])
    yield "other shapes", lambda setting, plan: not plan["calibrated"]
    yield "no checkpointing", lambda setting, plan: setting.checkpointing == "none"
    yield "checkpointing", lambda setting, plan: setting.checkpointing != "none"


def _any(chosen: Chosen, setting: Setting, result: Mapping[str, Any]) -> bool:
    return any(chosen(setting, plan) for plan in result["plans"])


def _errors(results: Results, chosen: Chosen, kind: str) -> tuple[int, Errors | None]:
    """Number of plans that were measured, and their errors."""
    plans = [plan for setting, result in results.items() for plan in result["plans"] if chosen(setting, plan)]
    pairs = [plan[kind] for plan in plans if plan[kind]]
    return len(pairs), Errors.of(pairs)


def _cells(errors: Errors) -> tuple[str, ...]:
    sizes = f"{100 * errors.median:.3f}", f"{100 * errors.high:.3f}"
    return *sizes, f"{100 * errors.over:+.3f}", f"{100 * errors.under:+.3f}"


def guard(results: Mapping[str, Mapping[str, Any]], console: Console) -> Figures:
    """Print what the system reports of single steps, and what the guard costs; returns the figures."""
    figures: Figures = {}
    for family, result in results.items():
        seen = result.get("outside") or {}
        if seen:
            names = [name for name in next(iter(seen.values())) if name != "predicted"]
            rows = [(plan, *_beside(sizes, names)) for plan, sizes in seen.items()]
            console.print(make_table(f"{family}, one step from outside", ("plan", "predicted", *_titles(names)), rows))
            figures |= {f"outside.{family}.{p}.{n}": v for p, sizes in seen.items() for n, v in sizes.items()}
        ratio, share = Estimate(*result["guard"]["step_ratio"]), result["guard"]["look_share"]
        console.print(
            f"{family}: a measured step takes {ratio:.3f} of a plain one; other steps carry the look at the batch, "
            f"{share:.3%} of a step.",
            highlight=False,
        )
        figures |= estimate_figures(f"guard.{family}.step_ratio", ratio) | {f"guard.{family}.look_share": share}
    return figures


def _beside(sizes: Mapping[str, float], names: Iterable[str]) -> list[str]:
    predicted = sizes["predicted"]
    return [format_bytes(predicted), *(f"{format_bytes(sizes[n])} ({sizes[n] / predicted - 1:+.1%})" for n in names)]


def _titles(names: Iterable[str]) -> list[str]:
    return [name.replace("resident_given_back", "resident, freed heap returned") for name in names]
