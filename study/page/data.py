"""What the study page shows, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...allocation.features import MODULE_FEATURES
from ...allocation.log import DecisionRecord
from ...common.arrays import IntArray
from ...common.files import read_json
from ...common.rank_grid import NO_ADAPTER, RUNGS, rank_colors
from ...errors import BudgetError
from ...finetune.config import PILOT
from ...memory.time_budget import TimeBudget
from ..run.comparison import comparison_rows
from ..run.decisions import moves_sentence, standing_out
from ..run.figures import loss_sentence
from ..run.hardware import hardware_of
from ..run.heatmap import ranks_sentence
from ..run.memory_figure import cost_sentence
from ..run.run_data import RunData, run_names
from ..run.verdict import verdict
from .curves import curve, plain
from .explanation import shown_explanation
from .modules import Modules

Explanations = Sequence[Mapping[str, Any] | None]

MOST_CHARACTERS = 2_000_000
"""Characters of JSON above which modules are shown by type."""
FACTS = (
    "loss", "limit", "predicted_cost", "measured_cost", "rank_floor", "depth_bias", "expected", "uncertainty", "margin",
    "tie_size", "filled", "kept", "correction",
)  # fmt: skip
"""Facts of a decision that a page shows as they are; see `DecisionRecord.facts`."""

ROW_CHARACTERS = 50
"""Characters of JSON that a module takes at a decision, measured."""


def page_data(runs: Sequence[RunData], explanations: Sequence[Explanations | None]) -> dict[str, Any]:
    """What a page about some runs shows.

    Args:
        runs: one at least.
        explanations: of each run's decisions in any order, see docs/study.md; None for a decision or a run without.
    """
    rows = sum(len(record.modules) for run in runs for record in run.decisions)
    by_type = rows * ROW_CHARACTERS > MOST_CHARACTERS
    named = zip(runs, explanations, run_names(runs), strict=True)
    return {
        "by_type": by_type,
        "palette": _palette(),
        "runs": [_run(run, explained or (), name, by_type) for run, explained, name in named],
    }


def _palette() -> dict[str, Any]:
    """The colours of all pictures of ranks."""
    colors = np.rint(255 * rank_colors(np.array(RUNGS))).astype(int).tolist()
    return {"ranks": list(RUNGS), "colors": colors, "none": NO_ADAPTER}


def _run(run: RunData, explained: Explanations, name: str, by_type: bool) -> dict[str, Any]:
    opinion, settings = verdict(run), _settings(run)
    modules = Modules.of(run.decisions, by_type)
    shown = {
        "name": name,
        "subject": " on ".join(settings[key] for key in ("model", "data") if key in settings),
        "warnings": list(opinion.warnings),
        "results": list(opinion.results),
        "left_out": [" ".join(part.split()) for part in run.missing],  # an error may have several lines
        "table": {
            "columns": list(run.results),
            "rows": [
                {"label": label, "cells": cells, "best": sorted(best)} for label, cells, best in comparison_rows([run])
            ],
        },
        "settings": settings,
        "unit": run.unit,
        "steps": run.steps,
        "energy_joules": plain(run.results.get(PILOT, {}).get("energy_joules")),
        "modules": modules.shown,
        "features": list(MODULE_FEATURES) if run.decisions else [],
        "decisions": _decisions(run.decisions, modules, explained, by_type),
    }
    return shown | _curves(run) | {"sentences": _sentences(run)}


def _settings(run: RunData) -> dict[str, str]:
    """The settings of a run as its folder gives them, values as text."""
    path = run.folder / "config.json"
    try:
        config = read_json(path) if path.is_file() else {}
    except ValueError:  # cut off in the middle, or no JSON
        config = {}
    if not isinstance(config, dict):
        config = {}
    known = {key: run.summary[key] for key in ("model", "data", "policy", "seed") if run.summary.get(key) is not None}
    if run.decisions:
        known = {"policy": run.decisions[0].policy, "seed": run.decisions[0].seed} | known
    known |= hardware_of(run.results.get(PILOT, {}))
    return {str(key): str(value) for key, value in (config | known).items() if value not in (None, [], {})}


def _time_limit(settings: Mapping[str, str]) -> float | None:
    """The limit of a step's time in seconds; None without one, or if it is a share."""
    try:
        limit = TimeBudget.parse(settings["time"])
    except (KeyError, BudgetError):
        return None
    return limit.value if limit.kind == "seconds" else None


def _curves(run: RunData) -> dict[str, Any]:
    """Losses, costs and times over the steps."""
    losses = {}
    for name in run.metrics:
        parts = {"train": curve(run.points(name, "loss")), "held_out": curve(run.points(name, "eval_loss"))}
        if any(parts.values()):
            losses[name] = parts
    seconds = {}
    for name in run.metrics:
        points = [(step, float(np.median(values))) for step, values in run.points(name, "step_s") if values]
        seconds[name] = curve(points, np.median)
    return {
        "losses": losses,
        "peaks": {name: curve(points, np.max) for name, points in run.peaks().items()},
        "budgets": curve(run.limits),
        "predicted": curve(run.predicted(), np.max),
        "step_seconds": {name: points for name, points in seconds.items() if points},
        "time_limit_s": _time_limit(_settings(run)),
    }


def _sentences(run: RunData) -> dict[str, str]:
    """What each picture shows, in words."""
    said = {}
    if run.decisions:
        said["ranks"] = ranks_sentence(run.decisions[-1].rank_after)
    ends = {}
    for name in run.metrics:
        held_out = [value for _, value in run.points(name, "eval_loss") if np.isfinite(value)]
        if held_out:
            ends[name] = held_out[-1]
    if run.metrics:
        said["losses"] = loss_sentence(ends)
    if run.limits:
        peaks = run.peaks() if run.unit == "bytes" else {}
        said["costs"] = cost_sentence(peaks, run.limits, run.predicted(), run.unit, run.steps)
    return said


def _decisions(
    records: Sequence[DecisionRecord], modules: Modules, explained: Explanations, by_type: bool
) -> list[dict[str, Any]]:
    by_number = {each["decision"]: each for each in explained if each}
    shown = []
    for record, slots in zip(records, modules.slots, strict=True):
        given = by_number.get(record.number)
        decision = _decision(record, modules, slots) | {"explanation": shown_explanation(given)}
        if not by_type:
            decision |= _of_single_modules(record, modules, slots, given)
        shown.append(decision)
    return shown


def _decision(record: DecisionRecord, modules: Modules, slots: IntArray) -> dict[str, Any]:
    """What is known of a decision, without what only single modules have."""
    facts = record.facts()
    return {
        "number": record.number,
        "step": record.step,
        "policy": record.policy,
        "line": record.line(),
        "summary": moves_sentence(record),
        "moved": int(np.count_nonzero(record.rank_before != record.rank_after)),
        "changed": int(np.count_nonzero(record.rank_clipped != record.rank_after)),
        **{name: plain(facts[name]) for name in FACTS},
        "before": modules.means(record.rank_before, slots),
        "asked": modules.means(record.rank_wanted, slots),
        "clipped": modules.means(record.rank_clipped, slots),
        "after": modules.means(record.rank_after, slots),
        "score": modules.means(record.decision.scores, slots, 3),
    }


def _of_single_modules(
    record: DecisionRecord, modules: Modules, slots: IntArray, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Reasons as (feature, standard deviations), notes, pinned modules, and whether a module's rank is sure."""
    reasons: list[list[list[float]]] = [[] for _ in modules.shown]
    for slot, pairs in zip(slots.tolist(), standing_out(record), strict=True):
        reasons[slot] = [[MODULE_FEATURES.index(name), round(distance, 1)] for name, distance in pairs]
    notes = ((slot, record.notes.get(name)) for slot, name in zip(slots.tolist(), record.modules, strict=True))
    sure = ((given or {}).get("stability") or {}).get("sure")
    return {
        "reasons": reasons,
        "notes": {str(slot): note for slot, note in notes if note},
        "pinned": slots[record.problem.is_pinned].tolist(),
        "sure": modules.means(sure, slots) if sure is not None and len(sure) == len(slots) else None,
    }
