"""The comparison of plans as a table, as lines about what is required, and as flat figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from ...common.drawing import MIB
from ...memory.budget import format_bytes
from ..harness import Estimate, Figures, make_table
from .pareto import Course, Outcome
from .plans import REFERENCE, REQUIRED

FASTER = 0.8
"""What a step of `REQUIRED` may take of `REFERENCE`'s."""


def table_of(course: Course, outcomes: Mapping[str, Outcome]) -> Table:
    """One fine-tune's plans for people."""
    columns = ("plan", "MiB predicted", "measured", "share", "a step", "loss", "minus rank 8's")
    reference, rows = outcomes[REFERENCE], []
    for name, outcome in outcomes.items():
        other = outcome is not reference
        rows.append(
            (
                name,
                f"{outcome.plan.predicted_bytes / MIB:.2f}",
                f"{outcome.measured_bytes / MIB:.2f}",
                f"{outcome.measured_bytes / reference.measured_bytes:.1%}",
                str(outcome.step_ratio(reference)) if other else f"{1e3 * np.median(reference.seconds):.0f} ms",
                f"{np.mean([outcome.losses[seed] for seed in range(course.seeds)]):.4f}",
                _signed(outcome.loss_difference(reference)) if other else "",
            )
        )
    title = (
        f"{course.task.title}: {course.task.steps} steps, {course.seeds} paired seeds ({course.more_seeds} for "
        f"{REQUIRED}). Share and time of a step are of rank 8's."
    )
    return make_table(title, columns, rows)


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def requirement(course: Course, outcomes: Mapping[str, Outcome], *, quick: bool) -> str:
    """What `REQUIRED` must show: it fits, its step is shorter; and its loss. A quick run tells the first only."""
    required, reference = outcomes[REQUIRED], outcomes[REFERENCE]
    limit = (required.plan.budget or 0) * reference.plan.predicted_bytes
    fits = "fits" if required.measured_bytes <= limit else "DOES NOT FIT"
    ratio, difference = required.step_ratio(reference), required.loss_difference(reference)
    if quick:
        faster = "whether it is 20 % shorter is not for a quick run"
    elif ratio.high <= FASTER:
        faster = "at least 20 % shorter"
    else:
        faster = "NOT 20 % shorter" if ratio.low > FASTER else "20 % shorter is undecided, the noise is too large"
    seeds = sorted(required.losses.keys() & reference.losses.keys())
    losses = [np.mean([outcome.losses[seed] for seed in seeds]) for outcome in (required, reference)]
    return (
        f"{course.task.title}, {REQUIRED} of the bytes of {REFERENCE}: measured "
        f"{format_bytes(required.measured_bytes, up=True)} of {format_bytes(limit)} allowed, {fits}. A step takes "
        f"{ratio} of rank 8's: {faster}. Held-out loss {losses[0]:.4f} against {losses[1]:.4f}, difference "
        f"{_signed(difference)} over {len(seeds)} paired seeds of {course.task.steps} steps."
    )


def figures_of(prefix: str, outcomes: Mapping[str, Outcome]) -> Figures:
    """One fine-tune's results by flat name; ratios and differences are relative to `REFERENCE`."""
    figures: Figures = {}
    reference = outcomes[REFERENCE]
    for name, outcome in outcomes.items():
        key = f"{prefix}.{_plain(name)}"
        figures[f"{key}.predicted_bytes"] = outcome.plan.predicted_bytes
        figures[f"{key}.measured_bytes"] = outcome.measured_bytes
        figures[f"{key}.adapted_modules"] = int(np.count_nonzero(outcome.plan.ranks))
        figures[f"{key}.step_ms"] = float(1e3 * np.median(outcome.seconds))
        figures[f"{key}.loss"] = float(np.mean(list(outcome.losses.values())))
        figures[f"{key}.seeds"] = len(outcome.losses)
        estimates = {"step_ratio": outcome.step_ratio(reference), "loss_difference": outcome.loss_difference(reference)}
        for kind, estimate in estimates.items():
            figures[f"{key}.{kind}"] = estimate.value
            figures[f"{key}.{kind}_low"], figures[f"{key}.{kind}_high"] = estimate.low, estimate.high
    return figures


def _plain(name: str) -> str:
    """A plan's name as part of a figure's: "fracrule at 65 %" -> "fracrule_at_65"."""
    return name.replace(",", "").replace(" %", "").replace(" ", "_").replace("-", "_")
