"""The memory benchmark: errors, plans, and one setting measured for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.recording import BatchShape
from rankpilot.errors import ConfigError
from rich.console import Console

from benchmarks.memory import (
    CALIBRATED,
    HALF_BUDGET,
    PLANS,
    REFERENCE,
    TOP_HALF,
    Errors,
    Options,
    Setting,
    accuracy,
    benchmark,
    compare_plans,
    guard,
    named_plans,
    random_plan,
    saved_bytes,
)
from benchmarks.models import ARCHITECTURES, Family

from ..cases import first_cases

CPU = torch.device("cpu")


def test_errors_are_signed_and_sized() -> None:
    errors = Errors.of([(110, 100), (95, 100), (100, 100)])
    assert errors is not None
    assert (errors.over, errors.under) == pytest.approx((0.1, -0.05))
    assert errors.median == pytest.approx(0.05)
    assert Errors.of([]) is None


def test_random_plans_adapt_something_and_differ_in_kind() -> None:
    generator, blocks = np.random.default_rng(0), np.repeat(np.arange(4), 7)
    plans = [random_plan(generator, blocks, turn) for turn in range(60)]
    assert all(plan.any() for plan in plans)
    assert any((plan > 0).all() for plan in plans)
    assert any((plan == 0).sum() > 20 for plan in plans)
    tops = [plan for plan in plans if plan[blocks == 0].sum() == 0 and plan[blocks == 3].all()]
    assert tops, "top layers only"


@pytest.mark.parametrize("checkpointing", first_cases(1, ["not reentrant", "none", "reentrant"]))
def test_one_setting_is_predicted_as_measured(checkpointing: str) -> None:
    setting = Setting("llama", checkpointing, "fp32")  # type: ignore[arg-type]
    result = compare_plans(setting, (CALIBRATED, BatchShape(3, 20)), 2, CPU, seed=0)
    assert len(result["plans"]) == 4
    assert [plan["calibrated"] for plan in result["plans"]] == [True, True, False, False]
    margin = {"none": 0.0, "not reentrant": 0.006, "reentrant": 0.021}[checkpointing]
    for plan in result["plans"]:
        predicted, measured = plan["peak"]
        assert measured <= predicted <= measured * (1 + margin) + 1
        assert (plan["saved"] is None) == (checkpointing != "none")
        if plan["saved"]:
            assert plan["saved"][0] == plan["saved"][1] > 0
    assert result["calibration_steps"] > 0


def test_saved_bytes_fall_with_the_adapted_layers() -> None:
    setting = Setting("gpt2", "none", "fp32")
    learner, batch = setting.learner(CPU, 0), setting.batch(BatchShape(2, 16), CPU, 0)
    whole = saved_bytes(learner, batch)
    learner.set_ranks([0] * (len(learner.targets) - 1) + [4])
    assert 0 < saved_bytes(learner, batch) < whole / 3


@pytest.mark.parametrize("family", first_cases(2, list(ARCHITECTURES)))
def test_watched_plans_are_what_their_names_say(family: Family) -> None:
    setting = Setting(family, "none", "fp32")
    learner = setting.learner(CPU, 0)
    cost = learner.calibrate(setting.batch(BatchShape(2, 16), CPU, 0)).cost()
    plans = named_plans(learner.targets, cost, 4)
    assert tuple(plans) == PLANS
    most = np.array([target.max_rank for target in learner.targets])
    np.testing.assert_array_equal(plans[REFERENCE], np.minimum(8, most))
    blocks = np.array([target.block for target in learner.targets])
    top = blocks >= np.unique(blocks)[-(2 + len(np.unique(blocks)) - 4)]
    np.testing.assert_array_equal(plans[TOP_HALF], np.where(top, np.minimum(16, most), 0))
    reference, half = (plan_cost(cost, plans[name]) for name in (REFERENCE, HALF_BUDGET))
    assert 0.3 * reference < half <= 0.5 * reference


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"device": "cuda"}])
def test_options_that_cannot_work(wrong: dict[str, Any]) -> None:
    if "device" in wrong and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError):
        benchmark(Options(quick=True, **wrong), Console())


def test_tables_are_printed_and_figures_are_flat(tmp_path: Path) -> None:
    plan = {"calibrated": True, "saved": [110, 100], "peak": [99, 100]}
    other = plan | {"calibrated": False, "saved": None, "peak": [100, 100]}
    results = {
        Setting("llama", "none", "fp32"): {"calibration_steps": 4.0, "plans": [plan]},
        Setting("llama", "reentrant", "bf16"): {"calibration_steps": 6.0, "plans": [other]},
    }
    watched = {"guard": {"step_ratio": [1.2, 1.1, 1.3], "look_share": 1e-5}}
    seen = {REFERENCE: {"predicted": 2**20, "resident": 2**21}}
    with (tmp_path / "tables.txt").open("w") as stream:
        console = Console(width=120, file=stream)
        figures = accuracy(results, console) | guard({"bert": watched | {"outside": seen}}, console)
    printed = (tmp_path / "tables.txt").read_text()
    assert "+10.000" in printed
    assert "2 MiB (+100.0%)" in printed
    assert figures["accuracy.plans"] == 2
    assert figures["accuracy.no_checkpointing.saved_error_over"] == pytest.approx(0.1)
    assert figures["accuracy.llama.reentrant.peak_error_median"] == 0
    assert figures["accuracy.all.fp32.peak_error_under"] == pytest.approx(-0.01)
    json.dumps(figures, allow_nan=False)
