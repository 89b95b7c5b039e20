"""Figures of methods over cells, from the outcomes that the rows lead to.

Runs are compared in pairs: same task, budget, seed and batches. Losses of tasks differ in scale, so a difference is one
of logs: a gain of 0.01 is a loss about 1 % lower, and one of 0.155 a loss 14.4 % lower. Intervals come from a bootstrap
over tasks (`common.statistics`), since cells and seeds of one task are alike; those of a single task, over its runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from rankpilot.common.arrays import FloatArray
from rankpilot.cost.budget import Budget
from rankpilot.training.results import Estimate, PairedComparison, compare_pairs, estimate, interquartile_means

from .rows import plan_ranks
from .study import DoesNotFitError, Method, MissingRowsError, Outcome, Study
from .tasks import Cell

REFERENCE = "simple"
"""The method that all are compared with: what a careful user does without any tool."""

KINDS: dict[str, tuple[str, ...]] = {"texts": ("causal-lm",), "labels": ("classification", "regression")}
"""Kinds of tasks that are told apart: the luck of a seed is small where texts are learned, and large on labels."""

FEWEST_TASKS = 4
"""Tasks from which on it is said who is better: of three, no interval over tasks can be trusted."""

STEP_FIGURES = ("measured", "measured_reference", "step_ratio", "reference_s")
"""What a timed step tells; see `registry.time_step`."""

TIE = 1e-9
"""Differences of logs below it are ties: the same plan at the same rate."""


@dataclass(frozen=True, eq=False)
class CellResult:
    """What a method did in a cell.

    Attributes:
        outcome: its runs.
        steps: the row of the step that stands for each of them.
        limit: bytes that the cell allows.
    """

    outcome: Outcome
    steps: tuple[dict[str, Any], ...]
    limit: float

    @property
    def logs(self) -> FloatArray:
        """Log held-out losses, one a seed; a run that diverged has the loss before training."""
        rows = self.outcome.rows
        return np.log([row["untrained_loss"] if row["loss"] is None else row["loss"] for row in rows])

    @property
    def step(self) -> dict[str, float]:
        """The means of the steps' figures."""
        return {name: float(np.mean([step[name] for step in self.steps])) for name in STEP_FIGURES}

    @property
    def bytes(self) -> float:
        """The peak: predicted where a model predicts it, else measured; the mean of the seeds."""
        known = [float(value) for value in self.outcome.bytes if value is not None]
        return float(np.mean(known)) if known else self.step["measured"]

    @property
    def breaches(self) -> int:
        """Runs with a measured peak above the limit."""
        above = [int(step["measured"] > self.limit) for step in self.steps]
        return sum(row.get("breaches", step) > 0 for row, step in zip(self.outcome.rows, above, strict=True))


@dataclass(frozen=True, eq=False)
class Results:
    """All that rows tell of a suite.

    Attributes:
        methods: that were asked for.
        cells: of the suite.
        found: by (method, cell) by name.
        unfit: (method, cell) without a plan within the budget.
        missing: (method, cell) whose rows are not all there.
        study: where they come from.
    """

    methods: tuple[Method, ...]
    cells: tuple[Cell, ...]
    found: dict[tuple[str, str], CellResult]
    unfit: frozenset[tuple[str, str]]
    missing: frozenset[tuple[str, str]]
    study: Study

    @classmethod
    def of(cls, study: Study, methods: Sequence[Method]) -> Results:
        """What the rows of a study tell."""
        found, unfit, missing = {}, set(), set()
        for cell in study.suite.cells:
            for method in methods:
                key = (method.name, cell.name)
                try:
                    outcome = method.outcome(study, cell)
                    steps = study.steps(outcome)
                    limit = Budget.parse(cell.budget).value * study.modules(cell.task).reference
                    found[key] = CellResult(outcome, steps, limit)
                except DoesNotFitError:
                    unfit.add(key)
                except MissingRowsError:
                    missing.add(key)
        return cls(tuple(methods), study.suite.cells, found, frozenset(unfit), frozenset(missing), study)

    def of_kind(self, kind: str) -> Results:
        """The same on the cells of one of `KINDS` alone."""
        return replace(self, cells=tuple(cell for cell in self.cells if cell.task.kind in KINDS[kind]))

    def shared(self, first: str, second: str) -> list[Cell]:
        """Cells in which both methods have results."""
        return [cell for cell in self.cells if {(first, cell.name), (second, cell.name)} <= self.found.keys()]

    def gains(self, first: str, second: str) -> tuple[FloatArray, list[str]]:
        """How much lower the log loss of a method is than another's, for each pair of runs, and the unit of each."""
        gains, tasks = [], []
        for cell in self.shared(first, second):
            logs, others = (self.found[name, cell.name].logs for name in (first, second))
            difference = others - logs
            gains.append(np.where(np.abs(difference) < TIE, 0.0, difference))
            tasks += [cell.task.name] * len(logs)
        if len(set(tasks)) == 1:
            tasks = [f"{task}, run {number}" for number, task in enumerate(tasks)]
        return (np.concatenate(gains) if gains else np.zeros(0)), tasks


@dataclass(frozen=True)
class Comparison:
    """A method against another.

    Attributes:
        cells: in which both have results.
        tasks: of these cells.
        gain: interquartile mean of the gain in log loss, positive where the first is better.
        mean: the plain mean of the gain.
        pairs: how often the first is better.
        worst: the smallest gain of a run.
    """

    cells: int
    tasks: int
    gain: Estimate
    mean: Estimate
    pairs: PairedComparison
    worst: float


def compare(results: Results, first: str, second: str) -> Comparison | None:
    """A method against another; None where they share no cell."""
    gains, tasks = results.gains(first, second)
    if not len(gains):
        return None
    zeros = np.zeros(len(gains))
    cells = results.shared(first, second)
    middle, mean = estimate(gains, tasks, interquartile_means), estimate(gains, tasks)
    count = len({cell.task.name for cell in cells})
    return Comparison(len(cells), count, middle, mean, compare_pairs(gains, zeros, tasks), float(gains.min()))


@dataclass(frozen=True)
class Costs:
    """What a method costs, as means over cells.

    Attributes:
        bytes: peak as a share of all-linear rank 8's.
        measured: the same, of a measured step.
        step: time of a step over that of all-linear rank 8.
        setup: CPU seconds before the first step, in steps of all-linear rank 8.
        parameters: of the adapter.
        tuning: CPU hours of choosing rates and plans.
        moved: ranks that were moved after the start, over the sum of the ranks.
        bump: the largest rise of a loss when ranks changed.
        breaches: runs with a measured peak above the limit.
        diverged: runs.
    """

    bytes: float
    measured: float
    step: float
    setup: float
    parameters: float
    tuning: float
    moved: float
    bump: float
    breaches: int
    diverged: int


def costs_of(results: Results, name: str) -> Costs | None:
    """What a method costs; None if it has no result."""
    mine = [(cell, results.found[name, cell.name]) for cell in results.cells if (name, cell.name) in results.found]
    if not mine:
        return None
    rows = [row for _, result in mine for row in result.outcome.rows]
    ended = [row for row in rows if row["loss"] is not None]
    reference = [results.study.modules(cell.task).reference for cell, _ in mine]
    works = frozenset(work for _, result in mine for work in result.outcome.tuning)
    shares = [result.bytes / whole for (_, result), whole in zip(mine, reference, strict=True)]
    measured = [result.step["measured"] / result.step["measured_reference"] for _, result in mine]
    setups = [np.mean(result.outcome.setup_s) / result.step["reference_s"] for _, result in mine]
    return Costs(
        bytes=float(np.mean(shares)),
        measured=float(np.mean(measured)),
        step=float(np.mean([result.step["step_ratio"] for _, result in mine])),
        setup=float(np.mean(setups)),
        parameters=float(np.mean([row["parameters"] for row in ended] or [0])),
        tuning=sum(results.study.result(work)["cpu_s"] for work in works) / 3600,
        moved=float(np.mean([row["moved"] / max(int(plan_ranks(row["ranks"]).sum()), 1) for row in ended] or [0])),
        bump=float(max((row["bump"] or 0.0 for row in ended), default=0.0)),
        breaches=sum(result.breaches for _, result in mine),
        diverged=len(rows) - len(ended),
    )


def time_to_loss(results: Results, name: str) -> tuple[float, int, int] | None:
    """How long a method takes to the loss at which the reference ends.

    Time counts what came before the first step, and steps at their measured time beside all-linear rank 8; it is a
    multiple of the reference's whole training. Between evaluations the loss is interpolated.

    Returns:
        The median of the runs that get there, how many do, and of how many; None where they share no cell.
    """
    times, runs = [], 0
    for cell in results.shared(name, REFERENCE):
        mine, other = results.found[name, cell.name], results.found[REFERENCE, cell.name]
        whole = cell.task.steps * other.step["step_ratio"]
        runs_of_both = zip(mine.outcome.rows, other.outcome.rows, mine.outcome.setup_s, mine.steps, strict=True)
        for row, goal, setup, own in runs_of_both:
            runs += 1
            if goal["loss"] is None or row["loss"] is None:
                continue
            step = _reached([(s, loss) for s, _, loss in row["curve"]], goal["curve"][-1][2])
            if step is not None:
                times.append((setup / own["reference_s"] + step * own["step_ratio"]) / whole)
    return (float(np.median(times)) if times else float("nan"), len(times), runs) if runs else None


def _reached(curve: Sequence[tuple[float, float | None]], goal: float | None) -> float | None:
    """The step at which a curve falls to a loss; None if it never does."""
    if goal is None:
        return None
    for (start, high), (end, low) in pairwise(curve):
        if low is not None and low <= goal:
            if high is None or high <= goal:
                return float(start if high is not None else end)
            return float(start + (end - start) * (high - goal) / (high - low))
    return None


def profile(results: Results, name: str, points: FloatArray) -> FloatArray:
    """The share of runs whose loss is within a factor exp(point) of the best method's there, (points,).

    A cell that a method does not fit counts as beyond all points.
    """
    usual = [method.name for method in results.methods]
    distances: list[float] = []
    for cell in results.cells:
        logs = {key: results.found[key, cell.name].logs for key in usual if (key, cell.name) in results.found}
        if not logs or (name, cell.name) in results.missing:
            continue
        best = np.min(list(logs.values()), axis=0)
        mine = results.found.get((name, cell.name))
        distances += [np.inf] * len(best) if mine is None else (mine.logs - best).tolist()
    return np.array([np.mean([d <= point for d in distances]) if distances else 0.0 for point in points])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names rows, others are figures."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(items: Sequence[str]) -> str:
    """A list of sentences."""
    return "\n".join(f"* {item}" for item in items)


def percent(estimate: Estimate) -> str:
    """A gain in log loss as per cent of the loss, with its interval."""
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"
