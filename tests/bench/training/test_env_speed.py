"""Speed of the environment: figures and tables from known times, CPU time of children, phases, one small real run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rankpilot.bench.training import env_speed, env_speed_parts
from rankpilot.bench.training.env_speed import Extent, growth, linear_fit, main, phase_shares, race_figures, race_table
from rankpilot.bench.training.env_speed_parts import (
    REST,
    Contender,
    Load,
    PhaseClock,
    Result,
    cpu_seconds,
    measure_memory,
    phases_of,
    stacked_envs,
)
from rich.console import Console

TINY = Load(steps=4, rows=2, length=8, eval_rows=4, transitions=8)
SMALL = Extent(TINY, 1, 0, 2, False, ("llama-4x32",), (), 1, (), workers=1)
BURN = "import time\nwhile time.process_time() < 0.6: pass\nprint('done', flush=True)\ninput()"


def result(*cpu: float, steps: int = 64, **more: Any) -> Result:
    return Result(steps, np.array(cpu), 2 * np.array(cpu), **more)


@pytest.fixture(scope="module")
def contender() -> Contender:
    made = Contender(stacked_envs(TINY, "llama-4x32", 2), TINY.transitions)
    made.settled()
    return made


RESULTS = {
    "subproc": result(10.0, 16.0, 20.0),
    "stacked": result(2.0, 3.2, 4.0),
    "compiled": result(2.0, 3.2, 4.0, compile_seconds=61.0, unsettled=1),
}


def test_rates_and_ratios_of_known_times() -> None:
    figures = race_figures("llama-4x64", 16, RESULTS)
    assert figures["llama-4x64/n16/subproc/steps_per_cpu_s"] == 4.0
    assert figures["llama-4x64/n16/stacked/steps_per_cpu_s"] == pytest.approx(20.0)
    assert figures["llama-4x64/n16/stacked/steps_per_wall_s"] == pytest.approx(10.0)
    for end in ("", "_low", "_high"):
        assert figures[f"llama-4x64/n16/stacked_over_subproc{end}"] == pytest.approx(5.0)
    assert figures["llama-4x64/n16/compiled/compile_cpu_s"] == 61.0
    assert figures["llama-4x64/n16/compiled/unsettled_rounds"] == 1
    assert "llama-4x64/n16/subproc_over_subproc" not in figures
    json.dumps(figures, allow_nan=False)


def test_a_ratio_is_of_env_steps_not_of_iterations() -> None:
    assert result(2.0, steps=128).over(result(10.0)).value == pytest.approx(10.0)


def test_the_table_shows_ratios_beside_targets(tmp_path: Path) -> None:
    with (tmp_path / "table.txt").open("w") as stream:
        Console(width=160, file=stream).print(race_table("llama-4x64", Extent(workers=2, rounds=3), RESULTS))
    text = (tmp_path / "table.txt").read_text()
    assert text.startswith("llama-4x64, 4 x 16 tokens, 5 train steps an env step, PPO included")
    peft, stacked, compiled = (next(row for row in text.splitlines() if part in row) for part in ROWS)
    assert "4.00" in peft
    assert "250.0 ms" in peft
    assert "5.00 (5.00 to 5.00)" in stacked
    assert ">= 4: kept" in stacked
    assert ">= 6: missed" in compiled


ROWS = ("SubprocVecEnv, 2 processes", "StackedVecEnv, 16 episodes", "the same, compiled")


def test_growth_of_known_times() -> None:
    rates = {
        (f"llama-{depth}x{width}", n): n / (0.1 * depth * width**0.5 * n**0.25)
        for depth, width in ((4, 32), (4, 64), (8, 64))
        for n in (1, 8, 32)
    } | {("bert-4x64", 1): 1e9}
    found = growth(rates, stacked=True)
    assert found == pytest.approx(
        {"layers": 2.0, "width": 2**0.5, "n": 2**0.25, "largest_deviation": 0.0}, rel=1e-6, abs=1e-6
    )
    assert set(growth({("llama-4x32", 1): 2.0, ("llama-4x64", 1): 1.0}, stacked=False)) == {
        "width",
        "largest_deviation",
    }
    assert growth({("llama-4x64", 1): 1.0}, stacked=False) == {}


def test_a_line_and_what_is_off_it() -> None:
    assert linear_fit({1: 110, 4: 140, 16: 260}) == pytest.approx({"start": 100, "each": 10, "largest_deviation": 0})
    assert linear_fit({1: 10, 2: 20, 3: 90})["largest_deviation"] > 0.2


def test_cpu_time_of_children_counts_while_they_live_and_after() -> None:
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        alive = cpu_seconds() - before
        child.communicate(b"\n")
    ended = cpu_seconds() - before
    assert 0.5 < alive < 2
    assert alive <= ended + 0.02


def test_an_inner_phase_stops_the_outer_one() -> None:
    times = iter([0.0, 1.0, 3.0, 7.0])
    clock = PhaseClock(lambda: next(times))
    inner = clock.timed("inner", lambda: None)
    with clock.phase("outer"):
        inner()
    assert clock.seconds == {"outer": 5.0, "inner": 2.0}
    assert phase_shares(clock.seconds) == pytest.approx({"outer": 5 / 7, "inner": 2 / 7})


def test_phases_add_up_to_the_whole(contender: Contender) -> None:
    train = contender.model.train
    seconds = phases_of(contender, 2)
    whole = sum(contender.iterate()[0] for _ in range(2))
    assert 0.3 < sum(seconds.values()) / whole < 3, "as much as without timers, up to the noise of small times"
    assert all(value > 0 for value in seconds.values()), "each method is still called by its name"
    assert seconds[REST] < 0.2 * sum(seconds.values())
    assert contender.model.train.__func__ is train.__func__  # type: ignore[attr-defined]


def test_iterations_that_compile_are_made_again(contender: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = iter([0, 1, 1, 1, *range(2 * env_speed_parts.COMPILE_ATTEMPTS)])
    monkeypatch.setattr(env_speed_parts, "_graphs", lambda: next(graphs))
    monkeypatch.setattr(contender, "iterate", lambda: (2.0, 3.0))
    monkeypatch.setattr(contender, "compile_seconds", 0.0)
    monkeypatch.setattr(contender, "unsettled", 0)
    assert contender.settled() == (2.0, 3.0)
    assert (contender.compile_seconds, contender.unsettled) == (2.0, 0)
    contender.settled()
    assert contender.unsettled == 1


def test_an_iteration_is_whole_episodes_of_each(contender: Contender) -> None:
    assert contender.steps == contender.model.n_steps * 2 == 8
    assert contender.model.batch_size == 8


def test_buffers_grow_linearly_and_weights_are_there_once() -> None:
    seen = {runs: measure_memory(TINY, "llama-4x32", runs) for runs in (1, 2, 4)}
    assert linear_fit({runs: found["buffer_bytes"] for runs, found in seen.items()})["largest_deviation"] < 1e-6
    assert len({found["base_bytes"] for found in seen.values()}) == 1


def fake_race(
    contenders: Mapping[str, Any], rounds: int, after_round: Callable[[int], None] | None = None
) -> dict[str, Result]:
    return {name: result(10.0 if name == "subproc" else 2.0) for name in contenders}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time is known, and nothing is trained."""
    monkeypatch.setattr(env_speed, "race", fake_race)
    monkeypatch.setattr(env_speed, "Contender", lambda envs, transitions: SimpleNamespace(envs=envs))
    for name in ("subproc_envs", "stacked_envs"):
        monkeypatch.setattr(env_speed, name, lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(env_speed, "phases_of", lambda contender, rounds: {"PPO update": 1.0, REST: 3.0})
    monkeypatch.setattr(env_speed, "memory_of", lambda load, base, runs: {"buffer_bytes": 10 * runs, "base_bytes": 5})


@pytest.mark.usefixtures("no_work")
def test_the_full_command_writes_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env_speed, "BASES_FOLDER", tmp_path)
    for base in ("llama-4x64", "bert-4x64", "llama-8x64"):
        (tmp_path / base).mkdir()
        (tmp_path / base / "model.safetensors").touch()
    monkeypatch.setattr(env_speed, "find_compiler", lambda: "g++")
    path = tmp_path / "figures.json"
    assert main(["--json", str(path)]) == 0
    printed, figures = capsys.readouterr().out, json.loads(path.read_text())
    assert figures["llama-4x64/n16/compiled_over_subproc"] == 5.0
    assert figures["llama-4x64/n16/phases/PPO update"] == 0.25
    assert figures["sweep/bert-4x64/n32/stacked_over_subproc"] == 5.0
    assert figures["growth/stacked/n"] == pytest.approx(2.0)
    assert figures["memory/n16/buffer_bytes"] == 160
    assert figures["memory/buffer_bytes/each"] == pytest.approx(10.0)
    assert (figures["steps"], figures["rows"], figures["length"]) == (20, 4, 16)
    assert "Bases without weights here, left out: llama-4x32, gpt2-4x64." in printed
    assert "unknown" in printed, "where the resident set cannot be read"


@pytest.mark.usefixtures("no_work")
def test_without_a_compiler_the_compiled_row_is_left_out_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env_speed, "find_compiler", lambda: None)
    monkeypatch.setattr(env_speed, "FULL", Extent(long_rounds=0, sweep_runs=(), memory_runs=()))
    path = tmp_path / "figures.json"
    assert main(["--json", str(path)]) == 0
    assert "no C++ compiler" in capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert "no C++ compiler" in figures["llama-4x64/n16/compiled/skipped"]
    assert "llama-4x64/n16/compiled/steps_per_cpu_s" not in figures


@pytest.mark.slow
def test_a_small_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(env_speed, "QUICK", SMALL)
    path = tmp_path / "figures.json"
    assert main(["--quick", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    for name in ("subproc", "stacked"):
        assert figures[f"llama-4x32/n2/{name}/steps_per_cpu_s"] > 0
    assert figures["llama-4x32/n2/stacked_over_subproc"] > 0
    assert sum(value for key, value in figures.items() if "/phases/" in key) == pytest.approx(1.0)
    assert (figures["quick"], figures["workers"], figures["transitions"]) == (True, 1, 8)
    assert "SubprocVecEnv, 1 processes" in capsys.readouterr().out


def test_a_folder_is_no_file_for_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json", "."]) == 1
    assert "Name a file" in capsys.readouterr().err


def test_help_teaches() -> None:
    command = [sys.executable, "-m", "rankpilot.bench.training.env_speed", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for part in ("--quick", "--json", "SubprocVecEnv", "CPU time"):
        assert part in done.stdout
