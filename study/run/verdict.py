"""What a reader of a report has to know first: whether the run is good for anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...allocation.decision_line import promise, unlike
from ...common.drawing import Points, finite_points
from ...finetune.config import ALL_LINEAR, PILOT, UNIFORM
from .memory_figure import in_force
from .run_data import RunData

RISE = 0.01
"""A held-out loss that ends this share above its lowest value has risen."""
DIVERGED = 0.05
"""A training that ends this share above its start has diverged; below it, the loss only did not fall."""


BLOWN_UP = 10
"""A held-out loss that is so many times the first training loss is that of a run that diverged."""


@dataclass(frozen=True)
class Verdict:
    """Sentences for the top of a report.

    Attributes:
        warnings: what is wrong with the run, the worst first.
        results: what came out.
    """

    warnings: tuple[str, ...]
    results: tuple[str, ...]


def verdict(run: RunData) -> Verdict:
    """What is wrong with a run, and what came out of it."""
    warnings = (_diverged(run), _guesses(run), _rose(run), _exceeded(run), _changed_by_reload(run))
    of_policy = (_misses_goal(run), _unlike(run))
    others = (_against(run, UNIFORM, "uniform ranks"), _against(run, ALL_LINEAR, "rank 8 on all modules"))
    return Verdict(tuple(filter(None, (*warnings, *of_policy))), tuple(filter(None, (_ending(run), *others))))


def _diverged(run: RunData) -> str:
    """Whether a loss or gradient is not finite, or the training loss ends above its start."""
    held_out = run.results.get(PILOT, {}).get("held_out_loss")
    values: list[tuple[str, float, float]] = []
    for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss"), ("grad_norm", "gradient norm")):
        values += [(name, step, value) for step, value in run.points(PILOT, key)]
    if held_out is not None:
        values.append(("held-out loss", run.steps, held_out))
    for name, step, value in sorted(values, key=lambda row: row[1]):
        if not math.isfinite(value):
            return f"The run diverged: the {name} is {value} at step {step:g}. Lower the learning rate."
    losses = run.points(PILOT, "loss")
    if held_out is not None and losses and held_out > BLOWN_UP * losses[0][1] > 0:
        return (
            f"The run diverged: the held-out loss is {held_out:.4g} at its end, and the first training loss "
            f"{losses[0][1]:.4g}. Lower the learning rate."
        )
    start, end = rise_of(losses)
    if end > (1 + DIVERGED) * start:
        return f"The run diverged: the training loss rose from {start:.4g} to {end:.4g}. Lower the learning rate."
    return f"The training loss did not fall: it began at {start:.4g} and ends at {end:.4g}." if end > start else ""


def rise_of(losses: Points) -> tuple[float, float]:
    """The loss at the start and at the end of a training, each the mean of a fifth of it.

    Both are that of the start if noise can explain why the end is higher.

    Args:
        losses: (step, loss), all finite.
    """
    values = np.array([value for _, value in losses], dtype=np.float64)
    if len(values) < 2:
        return 0.0, 0.0
    part = max(1, len(values) // 5)
    start, end = float(values[:part].mean()), float(values[-part:].mean())
    # Of the difference of two such means. The median, since a run that diverges jumps; a few points tell no noise.
    noise = 1.05 * float(np.median(np.abs(np.diff(values)))) * math.sqrt(2 / part) if len(values) > 5 else 0.0
    return (start, end) if end - start > 2 * noise or end < start else (start, start)


def _guesses(run: RunData) -> str:
    """Whether the accuracy is that of always naming the most frequent class, within a standard error, or below it."""
    accuracy = run.results.get(PILOT, {}).get("held_out_accuracy")
    rows, largest = (run.summary.get(key) for key in ("held_out_rows", "largest_class"))
    if accuracy is None or not rows or not largest or accuracy > largest + math.sqrt(largest * (1 - largest) / rows):
        return ""
    if accuracy > largest:
        return (
            f"The model may be guessing: its held-out accuracy of {accuracy:.1%} is hardly above that of always naming "
            f"the most frequent class ({largest:.1%}), and {rows:,} rows cannot tell them apart."
        )
    return (
        f"The model guesses: its held-out accuracy of {accuracy:.1%} is no better than always naming the most frequent "
        f"class ({largest:.1%})."
    )


def _rose(run: RunData) -> str:
    points = [(step, loss) for step, loss in run.points(PILOT, "eval_loss") if math.isfinite(loss)]
    if not points:
        return ""
    lowest, last = min(points, key=lambda point: point[1]), points[-1]
    if last[1] <= (1 + RISE) * lowest[1]:
        return ""
    return (
        f"The held-out loss rose during the run: from {lowest[1]:.3f} at step {lowest[0]:g} to {last[1]:.3f} at step "
        f"{last[0]:g}. Train fewer steps, or lower the learning rate."
    )


def _exceeded(run: RunData) -> str:
    peaks, limits = finite_points(run.peaks().get(PILOT, [])), finite_points(run.limits)
    if run.unit != "bytes" or not len(limits):
        return ""
    over = int((peaks[:, 1] > in_force(limits, peaks[:, 0])).sum())
    return f"The peak was above the budget at {over} of {len(peaks)} measured steps." if over else ""


def _changed_by_reload(run: RunData) -> str:
    check = run.summary.get("reload") or {}
    return "" if check.get("identical", True) else "The saved adapter, loaded by plain PEFT, gives other outputs."


def _unlike(run: RunData) -> str:
    difference = unlike(run.first) if run.first else ""
    return f"Its policy has learned from no run like this one, so trust it less: {difference}." if difference else ""


def _misses_goal(run: RunData) -> str:
    return promise(run.first) if run.first and run.first.misses_goal else ""


def _ending(run: RunData) -> str:
    """The last held-out loss, for a run without a summary."""
    points = run.points(PILOT, "eval_loss")
    if run.results or not points:
        return ""
    return f"The latest held-out loss is {points[-1][1]:.4f}, at step {points[-1][0]:g}."


def _against(run: RunData, name: str, what: str) -> str:
    """How the losses of the run and of another one in its folder compare, and what the run took beside it.

    Args:
        run: the run.
        name: of the other one.
        what: it is, in words.
    """
    mine, other = (run.results.get(each, {}) for each in (PILOT, name))
    loss, reference = mine.get("held_out_loss"), other.get("held_out_loss")
    if loss is None or not reference:
        return ""
    change = loss / reference - 1
    word = "lower" if change < 0 else "higher"
    differs = f"{abs(change):.1%} {word} than" if abs(change) >= 0.0005 else "the same as"
    sentence = f"rankpilot's held-out loss is {differs} that of {what}"
    shares = [
        f"{mine[key] / other[key]:.0%} of its {unit}"
        for key, unit in (("peak_bytes", "bytes"), ("median_step_s", "time a step"))
        if name == ALL_LINEAR and mine.get(key) and other.get(key)
    ]
    return sentence + (f", with {' and '.join(shares)}." if shares else ".")
