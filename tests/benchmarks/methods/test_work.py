"""Real runs of a few steps: every way to train, the same bit for bit when repeated, and the loop that all share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.methods.policies import identity
from benchmarks.methods.registry import perform
from benchmarks.methods.rows import Work, plan_ranks
from benchmarks.methods.texts import load_data

from ...cases import first_cases
from .made_up import TASK as SHORT

TASK = replace(SHORT, data="french", steps=16, rows=4, length=24, held_out=16)
PLAN = "0x8 4x8"
TIMES = ("curve", "setup_s", "train_s", "step_s", "cpu_s", "energy_j")

pytestmark = [pytest.mark.assets, pytest.mark.usefixtures("one_thread")]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    losses = [(step, loss) for step, _, loss in row["curve"]]
    return {name: value for name, value in row.items() if name not in TIMES} | {"losses": losses}


@pytest.mark.parametrize(
    ("trainer", "arguments"),
    first_cases(
        5,
        [
            ("rslora", {"plan": PLAN}),
            ("pilot", {"budget": "50%", "recompute": True, **identity("signal-mean")}),
            ("adalora", {"plan": PLAN, "target": 3}),
            ("eva", {"plan": "0x8 8x8"}),
            ("gora", {"plan": "0x8 8x8"}),
            ("lora", {"plan": PLAN}),
            ("pilot", {"budget": "60%", **identity("signal-mean")}),
        ],
    ),
)
def test_every_way_to_train(trainer: str, arguments: dict[str, Any]) -> None:
    work = Work.of("train", TASK, trainer=trainer, rate=4e-3, seed=1, **arguments)
    row = perform(work)
    assert 0 < row["loss"] < row["untrained_loss"]
    assert row["parameters"] > 0
    ranks = plan_ranks(row["ranks"])
    assert len(ranks) == 16
    assert ranks[8:].any()
    assert ranks[:4].any() == ("recompute" in arguments), "where layers run again there is room for the lowest"
    assert [step for step, _, _ in row["curve"]] == [0, 8, 16]
    if trainer != "pilot":
        assert untimed(perform(work)) == untimed(row), "the same work gives the same row"
    if trainer == "adalora":
        assert ranks.sum() == 3 * 8
        assert row["moved"] > 0
    if trainer == "pilot":
        assert row["measured"] <= row["limit"]
        assert row["breaches"] == 0


def test_rows_for_tuning_are_no_rows_of_results() -> None:
    data = load_data(TASK)
    tuning, held_out = ({tuple(row) for row in part["input_ids"]} for part in (data.tuning, data.held_out))
    assert len(tuning) == len(held_out) == TASK.held_out
    assert not tuning & held_out
