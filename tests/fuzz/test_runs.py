"""Folders of runs: summary, metrics, settings and a Trainer's state, as pages and reports show them."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from rankpilot.agents.log import DecisionLog
from rankpilot.study.page import page_data, study_html
from rankpilot.study.run_data import MOST_NUMBER, check_summary, number_rows, read_run
from rankpilot.study.verdict import summary_table, verdict

from ..agents.test_log import make_record
from .damage import damaged_json, edited
from .running import fuzz

RESULT = {
    "held_out_loss": 0.38, "held_out_accuracy": 0.86, "adapter_parameters": 120_000, "peak_bytes": 91_000_000,
    "budget_bytes": 100_000_000, "median_step_s": 0.05, "train_s": 12.3, "steps": 100, "ranks": {"a": 4, "b": 0},
}  # fmt: skip

SUMMARY = {
    "model": "MiniLM", "data": "sst2", "policy": "pilot", "seed": 3, "held_out_rows": 100, "largest_class": 0.5,
    "runs": {"rankpilot": RESULT, "uniform": RESULT},
}  # fmt: skip

ROWS = [{"step": step, "loss": 1.0 - step / 100, "peak_bytes": 90_000_000, "eval_loss": 0.5} for step in range(4)]

TRAINER = {"global_step": 5, "log_history": [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.4}]}

Files = dict[str, bytes]


@cache
def small_log() -> dict[str, bytes]:
    """The files of a log of three decisions on three modules, by name."""
    with tempfile.TemporaryDirectory() as name:
        log = DecisionLog(Path(name))
        for number in range(3):
            log.append(make_record(number))
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


@st.composite
def folders(draw: st.DrawFn) -> Files:
    """The files of a run, some of them damaged; half of them of a Trainer alone."""
    files = {f"decisions/{name}": content for name, content in small_log().items()} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        return files | {"trainer_state.json": draw(damaged_json(TRAINER))}
    rows = b"\n".join(json.dumps(draw(edited(row))).encode() for row in ROWS)
    return files | {
        "summary.json": draw(damaged_json(SUMMARY)),
        "metrics-rankpilot.jsonl": rows,
        "config.json": draw(damaged_json({"model": "MiniLM", "budget": "100MiB", "time": "0.8s", "steps": 200})),
    }


@fuzz(folders(), examples=40)
def test_run_folders(files: Files) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            path = Path(name) / "run" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        run = read_run(Path(name) / "run")
        verdict(run)
        summary_table(run)
        study_html(page_data([run], [None]))


def test_rows_keep_their_numbers() -> None:
    lines: list[Any] = [{"step": 1, "loss": 0.5, "text": "x"}, 5, None, {"step": -1}, {"loss": True}, {"step": 2**60}]
    assert number_rows(lines) == [{"step": 1, "loss": 0.5}, {}, {}]


@pytest.mark.parametrize(
    "change",
    [
        {"runs": []},
        {"runs": {"rankpilot": 5}},
        {"runs": {"rankpilot": RESULT | {"held_out_loss": "low"}}},
        {"runs": {"rankpilot": RESULT | {"ranks": {"a": -1}}}},
        {"runs": {"rankpilot": RESULT | {"ranks": [1]}}},
        {"runs": {"rankpilot": RESULT | {"peak_bytes": MOST_NUMBER + 1}}},
        {"largest_class": "half"},
        {"largest_class": 1.5},
        {"held_out_rows": -1},
        {"outputs": "3); import os"},
        {"model": ["m"]},
    ],
)
def test_a_summary_of_something_else(change: dict[str, Any]) -> None:
    check_summary(SUMMARY)
    with pytest.raises((TypeError, AttributeError)):
        check_summary(SUMMARY | change)
