"""What plans save that are to lose nothing against rank 8 on all linear modules, from rows of the suite "saving"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rankpilot.training.results import Estimate, estimate, ratio_estimate

from ..harness import Figures, estimate_figures
from .numbers import Results, bullets, compare, markdown_table, percent
from .tasks import NEW_FAMILY, SAVING, SEEN_LAST, Cell

PLAIN, *PLANS = SAVING
"""Plain LoRA, and the methods that are compared with it."""

OF_RECORD = (
    "A page of record where it speaks of `ours`: that is the policy that shipped with 0.2. The default decides "
    "otherwise now ([What a decision is](decision.md))."
)
"""The first lines of pages whose rows were measured before."""

OURS = tuple(name for name in PLANS if name.startswith("ours-"))
PEERS = {"adalora-final": "AdaLoRA", "eva": "EVA"}
"""Adaptive ranks that come with PEFT, and what they are called."""

FIXED = tuple(name for name in PLANS if name not in (*OURS, *PEERS))

USUAL = "top-three-quarters-8"
"""The fixed plan that a careful user might always take."""

KINDS = ("attention-8", "mlp-8")

TOLERANCE = 0.01
"""A plan keeps the loss if its mean log loss is higher by no more."""

TEXTS, NEW_TEXTS, LABELS = "texts", "texts with a new family", "labels"
"""Kinds of cells, in words."""

LEAST_TASKS = 4
"""Of fewer tasks no interval of a share can be told."""

FAR = 0.03
"""Cells in which the mean log loss is higher by more are told."""


@dataclass(frozen=True)
class Saving:
    """What a method saves and loses beside plain LoRA.

    Attributes:
        cells: in which both have results.
        loss: by how much its log loss is higher, on the mean.
        worst: the highest mean of a cell.
        kept: cells in which it keeps within `TOLERANCE`.
        far: cells in which it is off by more than `FAR`.
        step: time of a step over plain LoRA's, on the mean.
        bytes: at the peak, as a share of plain LoRA's, on the mean.
    """

    cells: int
    loss: Estimate
    worst: float
    kept: int
    far: int
    step: Estimate
    bytes: Estimate


def saving_of(results: Results, name: str) -> Saving | None:
    """What a method saves; None where fewer than two cells have rows of both."""
    cells = results.shared(name, PLAIN)
    if len(cells) < 2:
        return None
    losses = [loss_of(results, cell, name) for cell in cells]
    tasks = [cell.task.name for cell in cells]
    means = np.array([float(loss.mean()) for loss in losses])
    found = [results.found[name, cell.name] for cell in cells]
    shares = [each.bytes / results.found[PLAIN, cell.name].bytes for each, cell in zip(found, cells, strict=True)]
    return Saving(
        cells=len(cells),
        loss=estimate(means, tasks),
        worst=float(means.max()),
        kept=int((means <= TOLERANCE).sum()),
        far=int((means > FAR).sum()),
        step=estimate([each.step["step_ratio"] for each in found], tasks),
        bytes=estimate(shares, tasks),
    )


def share_of_best(results: Results, name: str) -> Estimate | None:
    """The time that a method saves, as a share of what the best fixed plan saves in hindsight, over all cells.

    The best one of a cell is the cheapest of those that were run and keep the loss there; plain LoRA, which saves
    nothing, always does. Where the method does not keep the loss, it has saved nothing.
    """
    cells = results.shared(name, PLAIN)
    mine = np.array([_kept(results, cell, name) * (1 - _time(results, cell, name)) for cell in cells])
    best = np.array([1 - _best_in_hindsight(results, cell)[1] for cell in cells])
    tasks = [cell.task.name for cell in cells]
    return ratio_estimate(mine, best, tasks) if len(set(tasks)) >= LEAST_TASKS and best.any() else None


def better_kind(results: Results, name: str) -> Estimate | None:
    """The share of runs in which a method is better than the worse of attention alone and MLPs alone."""
    better, tasks = [], []
    for cell in results.shared(name, PLAIN):
        if all((kind, cell.name) in results.found for kind in KINDS):
            worse = np.max([results.found[kind, cell.name].logs for kind in KINDS], axis=0)
            better += (results.found[name, cell.name].logs < worse).astype(float).tolist()
            tasks += [cell.task.name] * len(worse)
    return estimate(better, tasks) if len(set(tasks)) > 1 else None


@dataclass(frozen=True)
class Kept:
    """What a method loses beside plain LoRA on cells of one kind.

    Attributes:
        mean: by how much its log loss is higher, over all cells.
        runs: of all seeds.
        kept: those in which it is higher by at most `TOLERANCE`.
        plain: those in which its plan is plain LoRA.
    """

    mean: float
    runs: int
    kept: int
    plain: int


def kept_by_kind(results: Results, name: str) -> dict[str, Kept]:
    """What a method loses by kind of cell; kinds without rows are left out."""
    kinds: dict[str, list[Cell]] = {}
    for cell in results.shared(name, PLAIN):
        texts = NEW_TEXTS if cell.task in NEW_FAMILY else TEXTS
        kinds.setdefault(texts if cell.task.kind == "causal-lm" else LABELS, []).append(cell)
    found = {}
    for kind in (kind for kind in (TEXTS, NEW_TEXTS, LABELS) if kind in kinds):
        losses = [loss_of(results, cell, name) for cell in kinds[kind]]
        found[kind] = Kept(
            mean=float(np.mean([loss.mean() for loss in losses])),
            runs=sum(map(len, losses)),
            kept=int(sum((loss <= TOLERANCE).sum() for loss in losses)),
            plain=sum(_plain_runs(results, cell, name) for cell in kinds[kind]),
        )
    return found


def _plain_runs(results: Results, cell: Cell, name: str) -> int:
    """In how many runs of a cell a method has the plan of plain LoRA."""
    mine, plain = (results.found[each, cell.name].outcome.rows for each in (name, PLAIN))
    plans = [(row.get("ranks"), other.get("ranks")) for row, other in zip(mine, plain, strict=True)]
    return sum(plan is not None and plan == reference for plan, reference in plans)


def loss_of(results: Results, cell: Cell, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By how much the log loss is higher than plain LoRA's, one a seed."""
    return np.asarray(results.found[name, cell.name].logs - results.found[PLAIN, cell.name].logs)


def _kept(results: Results, cell: Cell, name: str) -> bool:
    """Whether a method keeps the loss in a cell, in the mean of its seeds."""
    return float(loss_of(results, cell, name).mean()) <= TOLERANCE


def _time(results: Results, cell: Cell, name: str) -> float:
    return float(results.found[name, cell.name].step["step_ratio"])


def _best_in_hindsight(results: Results, cell: Cell) -> tuple[str, float]:
    """The fastest fixed plan that was run in a cell and kept the loss, and its time; plain LoRA where none did."""
    there = [name for name in FIXED if (name, cell.name) in results.found]
    kept = [name for name in there if _kept(results, cell, name)]
    times = [(_time(results, cell, name), name) for name in kept]
    time, name = min([(1.0, PLAIN), *times])
    return name, time


def savings_of(results: Results) -> dict[str, Saving]:
    """What each method saves, by name, as far as rows tell."""
    return {name: one for name in PLANS if (one := saving_of(results, name)) is not None}


def _cell_by_cell(results: Results) -> list[str]:
    """What the policy does in each cell under a goal of time, beside the best fixed plan there."""
    ours, rows = OURS[0], []
    for cell in results.shared(ours, PLAIN):
        found = results.found[ours, cell.name]
        note = " (new family)" if cell.task in NEW_FAMILY else " (seen last)" if cell.task in SEEN_LAST else ""
        seeds = [str(number) for number in range(len(found.logs))]
        best, time = _best_in_hindsight(results, cell)
        rows.append(
            (
                f"{cell.task.name}{note}",
                percent(estimate(loss_of(results, cell, ours), seeds)),
                f"{found.step['step_ratio']:.2f}",
                f"{found.bytes / results.found[PLAIN, cell.name].bytes:.2f}",
                f"{best}, {time:.2f}",
            )
        )
    if not rows:
        return []
    columns = ("fine-tune", "log loss, %", "time of a step", "bytes", "fastest fixed plan that keeps the loss, time")
    return [
        f"## Cell by cell: {ours}",
        "Intervals are over seeds. The last column is known in hindsight alone, and counts the fixed plans that "
        "were run in that cell. No policy has learned from a model of a new family. Nobody had looked at the cells "
        "that were seen last before the shipped networks were done; the floor of broad plans was added after them "
        "(docs/experiments.md).",
        markdown_table(columns, rows),
    ]


def saving_blocks(results: Results, picture: str) -> list[str]:
    """The report.

    Args:
        results: of the rows.
        picture: its place, as the report names it.
    """
    found = savings_of(results)
    rows = tuple(
        (
            name,
            str(one.cells),
            percent(one.loss),
            f"{100 * one.worst:+.1f}",
            f"{one.kept} / {one.far}",
            f"{one.step:.2f}",
            f"{one.bytes:.2f}",
        )
        for name, one in found.items()
    )
    columns = ("plan", "cells", "log loss, %", "worst cell, %", "kept / far off", "time of a step", "bytes")
    lines = dict.fromkeys(line for name in OURS if name in found for line in _sentences(results, name))
    described = "; ".join(f"`{method.name}`: {method.description}" for method in results.methods)
    return [
        "# What can be saved at about the same loss",
        OF_RECORD,
        "Written by `python -m benchmarks methods-report --suite saving` from stored rows; run again with `python -m "
        f"benchmarks methods --suite saving`. Each plan beside `{PLAIN}`, rank 8 on all linear modules: by how much "
        "the log of the held-out loss is higher, in per cent, both at a learning rate of their own, with paired seeds; "
        f"the cells in which it keeps within {TOLERANCE:.0%} and those in which it is off by more than {FAR:.0%}; "
        "the time of a step and the bytes as shares. Intervals are 95 %, by a bootstrap over tasks. A rate is "
        "chosen on one seed of its own, which on labels is a lottery; plain LoRA timed beside itself is off by 1 "
        "to 2 %.",
        markdown_table(columns, rows),
        f"![Version 0.2: loss of plans versus the time of a step and versus bytes]({picture})",
        *([bullets([*lines])] if lines else []),
        *_cell_by_cell(results),
        "## Plans",
        f"{described}.",
    ]


def _sentences(results: Results, name: str) -> list[str]:
    lines = []
    share, usual = share_of_best(results, name), share_of_best(results, USUAL)
    if share and usual:
        lines.append(
            f"`{name}` gets {share:.0%} of the time that the best fixed plan saves in hindsight, the best one of those "
            f"that were run in a cell and keep the loss there; always `{USUAL}` gets {usual:.0%}. What is saved at a "
            "loss counts for nothing."
        )
    lines += [_by_kind(results, each) for each in dict.fromkeys((name, USUAL)) if kept_by_kind(results, each)]
    texts = compare(results.of_kind("texts"), name, USUAL)
    if texts and texts.tasks >= LEAST_TASKS:
        lines.append(
            f"On language models the log loss of `{name}` is lower than that of `{USUAL}` by {percent(texts.mean)} %, "
            f"in {texts.pairs.better:.0%} of the runs."
        )
    better, plain = better_kind(results, name), better_kind(results, PLAIN)
    if better and plain:
        lines.append(
            f"`{name}` is better than the worse of `{KINDS[0]}` and `{KINDS[1]}` in {better:.0%} of the runs, plain "
            f"LoRA in {plain:.0%}."
        )
    return lines


def _by_kind(results: Results, name: str) -> str:
    """What a method loses by kind of cell, in words."""
    kinds = "; ".join(
        f"on {kind} {100 * one.mean:+.1f} % in the mean, at most {TOLERANCE:.0%} in {one.kept} of {one.runs} runs"
        + (f", {one.plain} of them plain LoRA" if one.plain else "")
        for kind, one in kept_by_kind(results, name).items()
    )
    return f"`{name}` loses {kinds}."


def saving_figures(results: Results) -> Figures:
    """The figures by flat name."""
    figures: Figures = {}
    for name, one in savings_of(results).items():
        for part, value in (("loss", one.loss), ("step", one.step), ("bytes", one.bytes)):
            figures |= estimate_figures(f"{name}.{part}", value)
        figures |= {f"{name}.worst": one.worst, f"{name}.kept": one.kept, f"{name}.far": one.far}
    for name in OURS:
        for kind, kept in kept_by_kind(results, name).items():
            figures |= {f"{name}.{kind}.mean": kept.mean, f"{name}.{kind}.kept": kept.kept / kept.runs}
        for part, found in (("share", share_of_best(results, name)), ("better_kind", better_kind(results, name))):
            figures |= estimate_figures(f"{name}.{part}", found) if found else {}
    return figures
