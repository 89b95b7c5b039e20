"""The essentials of a run's page: problems with the run, and its results compared with others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from ..common.arrays import FloatArray, IntArray
from ..common.drawing import Points, finite_points
from ..common.text import cost_text, format_bytes, make_table, part_of, short_names
from ..decide.choice import PLAIN
from ..decide.plan.parts import parts_sentence
from ..finetune.options import ALL_LINEAR, PILOT, UNIFORM
from .run_data import RunData, control_sentence, rates_sentence, run_names

RISE = 0.01
"""A held-out loss that ends this share above its lowest value, or that of another run, has risen."""
DIVERGED = 0.05
"""A training that ends this share above its start has diverged; below it, the loss only did not fall."""
BLOWN_UP = 10
"""A held-out loss this many times the first training loss indicates divergence."""


@dataclass(frozen=True)
class Verdict:
    """Sentences for the top of a page.

    Attributes:
        warnings: problems with the run, the worst first, and its losses against others.
        caveats: reasons to doubt what was expected of it.
        results: the outcome.
    """

    warnings: tuple[str, ...]
    caveats: tuple[str, ...]
    results: tuple[str, ...]


def verdict(run: RunData) -> Verdict:
    """Return the problems and the outcome of a run."""
    others = {name: _against(run, name, what) for name, what in ((UNIFORM, "uniform ranks"), (ALL_LINEAR, PLAIN))}
    losses = [words for name, words in others.items() if _change(run, name) > RISE]
    gains = [words for words in others.values() if words not in losses]
    promise, missed = (run.first.promise(), run.first.misses_goal) if run.first else ("", False)
    warnings = (_diverged(run), *losses, _guesses(run), _rose(run), _exceeded(run), promise if missed else "")
    rates = rates_sentence(run.decisions[-1]) if run.decisions else ""
    parts = parts_sentence(run.results.get(PILOT, {}))
    results = (_ending(run), *gains, "" if missed else promise, rates, control_sentence(run), parts)
    return Verdict(*(tuple(filter(None, sentences)) for sentences in (warnings, [_unlike(run)], results)))


def _diverged(run: RunData) -> str:
    """Report a non-finite loss or gradient, or a training loss that ends above its start."""
    if ended := [at for at, undone in run.broken if not undone]:
        what = f"losses, gradients or weights were non-finite up to step {ended[0]}, where it ended"
        return f"The run diverged: {what}. Lower the learning rate."
    held_out = run.results.get(PILOT, {}).get("held_out_loss")
    names = {"loss": "training loss", "eval_loss": "held-out loss", "grad_norm": "gradient norm"}
    values = [(name, step, value) for key, name in names.items() for step, value in run.points(PILOT, key)]
    if held_out is not None:
        values.append(("held-out loss", run.steps, held_out))
    for name, at, value in sorted(values, key=lambda row: row[1]):
        if not math.isfinite(value):
            return f"The run diverged: the {name} is {value} at step {at:g}. Lower the learning rate."
    losses = run.points(PILOT, "loss")
    if held_out is not None and losses and held_out > BLOWN_UP * losses[0][1] > 0:
        what = f"the final held-out loss is {held_out:.4g}, the first training loss {losses[0][1]:.4g}"
        return f"The run diverged: {what}. Lower the learning rate."
    start, end = rise_of(losses)
    if end > (1 + DIVERGED) * start:
        return f"The run diverged: the training loss rose from {start:.4g} to {end:.4g}. Lower the learning rate."
    return f"The training loss did not fall: it started at {start:.4g} and ended at {end:.4g}." if end > start else ""


def rise_of(losses: Points) -> tuple[float, float]:
    """Return the loss at the start and at the end of a training, each the mean of a fifth of it.

    Returns the start twice if noise can explain a higher end.

    Args:
        losses: (step, loss), all finite.
    """
    values = np.array([value for _, value in losses], dtype=np.float64)
    if len(values) < 2:
        return 0.0, 0.0
    part = max(1, len(values) // 5)
    start, end = float(values[:part].mean()), float(values[-part:].mean())
    # Of the difference of two such means. The median, since a diverging run jumps; a few points show no noise.
    noise = 1.05 * float(np.median(np.abs(np.diff(values)))) * math.sqrt(2 / part) if len(values) > 5 else 0.0
    return (start, end) if end - start > 2 * noise or end < start else (start, start)


def _guesses(run: RunData) -> str:
    """Report an accuracy within a standard error of always predicting the most frequent class, or below."""
    accuracy = run.results.get(PILOT, {}).get("held_out_accuracy")
    rows, largest = (run.summary.get(key) for key in ("held_out_rows", "largest_class"))
    if accuracy is None or not rows or not largest or accuracy > largest + math.sqrt(largest * (1 - largest) / rows):
        return ""
    reached, always = f"its held-out accuracy of {accuracy:.1%}", f"predicting the most frequent class ({largest:.1%})"
    if accuracy > largest:
        few = f"and {rows:,} rows are too few to tell"
        return f"The model may be guessing: {reached} is barely above always {always}, {few}."
    return f"The model is guessing: {reached} is no better than always {always}."


def _rose(run: RunData) -> str:
    points = [(step, loss) for step, loss in run.points(PILOT, "eval_loss") if math.isfinite(loss)]
    if not points:
        return ""
    lowest, last = min(points, key=lambda point: point[1]), points[-1]
    if last[1] <= (1 + RISE) * lowest[1]:
        return ""
    first, end = (f"{loss:.3f} at step {step:g}" for step, loss in (lowest, last))
    advice = "Train for fewer steps, or lower the learning rate."
    return f"The held-out loss rose during the run, from {first} to {end}. {advice}"


def _exceeded(run: RunData) -> str:
    peaks, limits = finite_points(run.peaks().get(PILOT, [])), finite_points(run.limits)
    if run.unit != "bytes" or not len(limits):
        return ""
    over = int((peaks[:, 1] > in_force(limits, peaks[:, 0])).sum())
    return f"The peak was above the budget at {over} of {len(peaks)} measured steps." if over else ""


def _unlike(run: RunData) -> str:
    caveats = run.first.caveats if run.first else ()
    return f"Expectations come from other runs and are less reliable here: {', '.join(caveats)}." if caveats else ""


def _ending(run: RunData) -> str:
    """Return the last held-out loss, for a run without a summary."""
    points = run.points(PILOT, "eval_loss")
    if run.results or not points:
        return ""
    return f"The latest held-out loss is {points[-1][1]:.4f}, at step {points[-1][0]:g}."


def _change(run: RunData, name: str) -> float:
    """Return the relative difference of held-out losses to another run in the folder; NaN if unknown."""
    loss, reference = (run.results.get(each, {}).get("held_out_loss") for each in (PILOT, name))
    return math.nan if loss is None or not reference else loss / reference - 1


def _against(run: RunData, name: str, what: str) -> str:
    """Compare the losses and costs of the run with another one in its folder.

    Args:
        run: the run.
        name: name of the other one.
        what: description of the other one.
    """
    mine, other = (run.results.get(each, {}) for each in (PILOT, name))
    change = _change(run, name)
    if math.isnan(change):
        return ""
    word = "lower" if change < 0 else "higher"
    differs = f"{abs(change):.1%} {word} than" if abs(change) >= 0.0005 else "the same as"
    sentence = f"From a single run each, rankpilot's held-out loss is {differs} that of {what}"
    if name == UNIFORM and (ranks := [rank for rank in (other.get("ranks") or {}).values() if rank]):
        least, most = min(ranks), max(ranks)
        equal = f"rank {most}" if least == most else f"ranks {least} to {most}"
        sentence += f", {equal} on {len(ranks)} of {len(other['ranks'])} modules"
    units = {"peak_bytes": "memory", "median_step_s": "step time"} if name == ALL_LINEAR else {}
    known = ((key, unit) for key, unit in units.items() if mine.get(key) and other.get(key))
    shares = [f"{mine[key] / other[key]:.0%} of its {unit}" for key, unit in known]
    sentence += f", with {' and '.join(shares)}." if shares else "."
    again = run.saved[0].again_bytes if shares and run.saved else None
    if not again or not mine.get("peak_bytes"):
        return sentence
    share = f"this run took {mine['peak_bytes'] / again:.0%} of that"
    return f"{sentence} With all layers checkpointed it would take {format_bytes(again)}; {share}."


# What each picture shows, in words -----------------------------------------------------------------------------------


def loss_sentence(lasts: Mapping[str, float]) -> str:
    """Compare the first run's last held-out loss with those of other runs."""
    if not lasts:
        return "Training loss (no held-out loss was measured)"
    (run, value), *others = lasts.items()
    if not others:
        return f"{run} ends at a held-out loss of {value:.3f}"
    other, reference = others[0]
    change = (value - reference) / reference
    if abs(change) < 0.0005:
        return f"{run} and {other} end equal at a held-out loss of {value:.3f}"
    differs = f"{abs(change):.1%} {'below' if change < 0 else 'above'} {other}"
    return f"{run} ends {differs} on held-out data ({value:.3f} vs {reference:.3f}, one run each)"


def cost_sentence(run: RunData) -> str:
    """Describe whether a run keeps to its budget, and its closest approach; empty without a budget."""
    limits, predicted = finite_points(run.limits), finite_points(run.predicted())
    peaks = {name: finite_points(points) for name, points in run.peaks().items()}
    measured = [(name, points) for name, points in peaks.items() if len(points)]
    if not len(limits):
        return ""
    if not measured and not len(predicted):
        return f"Budget of {cost_text(limits[-1, 1], run.unit)}; no measurements"
    if not measured:
        text, _ = _most(predicted, in_force(limits, predicted[:, 0] + 1), run.unit)
        return f"Plans take at most {text}{'' if run.unit == 'parameters' else '; no measurements'}"
    name, points = measured[0]
    budgets = in_force(limits, points[:, 0])
    text, share = _most(points, budgets, run.unit)
    if share > 1:
        over = int((points[:, 1] > budgets).sum())
        return f"{name} exceeds the budget at {over} of {len(points)} measured steps: {text}"
    percent = f"{min(share, 0.999):.1%}" if share > 0.99 else f"{share:.0%}"
    return f"{name} stays within the budget at every measured step: at most {text} ({percent})"


def _most(points: FloatArray, limits: FloatArray, unit: str) -> tuple[str, float]:
    """Return the cost with the largest share of the budget in force, and that share.

    Args:
        points: (step, cost), (points, 2).
        limits: the budget at each of them, (points,).
        unit: unit of both.
    """
    most = int(np.argmax(points[:, 1] / limits))
    cost, limit = float(points[most, 1]), float(limits[most])
    return part_of(cost, limit, unit), cost / limit


def in_force(changes: FloatArray, steps: FloatArray) -> FloatArray:
    """Return the value in force at each step, (steps,).

    Args:
        changes: (step, value from that step on), in step order. A change takes effect after its step.
        steps: step numbers, starting at 1. The first value also applies before its change.
    """
    rows = np.searchsorted(changes[:, 0], steps, side="left") - 1
    return np.asarray(changes[np.maximum(rows, 0), 1])


def ranks_sentence(ranks: IntArray, modules: Sequence[str]) -> str:
    """Describe the largest rank change of a run, or the concentration of the ranks of a single plan.

    Args:
        ranks: ranks after each decision, int (decisions, modules).
        modules: full names.
    """
    first, final = ranks[0], ranks[-1]
    if not final.any():
        return "No module ends with an adapter"
    if np.unique(final).size == 1:
        return f"All {len(final)} modules end at rank {final[0]}"
    reached = np.cumsum(np.sort(final)[::-1]) / final.sum()
    few = int(np.searchsorted(reached, 0.8 - 1e-9)) + 1
    without = int((final == 0).sum())
    ending = f"; {without} {_end(without)} without an adapter" if without else ""
    change = np.abs(final - first)
    most, moved = int(np.argmax(change)), int(np.count_nonzero(change))
    beside = "the only change" if moved == 1 else f"the largest of {moved} changes"
    if moved:
        return f"{short_names(modules)[most]} went from rank {first[most]} to {final[most]}, {beside}{ending}"
    if len(ranks) > 1:
        return f"No rank changed after the first plan{ending}"
    return f"{few} of {len(final)} modules {_end(few)} with {reached[few - 1]:.0%} of the total rank{ending}"


def _end(count: int) -> str:
    return "ends" if count == 1 else "end"


# Results beside those of other ranks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    """One row of the comparison; `better` is +1 if high values are good, -1 if low ones are, else 0.

    `text` formats a value, in the unit of the run's budget if relevant.
    """

    label: str
    key: str
    text: Callable[[float, str], str]
    better: int = 0


_MEASURES = (
    _Measure("held-out loss", "held_out_loss", lambda value, _: f"{value:.4f}" if value < 1e4 else f"{value:.4g}", -1),
    _Measure("held-out accuracy", "held_out_accuracy", lambda value, _: f"{value:.2%}", +1),
    _Measure("peak memory", "peak_bytes", lambda value, _: format_bytes(value), -1),
    _Measure("budget", "budget_bytes", cost_text),
    _Measure("adapter parameters", "adapter_parameters", lambda value, _: f"{value:,.0f}"),
    _Measure("adapted modules", "adapted", lambda value, _: f"{value:,.0f}"),
    _Measure("median step", "median_step_s", lambda value, _: f"{1000 * value:.1f} ms", -1),
    _Measure("training time", "train_s", lambda value, _: f"{value:.1f} s", -1),
    _Measure("energy", "energy_joules", lambda value, _: f"{value / 1000:.3g} kJ", -1),
)


def summary_table(*runs: RunData) -> Table:
    """Return the comparison for a terminal: one column per run, the best values bold."""
    subjects = {subject(run) for run in runs}
    table = make_table(escape(subjects.pop()) if len(subjects) == 1 else "", ["", *_columns(runs)], first_wraps=True)
    for label, cells, best in comparison_rows(runs):
        styled = [f"[bold]{cell}[/bold]" if index in best else cell for index, cell in enumerate(cells)]
        table.add_row(label, *styled)
    return table


def subject(run: RunData) -> str:
    """Return the model and data of a run; empty if unknown."""
    return " on ".join(str(run.summary[key]) for key in ("model", "data") if run.summary.get(key))


def comparison_rows(runs: Sequence[RunData]) -> list[tuple[str, list[str], set[int]]]:
    """Return label, cells and indices of the best cells of each row; none is best if all read the same.

    Args:
        runs: runs whose results form the columns, in order.
    """
    rows, results = [], list(_columns(runs).values())
    for measure in _MEASURES:
        values = [result.get(measure.key) for result in results]
        pairs = zip(values, results, strict=True)
        cells = ["–" if value is None else measure.text(value, result["unit"]) for value, result in pairs]
        known = [(measure.better * value, cells[index]) for index, value in enumerate(values) if value is not None]
        if not known:
            continue
        top = max(known)[1]
        told_apart = measure.better != 0 and len({cell for _, cell in known}) > 1
        rows.append((measure.label, cells, {i for i, cell in enumerate(cells) if told_apart and cell == top}))
    return rows


def _columns(runs: Sequence[RunData]) -> dict[str, Mapping[str, Any]]:
    """Return the results of each run by column title, with the folder name if there are several."""
    folders = [f"{name}: " for name in run_names(runs)] if len(runs) > 1 else [""]
    columns: dict[str, Mapping[str, Any]] = {}
    for folder, run in zip(folders, runs, strict=True):
        for name, result in run.results.items():
            adapted = sum(rank > 0 for rank in result["ranks"].values()) if result.get("ranks") else None
            columns[escape(folder + name)] = {**result, "adapted": adapted, "unit": run.unit}
    return columns
