"""Each benchmark that takes seconds at a tiny size, run once; and how all of them take times."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.recording import BatchShape
from rankpilot.errors import ConfigError
from rich.console import Console

from benchmarks import env_speed, memory, overhead
from benchmarks.__main__ import run as run_benchmark
from benchmarks.env_speed import Load
from benchmarks.harness import (
    Figures,
    check_output,
    estimate_cycles,
    interleave,
    paired_ratios,
    run_command,
    usual_step,
    whole_cycle,
)
from benchmarks.memory import CALIBRATED, Setting, compare_plans
from benchmarks.models import Size
from benchmarks.overhead import Course, Result, run

CPU = torch.device("cpu")
METHODS = ("plain", "plain_again", "adalora", "rankpilot")


@pytest.mark.long
def test_the_overhead_of_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = tmp_path / "new" / "figures.json", {}

    def noted(family: Any, *given: Any, **options: Any) -> dict[str, Result]:
        found[family] = run(family, *given, **options)
        return found[family]

    tiny = Size(layers=2, width=32, vocabulary=64, rows=4, length=8)
    monkeypatch.setattr(overhead, "QUICK", (tiny, Course(cycles=2)))
    monkeypatch.setattr(overhead, "run", noted)
    with redirect_stdout(StringIO()) as printed:
        assert run_benchmark(["overhead", "--quick", "--device", "cpu", "--seed", "1", "--json", str(path)]) == 0
    assert "Bar 1.01: not for a quick run" in printed.getvalue()
    assert [item.name for item in path.parent.iterdir()] == ["figures.json"]
    figures = json.loads(path.read_text())
    assert figures["torch"] == version("torch")
    assert (figures["quick"], figures["seed"], figures["layers"], figures["cycles"]) == (True, 1, 2, 2)
    for name in (f"{family}.{method}" for family in ("bert", "llama") for method in METHODS[1:]):
        for kind in ("step_ratio", "cycle_ratio"):
            low, value, high = (figures[f"{name}.{kind}{end}"] for end in ("_low", "", "_high"))
            assert low <= value <= high
    for results in found.values():
        assert tuple(results) == METHODS
        plain, again, adalora, ours = (results[name] for name in METHODS)
        assert (plain.rank_changes, again.rank_changes) == (0, 0)
        assert adalora.rank_changes > 0
        assert plain.adapter_bytes == again.adapter_bytes < ours.adapter_bytes < adalora.adapter_bytes


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


@pytest.mark.long
def test_the_speed_of_a_tiny_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Load(steps=(4,), runs=(2,), rounds=1, base="llama-4x32", rows=2, length=8, eval_rows=4)
    monkeypatch.setattr(env_speed, "QUICK", tiny)
    path = tmp_path / "figures.json"
    assert run_benchmark(["env-speed", "--quick", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert (figures["quick"], figures["threads"], figures["rounds"]) == (True, 1, 1)
    rates = [figures[f"steps_4.{name}.train_steps_per_cpu_s"] for name in ("peft", "n2")]
    assert figures["steps_4.n2.over_peft"] == pytest.approx(rates[1] / rates[0])
    one, two = (figures[f"control.{name}.train_steps_per_cpu_s"] for name in ("n1", "n2"))
    assert figures["control.n2.over_one"] == pytest.approx(two / one)


# What they share ------------------------------------------------------------------------------------------------------


def test_interleave_times_each_call_and_leaves_out_what_comes_after_a_round() -> None:
    clock = [0.0]

    def take(seconds: float) -> None:
        clock[0] += seconds

    work = {"a": lambda turn: take(0.5 + turn), "b": lambda turn: take(2.0 + turn)}
    seconds = interleave(work, 3, CPU, after_round=lambda turn: take(100.0), clock=lambda: clock[0])
    assert seconds["a"].tolist() == [0.5, 1.5, 2.5]
    assert seconds["b"].tolist() == [2.0, 3.0, 4.0]


def test_a_decision_counts_with_a_tenth_and_a_minority_of_spikes_does_not() -> None:
    seconds, base = np.ones(90), np.ones(90)
    seconds[9::10] = 1.5
    ratios = paired_ratios(seconds, base, 10)
    assert estimate_cycles(ratios, usual_step).value == 1.0
    assert estimate_cycles(ratios, whole_cycle).value == 1.05
    ratios[np.arange(9), np.arange(9)] = 50.0  # one in each cycle, each at another place
    assert estimate_cycles(ratios, whole_cycle).value == 1.05
    with pytest.raises(ConfigError, match="15 rounds make no whole number of cycles of 10"):
        paired_ratios(np.ones(15), np.ones(15), 10)


@dataclass(frozen=True)
class Plain:
    """Options of a benchmark.

    Attributes:
        json: file for the figures.
    """

    json: Path | None = None


def test_a_command_that_fails_writes_no_figures(tmp_path: Path) -> None:
    def wrong(options: Plain, console: Console) -> Figures:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        run_command("wrong", Plain, wrong, ["--json", str(tmp_path / "figures.json")])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"Name a file in it"):
        check_output(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot make the folder"):
        check_output(tmp_path / "file" / "figures.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["overhead", "--quick", "--seed", "-1"], "--seed"),
        (["step-time", "--plans", "2"], "--plans is at least 3"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmark(arguments)
