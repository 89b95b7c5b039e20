"""Each benchmark that takes seconds at a tiny size, run once; and how all of them take times."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.cost.recording import BatchShape
from rich.console import Console

from benchmarks import harness, memory
from benchmarks.__main__ import run as run_benchmark
from benchmarks.memory import CALIBRATED, Setting, compare_plans

CPU = torch.device("cpu")


def test_one_setting_of_memory_is_predicted_as_measured() -> None:
    setting = Setting("llama", "not reentrant", "fp32")
    result = compare_plans(setting, (CALIBRATED, BatchShape(3, 20)), 2, CPU, seed=0)
    assert [plan["calibrated"] for plan in result["plans"]] == [True, True, False, False]
    for predicted, measured in (plan["peak"] for plan in result["plans"]):
        assert measured <= predicted <= measured * 1.006 + 1
    with Console(file=StringIO()) as console:
        figures = memory.accuracy({setting: result}, console)
    assert figures["accuracy.plans"] == 4
    assert 0 <= figures["accuracy.llama.not_reentrant.peak_error_over"] <= 0.006


# What they share ------------------------------------------------------------------------------------------------------


def test_interleave_times_each_call_and_leaves_out_what_comes_after_a_round() -> None:
    clock = [0.0]

    def take(seconds: float) -> None:
        clock[0] += seconds

    work = {"a": lambda turn: take(0.5 + turn), "b": lambda turn: take(2.0 + turn)}
    seconds = harness.interleave(work, 3, CPU, after_round=lambda turn: take(100.0), clock=lambda: clock[0])
    assert seconds["a"].tolist() == [0.5, 1.5, 2.5]
    assert seconds["b"].tolist() == [2.0, 3.0, 4.0]


def test_a_decision_counts_with_a_tenth_and_a_minority_of_spikes_does_not() -> None:
    seconds, base = np.ones(90), np.ones(90)
    seconds[9::10] = 1.5
    ratios = harness.paired_ratios(seconds, base, 10)
    assert harness.estimate_cycles(ratios, harness.usual_step).value == 1.0
    assert harness.estimate_cycles(ratios, harness.whole_cycle).value == 1.05
    ratios[np.arange(9), np.arange(9)] = 50.0  # one in each cycle, each at another place
    assert harness.estimate_cycles(ratios, harness.whole_cycle).value == 1.05
    with pytest.raises(ConfigError, match="15 rounds make no whole number of cycles of 10"):
        harness.paired_ratios(np.ones(15), np.ones(15), 10)


@dataclass(frozen=True)
class Plain:
    """Options of a benchmark.

    Attributes:
        json: file for the figures.
    """

    json: Path | None = None


def test_a_command_that_fails_writes_no_figures(tmp_path: Path) -> None:
    def wrong(options: Plain, console: Console) -> harness.Figures:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        harness.run_command("wrong", Plain, wrong, ["--json", str(tmp_path / "figures.json")])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"Name a file in it"):
        harness.check_output(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot make the folder"):
        harness.check_output(tmp_path / "file" / "figures.json")


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="--plans is at least 3"):
        run_benchmark(["step-time", "--plans", "2"])
