"""What plans save that are to lose nothing against rank 8 on all linear modules, from rows of the suite "saving"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....common.statistics import Estimate, estimate, ratio_estimate
from ...harness import Figures, estimate_figures
from ..tasks import SAVING, Cell
from .document import Block, Bullets, Heading, Paragraph, Picture, Table
from .numbers import Results
from .tables import percent

PLAIN, *PLANS = SAVING
"""Plain LoRA, and the methods that are compared with it."""

OURS = tuple(name for name in PLANS if name.startswith("ours-"))
FIXED = tuple(name for name in PLANS if name not in OURS)

USUAL = "top-three-quarters-8"
"""The fixed plan that a careful user might always take."""

KINDS = ("attention-8", "mlp-8")

TOLERANCE = 0.01
"""A plan keeps the loss if its mean log loss is higher by no more."""

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
    losses = [_loss(results, cell, name) for cell in cells]
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

    The best one of a cell is the cheapest that keeps the loss there; plain LoRA, which saves nothing, always does.
    """
    cells = [cell for cell in results.shared(name, PLAIN) if all((each, cell.name) in results.found for each in FIXED)]
    mine = np.array([_saved(results, cell, name) for cell in cells])
    best = np.array([_best_saved(results, cell) for cell in cells])
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


def _loss(results: Results, cell: Cell, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By how much the log loss is higher than plain LoRA's, one a seed."""
    return np.asarray(results.found[name, cell.name].logs - results.found[PLAIN, cell.name].logs)


def _saved(results: Results, cell: Cell, name: str) -> float:
    return 1 - float(results.found[name, cell.name].step["step_ratio"])


def _best_saved(results: Results, cell: Cell) -> float:
    kept = [name for name in FIXED if float(_loss(results, cell, name).mean()) <= TOLERANCE]
    return max([0.0, *(_saved(results, cell, name) for name in kept)])


def savings_of(results: Results) -> dict[str, Saving]:
    """What each method saves, by name, as far as rows tell."""
    return {name: one for name in PLANS if (one := saving_of(results, name)) is not None}


def saving_blocks(results: Results, picture: str) -> list[Block]:
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
    lines = [line for name in OURS if name in found for line in _sentences(results, name)]
    described = "; ".join(f"`{method.name}`: {method.description}" for method in results.methods)
    return [
        Heading("What can be saved without losing anything", 1),
        Paragraph(
            "Written by `rankpilot bench methods-report --suite saving` from stored rows; run again with `rankpilot "
            f"bench methods --suite saving`. Each plan beside `{PLAIN}`, rank 8 on all linear modules: by how much the "
            "log of the held-out loss is higher, in per cent, both at a learning rate of their own, with paired seeds; "
            f"the cells in which it keeps within {TOLERANCE:.0%} and those in which it is off by more than {FAR:.0%}; "
            "the time of a step and the bytes as shares. Intervals are 95 %, by a bootstrap over tasks."
        ),
        Table(columns, rows),
        Picture(picture, "Loss of plans against the time of a step and against bytes"),
        *([Bullets(tuple(lines))] if lines else []),
        Heading("Plans"),
        Paragraph(f"{described}."),
    ]


def _sentences(results: Results, name: str) -> list[str]:
    lines = []
    share, usual = share_of_best(results, name), share_of_best(results, USUAL)
    if share and usual:
        lines.append(
            f"`{name}` gets {share:.0%} of the time that the best of {len(FIXED)} fixed plans saves in hindsight, the "
            f"best one that keeps the loss; always `{USUAL}` gets {usual:.0%}. "
            "Both count also where they do not keep it."
        )
    better = better_kind(results, name)
    if better:
        lines.append(f"`{name}` is better than the worse of `{KINDS[0]}` and `{KINDS[1]}` in {better:.0%} of the runs.")
    return lines


def saving_figures(results: Results) -> Figures:
    """The figures by flat name."""
    figures: Figures = {}
    for name, one in savings_of(results).items():
        for part, value in (("loss", one.loss), ("step", one.step), ("bytes", one.bytes)):
            figures |= estimate_figures(f"{name}.{part}", value)
        figures |= {f"{name}.worst": one.worst, f"{name}.kept": one.kept, f"{name}.far": one.far}
    for name in OURS:
        for part, found in (("share", share_of_best(results, name)), ("better_kind", better_kind(results, name))):
            figures |= estimate_figures(f"{name}.{part}", found) if found else {}
    return figures
