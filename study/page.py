"""The study page as one self-contained file: its data as plain JSON, with its text, style and code."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.drawing import finite_points
from ..common.errors import DataError, install
from ..common.files import read_object, read_shapes, write_text
from ..common.text import format_bytes, module_kinds, short_names
from ..decide.log import DecisionRecord
from ..decide.observation import MODULE_FEATURES
from ..finetune.options import PILOT
from ..lora.spec import DEFAULT_RANKS
from ..report.memory import saver_rows
from .run_data import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunData, is_number, moves_sentence, run_names, standing_out
from .verdict import comparison_rows, cost_sentence, loss_sentence, ranks_sentence, verdict

Explanations = Sequence[Mapping[str, Any] | None]

MOST_CHARACTERS = 2_000_000
"""Characters of JSON above which modules are shown by type."""
FACTS = (
    "loss", "limit", "predicted_cost", "measured_cost", "rank_floor", "depth_bias", "filled", "kept", "correction",
)  # fmt: skip
"""Facts of a decision shown unchanged; see `DecisionRecord.facts`."""

ROW_CHARACTERS = 50
"""Measured characters of JSON per module at a decision."""

MOST_POINTS = 1500
"""More points than fit on a wide screen; longer curves are thinned to this number."""

MOST_PLANS = 24
"""Maximum number of plans of one decision on a page, the best for the goal."""

NOT_MEASURED = f"not measured: no energy counter is available (on NVIDIA: {install('energy')})"

LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
"""PEFT's classes that load an adapter with its base model, by the adapter's task."""

NO_ADAPTER = "#e9e9e9"
RANK_COLORS = "e5e419 addc30 75d054 46c06f 27ad81 1f998a 25848e 2d718e 375b8d 414287 482979 460b5e"
"""Color of each rank of the default ladder: matplotlib's viridis at 12 evenly spaced points from light to dark, without
its ends. It suits color-blind readers.
"""

_KEPT = ("verdict", "sentences", "policy", "first", "goal", "parts", "what_ifs")


def page_data(runs: Sequence[RunData], explanations: Sequence[Explanations | None]) -> dict[str, Any]:
    """Return the contents of a page about some runs.

    Args:
        runs: one at least.
        explanations: explanations of each run's decisions in any order, as `Explanation.to_json` gives them; None for a
            decision or run without.
    """
    rows = sum(len(record.modules) for run in runs for record in run.decisions)
    by_type = rows * ROW_CHARACTERS > MOST_CHARACTERS
    named = zip(runs, explanations, run_names(runs), strict=True)
    colors = [list(bytes.fromhex(color)) for color in RANK_COLORS.split()]
    palette = {"ranks": list(DEFAULT_RANKS[1:]), "colors": colors, "none": NO_ADAPTER}
    shown = [_run(run, explained or (), name, by_type) for run, explained, name in named]
    return {"by_type": by_type, "palette": palette, "runs": shown}


def _run(run: RunData, explained: Explanations, name: str, by_type: bool) -> dict[str, Any]:
    opinion, settings, modules = verdict(run), _settings(run), Modules.of(run.decisions, by_type)
    rows = [{"label": label, "cells": cells, "best": sorted(best)} for label, cells, best in comparison_rows([run])]
    shown = {
        "name": name,
        "subject": " on ".join(settings[key] for key in ("model", "data") if key in settings),
        **{kind: list(sentences) for kind, sentences in vars(opinion).items()},
        "left_out": [" ".join(part.split()) for part in run.missing],  # an error may have several lines
        "table": {"columns": list(run.results), "rows": rows},
        "adapter": _adapter(run),
        "settings": settings,
        "unit": run.unit,
        "predicted_of": run.predicted_of,
        "steps": run.steps,
        "savers": saver_rows(run.saved) if run.saved else [],
        "energy_joules": plain(run.results.get(PILOT, {}).get("energy_joules")),
        "modules": modules.shown,
        "features": list(MODULE_FEATURES) if run.decisions else [],
        "decisions": _decisions(run, modules, explained, by_type),
    }
    return shown | _curves(run) | {"sentences": _sentences(run)}


def _settings(run: RunData) -> dict[str, str]:
    """Return the settings of a run from its folder, values as text."""
    config = _read_if_valid(run.folder / "config.json")
    known = {key: run.summary[key] for key in ("model", "data", "policy", "seed") if run.summary.get(key) is not None}
    if run.decisions:
        known = {"policy": run.decisions[0].policy, "seed": run.decisions[0].seed} | known
    known |= _hardware(run.results.get(PILOT, {}))
    return {str(key): str(value) for key, value in (config | known).items() if value not in (None, [], {})}


def _read_if_valid(path: Path) -> dict[str, Any]:
    """Read a JSON file containing an object; empty if it is missing, foreign or truncated."""
    with suppress(OSError, ValueError):
        return read_object(path)
    return {}


def _hardware(result: Mapping[str, Any]) -> dict[str, str]:
    """Describe the hardware of a run and its energy meter, by name; empty for runs before 0.2.

    Args:
        result: result of one run in `summary.json`.
    """
    facts = result.get("hardware")
    if not facts:
        return {}
    busy = "" if facts.get("busy") is None else f", {facts['busy']:.0%} busy"
    free, total = (format_bytes(facts.get(name) or 0) for name in ("free_bytes", "total_bytes"))
    device = f"{facts.get('device')}; {free} of {total} free at the start{busy}"
    return {"device": device, "energy": result.get("energy_source") or NOT_MEASURED}


def _adapter(run: RunData) -> dict[str, str] | None:
    """Return the adapter's path, and code to load, merge and export it; None if there is none."""
    folder = run.adapter
    if folder is None:
        return None
    config = _read_if_valid(folder / ADAPTER_CONFIG)
    base, outputs = config.get("base_model_name_or_path"), run.summary.get("outputs", _outputs(folder, config))
    loader = LOADERS.get(str(config.get("task_type")), "AutoPeftModel") if base else "PeftModel"
    options = f", num_labels={outputs}" if type(outputs) is int and base else ""  # no other text gets into the code
    given = "" if base else "base_model, "
    return {
        "folder": str(folder),
        "base": str(base) if base else "the fine-tuned model",
        "load": f"from peft import {loader}\n\nmodel = "
        f"{loader}.from_pretrained({given}{str(folder)!r}{options})\nmerged = model.merge_and_unload()  # "
        "the base model with the adapter merged into its weights, for save_pretrained",
        "export": f"rankpilot export {quote(str(folder))} --output padded\n"
        f"rankpilot export {quote(str(folder))} --format rank-pattern",
    }


def _outputs(adapter: Path, config: Mapping[str, Any]) -> int | None:
    """Return the outputs of the head saved with an adapter, if any: those of `out_proj`, or the fewest."""
    names = config.get("modules_to_save")
    if not str(config.get("task_type")).endswith("_CLS") or not isinstance(names, list):
        return None
    with suppress(DataError):
        shapes, saved = read_shapes(adapter / ADAPTER_WEIGHTS).items(), set(map(str, names))
        heads = {key: shape[0] for key, shape in shapes if len(shape) == 2 and saved & set(key.split("."))}
        last = [count for key, count in heads.items() if ".out_proj." in key]
        return min(last or heads.values(), default=None)
    return None


def _curves(run: RunData) -> dict[str, Any]:
    """Return losses, costs and times by step."""
    losses, seconds = {}, {}
    for name in run.metrics:
        parts = {"train": curve(run.points(name, "loss")), "held_out": curve(run.points(name, "eval_loss"))}
        if any(parts.values()):
            losses[name] = parts
        medians = [(step, float(np.median(values))) for step, values in run.points(name, "step_s") if values]
        if points := curve(medians, np.median):
            seconds[name] = points
    return {
        "losses": losses,
        "peaks": {name: curve(points, np.max) for name, points in run.peaks().items()},
        "race": {rate: curve(points) for rate, points in run.race.curves.items()} if run.race else {},
        "budgets": curve(run.limits),
        "predicted": curve(run.predicted(), np.max),
        "step_seconds": seconds,
    }


def _sentences(run: RunData) -> dict[str, str]:
    """Describe each picture in words."""
    said = {"costs": cost_sentence(run)} if run.limits else {}
    if run.decisions:
        modules = run.decisions[-1].modules
        same = [record.rank_after for record in run.decisions if record.modules == modules]
        said["ranks"] = ranks_sentence(np.stack(same), modules)
    held_out = {name: finite_points(run.points(name, "eval_loss")) for name in run.metrics}
    if run.metrics:
        said["losses"] = loss_sentence({name: float(points[-1, 1]) for name, points in held_out.items() if len(points)})
    return said


def _decisions(run: RunData, modules: Modules, explained: Explanations, by_type: bool) -> list[dict[str, Any]]:
    by_number = {each["decision"]: each for each in explained if each}
    shown = []
    for record, slots in zip(run.decisions, modules.slots, strict=True):
        explanation = shown_explanation(by_number.get(record.number))
        told = {"summary": moves_sentence(record, run.predicted_of), "explanation": explanation}
        row = _decision(record, modules, slots) | told
        shown.append(row if by_type else row | _of_single_modules(record, modules, slots))
    return shown


def _decision(record: DecisionRecord, modules: Modules, slots: IntArray) -> dict[str, Any]:
    """Return the facts of a decision, without those of single modules."""
    facts = record.facts()
    return {
        "number": record.number,
        "step": record.step,
        "policy": record.policy,
        "line": record.line(),
        "moved": int(np.count_nonzero(record.rank_before != record.rank_after)),
        "changed": int(np.count_nonzero(record.rank_clipped != record.rank_after)),
        **{name: plain(facts[name]) for name in FACTS},
        "measures": record.measures,
        "before": modules.means(record.rank_before, slots),
        "asked": modules.means(record.rank_wanted, slots),
        "clipped": modules.means(record.rank_clipped, slots),
        "after": modules.means(record.rank_after, slots),
        "score": modules.means(record.decision.scores, slots, 3),
    }


def _of_single_modules(record: DecisionRecord, modules: Modules, slots: IntArray) -> dict[str, Any]:
    """Return reasons as (feature, standard deviations), notes, and pinned modules."""
    reasons: list[list[list[float]]] = [[] for _ in modules.shown]
    for slot, pairs in zip(slots.tolist(), standing_out(record), strict=True):
        reasons[slot] = [[MODULE_FEATURES.index(name), round(distance, 1)] for name, distance in pairs]
    notes = ((slot, record.notes.get(name)) for slot, name in zip(slots.tolist(), record.modules, strict=True))
    told = {str(slot): note for slot, note in notes if note}
    return {"reasons": reasons, "notes": told, "pinned": slots[record.problem.is_pinned].tolist()}


# Modules: those of a log, or in a long log one for each type ----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Modules:
    """The modules of a log, or their types; S of them are shown.

    Attributes:
        shown: entries for the page: name, shortened name (label), layer, block, type, and number of modules
            represented.
        slots: entry of each module at each decision, int (modules,) per decision.
    """

    shown: list[dict[str, Any]]
    slots: tuple[IntArray, ...]

    @classmethod
    def of(cls, records: Sequence[DecisionRecord], by_type: bool) -> Modules:
        """Collect the modules of some decisions, which may differ between decisions.

        Args:
            records: records of the decisions.
            by_type: show one entry per module type.
        """
        if not records:
            return cls([], ())
        blocks: dict[str, int] = {}
        for record in records:
            blocks |= zip(record.modules, record.problem.blocks.tolist(), strict=True)
        shorts = short_names(list(blocks))
        kinds = module_kinds(shorts)
        entries = kinds if by_type else list(blocks)
        place = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
        slot_of = {name: place[entry] for name, entry in zip(blocks, entries, strict=True)}
        shown = [
            {"name": name, "label": str(short), "layer": short.layer, "block": block, "type": kind, "count": 1}
            for (name, block), short, kind in zip(blocks.items(), shorts, kinds, strict=True)
        ]
        if by_type:
            alike = {"layer": "", "block": 0}
            shown = [{"name": kind, "label": kind, **alike, "type": kind, "count": kinds.count(kind)} for kind in place]
        slots = (np.array([slot_of[name] for name in record.modules], dtype=np.int64) for record in records)
        return cls(shown, tuple(slots))

    def means(
        self, values: Sequence[float] | FloatArray | IntArray, slots: IntArray, digits: int = 2
    ) -> list[float | int | None]:
        """Return means over the rows of one decision for each shown module; null without rows.

        Args:
            values: value of each row, (rows,); non-finite ones are unknown.
            slots: entry of each row, int (rows,).
            digits: digits after the decimal point.
        """
        counts = np.bincount(slots, minlength=len(self.shown))
        totals = np.bincount(slots, weights=np.asarray(values, dtype=np.float64), minlength=len(self.shown))
        with np.errstate(invalid="ignore"):
            return numbers(totals / counts, digits)


# Explanations: all but the plans that nobody would look at ------------------------------------------------------------


def shown_explanation(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return an explanation for the page; None without one.

    Args:
        given: see docs/study.md; any key may be missing or None.
    """
    if not given:
        return None
    kept = {key: plain(given[key]) for key in _KEPT if given.get(key) is not None}
    if plans := given.get("plans") or []:
        shown = [
            {key: value for key, value in plan.items() if key != "ranks"} | {"taken": place == given.get("taken")}
            for place, plan in enumerate(plans)
            if place < MOST_PLANS or place == given.get("taken") or plan.get("fits") is False  # this is plain LoRA
        ]
        kept |= {"plans": plain(shown), "plans_in_all": len(plans)}
    return kept


# Curves: rising steps, few points, no value that JSON cannot write ----------------------------------------------------


def curve(points: Iterable[tuple[Any, Any]], of_each: Callable[[FloatArray], Any] = np.mean) -> dict[str, Any] | None:
    """Return a curve as plain JSON; None without a point.

    Args:
        points: (step, value), in any order; for repeated steps, as after a resumption, the later value counts.
        of_each: reduces the points that a thinned curve merges.

    Returns:
        "x", ascending steps, "y", values or null if not finite, and "each", the number of points merged into one.
    """
    known = {float(step): float(value) for step, value in points if is_number(step) and is_number(value)}
    if not known:
        return None
    table = np.array(sorted(known.items()))
    each = math.ceil(len(table) / MOST_POINTS)
    if each == 1:
        return {"x": numbers(table[:, 0]), "y": numbers(table[:, 1], None), "each": 1}
    parts = [table[start : start + each] for start in range(0, len(table), each)]
    values = [of_each(part[np.isfinite(part[:, 1]), 1]) if np.isfinite(part[:, 1]).any() else np.nan for part in parts]
    return {"x": numbers([part[-1, 0] for part in parts]), "y": numbers(values, None), "each": each}


def numbers(values: Sequence[float] | FloatArray, digits: int | None = 2) -> list[float | int | None]:
    """Return values as short JSON: integers if whole, rounded otherwise, and null if not finite.

    Args:
        values: any shape (n,).
        digits: digits after the decimal point; None for six significant ones.
    """
    return [_short(value, digits) for value in np.asarray(values, dtype=np.float64).tolist()]


def plain(value: Any) -> Any:
    """Convert lists, dicts and scalars to valid JSON values: null for non-finite numbers."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | float | np.number):
        return _short(float(value), None)
    return value if value is None else str(value)


def _short(value: float, digits: int | None) -> float | int | None:
    if not math.isfinite(value):
        return None
    if value.is_integer():
        return int(value)
    return float(f"{value:.6g}") if digits is None else round(value, digits)


ASSETS = Path(__file__).parent / "assets"

STYLES = ("uplot/uPlot.min.css", "page.css")
SCRIPTS = (
    "uplot/uPlot.iife.min.js", "elements.js", "heatmap.js", "charts.js", "evidence.js", "decisions.js", "page.js",
)  # fmt: skip
"""In execution order; each uses definitions of those before it."""


def study_html(data: Mapping[str, Any]) -> str:
    """Return the page of some runs.

    Args:
        data: see `page_data`.
    """
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0)
    style, script = ("\n".join(map(_asset, names)) for names in (STYLES, SCRIPTS))
    parts = {"style": style, "script": script, "data": base64.b64encode(packed).decode("ascii")}
    # In one pass: inserted text may look like a placeholder.
    return re.sub(r"\{\{(style|script|data)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def write_page(data: Mapping[str, Any], path: Path) -> None:
    """Write the page of some runs; equal data give equal bytes.

    Args:
        data: see `page_data`.
        path: path of the page; an existing file is replaced.
    """
    write_text(path, study_html(data))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
