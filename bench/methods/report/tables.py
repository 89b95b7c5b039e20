"""The tables of the report."""

from __future__ import annotations

import math

import numpy as np

from ....common.statistics import Estimate
from .document import Table
from .numbers import KINDS, REFERENCE, Comparison, Costs, Results, compare, time_to_loss


def percent(estimate: Estimate) -> str:
    """A gain in log loss as per cent of the loss, with its interval."""
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def losses_table(results: Results, versus: dict[str, Comparison]) -> Table:
    """Each method against the reference: gains, chance of being better, wins, ties, losses, worst case."""
    rows = []
    for method in results.methods:
        fitted = sum((method.name, cell.name) in results.found for cell in results.cells)
        if method.name not in versus:
            rows.append((method.name, f"{fitted}", *("-",) * 5))
            continue
        one = versus[method.name]
        rows.append(
            (
                method.name,
                f"{fitted}",
                percent(one.gain),
                percent(one.mean),
                chance(one),
                f"{one.pairs.wins} / {one.pairs.ties} / {one.pairs.losses}",
                f"{100 * one.worst:+.1f}",
            )
        )
    columns = ("method", "cells that fit", "gain, %", "mean gain, %", "better", "wins / ties / losses", "worst run, %")
    return Table(columns, tuple(rows))


def kinds_table(results: Results) -> Table:
    """Each method against the reference, on each kind of task alone; Table without rows where there is one kind."""
    parts = [results.of_kind(kind) for kind in KINDS]
    rows = []
    for method in results.methods if all(part.cells for part in parts) else ():
        found = [compare(part, method.name, REFERENCE) for part in parts]
        if method.name != REFERENCE and any(found):
            told = [(f"{one.cells}", percent(one.mean), chance(one)) if one else ("0", "-", "-") for one in found]
            rows.append((method.name, *(cell for part in told for cell in part)))
    columns = [(f"{kind}: cells", "mean gain, %", "better") for kind in KINDS]
    return Table(("method", *(column for part in columns for column in part)), tuple(rows))


def chance(one: Comparison) -> str:
    """In how many of the runs the first is better, ties by half, with an interval."""
    better = one.pairs.better
    return f"{100 * better.value:.0f} % ({100 * better.low:.0f} to {100 * better.high:.0f})"


def costs_table(results: Results, costs: dict[str, Costs]) -> Table:
    """What each method costs."""
    rows = []
    for method in results.methods:
        if method.name not in costs:
            continue
        cost, reached = costs[method.name], time_to_loss(results, method.name)
        arrival = "-" if reached is None or math.isnan(reached[0]) else f"{reached[0]:.2f}"
        share = "-" if reached is None else f"{reached[1]} of {reached[2]}"
        rows.append(
            (
                method.name,
                f"{100 * cost.bytes:.0f}",
                f"{100 * cost.measured:.0f}",
                f"{cost.step:.2f}",
                f"{cost.setup:.1f}",
                arrival,
                share,
                f"{cost.parameters:,.0f}",
                f"{cost.tuning:.2f}",
                f"{cost.moved:.2f}",
                f"{cost.bump:+.3f}",
                f"{cost.breaches}",
                f"{cost.diverged}",
            )
        )
    columns = (
        "method", "bytes, %", "measured, %", "step", "set-up, steps", "time to loss", "get there", "parameters",
        "tuning, CPU h", "moved", "bump", "breaches", "diverged",
    )  # fmt: skip
    return Table(columns, tuple(rows))


def cells_table(results: Results, *, accuracy: bool = False) -> Table:
    """The mean held-out loss, or accuracy, of each method in each cell."""
    rows = []
    for method in results.methods:
        row = [method.name]
        for cell in results.cells:
            key = (method.name, cell.name)
            if key in results.found:
                rows_of = results.found[key].outcome.rows
                values = [r["accuracy"] for r in rows_of if r["accuracy"] is not None]
                mean = np.mean(values) if accuracy and values else np.exp(results.found[key].logs).mean()
                row.append(f"{100 * mean:.1f}" if accuracy else f"{mean:.4f}")
            else:
                row.append("does not fit" if key in results.unfit else "-")
        rows.append(tuple(row))
    return Table(("method", *(f"{number}" for number, _ in enumerate(results.cells, 1))), tuple(rows))


def cells_legend(results: Results) -> Table:
    """What the numbered cells are."""
    rows = []
    for number, cell in enumerate(results.cells, 1):
        task = cell.task
        size = f"{task.steps} x {task.rows} x {task.length}"
        rows.append((f"{number}", task.model, task.data, task.kind, size, cell.budget))
    return Table(("cell", "model", "data", "task", "steps x rows x tokens", "budget"), tuple(rows))
