"""The command: figures, table, verdict, files, errors."""

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
from rankpilot.errors import ConfigError
from rich.console import Console

from benchmarks import overhead
from benchmarks.__main__ import run as run_benchmark
from benchmarks.harness import usual_step, whole_cycle
from benchmarks.models import Size
from benchmarks.overhead import PERIOD, Course, Result, figures_of, run, table_of, verdict

METHODS = ("plain", "plain_again", "adalora", "rankpilot")
HELD = ("step_ms", "adapter_bytes", "peak_bytes", "rank_changes")
RATIOS = (
    *("step_ratio", "step_ratio_low", "step_ratio_high"),
    *("cycle_ratio", "cycle_ratio_low", "cycle_ratio_high"),
    *("total_ratio", "own_share", "own_share_of_a_step"),
)


@dataclass(frozen=True)
class Command:
    """The command on tiny models, once for all tests: what it returned, printed, and found, and its file of figures."""

    status: int
    printed: str
    path: Path
    results: dict[str, dict[str, Result]]


@pytest.fixture(scope="module")
def command(tiny: Size, short: Course, tmp_path_factory: pytest.TempPathFactory) -> Command:
    torch.manual_seed(0)
    path, found = tmp_path_factory.mktemp("overhead") / "new" / "figures.json", {}

    def noted(family: Any, *given: Any, **options: Any) -> dict[str, Result]:
        found[family] = run(family, *given, **options)
        return found[family]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(overhead, "QUICK", (tiny, short))
        patch.setattr(overhead, "run", noted)
        status = run_benchmark(["overhead", "--quick", "--device", "cpu", "--seed", "1", "--json", str(path)])
    return Command(status, printed.getvalue(), path, found)


@pytest.fixture
def results(command: Command) -> dict[str, Result]:
    return command.results["bert"]


def result(*, step: float = 1.0, own: float = 0.0, decision: float = 0.0, noise: float = 0.0) -> Result:
    """Four cycles with a decision at the end of each."""
    own_seconds = np.tile([own] * (PERIOD - 1) + [decision], 4)
    seconds = step + own_seconds + noise * np.random.default_rng(0).standard_normal(4 * PERIOD)
    return Result(seconds, own_seconds, adapter_bytes=1024, peak_bytes=2048, rank_changes=3, setup_seconds=1.5)


def test_a_course_warms_up_times_whole_cycles_and_measures_last() -> None:
    course = Course(cycles=3)
    assert list(course.timed) == list(range(10, 40))
    assert course.measured == 45
    assert course.steps == 46
    assert course.planned > course.steps


def test_a_run_has_all_methods_and_whole_cycles(results: dict[str, Result], short: Course) -> None:
    assert tuple(results) == METHODS
    for each in results.values():
        assert each.seconds.shape == each.own_seconds.shape == (short.cycles * PERIOD,)
        assert (each.own_seconds < each.seconds).all()
        assert each.peak_bytes > each.adapter_bytes > 0


def test_only_rankpilot_and_adalora_change_ranks_and_hold_more(results: dict[str, Result]) -> None:
    plain, again, adalora, ours = (results[name] for name in METHODS)
    assert (plain.rank_changes, again.rank_changes) == (0, 0)
    assert ours.rank_changes > 0
    assert adalora.rank_changes > 0
    assert plain.adapter_bytes == again.adapter_bytes
    assert plain.peak_bytes == again.peak_bytes
    assert plain.adapter_bytes < ours.adapter_bytes < adalora.adapter_bytes
    assert plain.setup_seconds == 0 < ours.setup_seconds


def test_decisions_are_in_the_last_step_of_a_cycle(results: dict[str, Result]) -> None:
    """Not a bar on time: a decision is hundreds of times the work of taking in a step's signals."""
    by_place = np.median(results["rankpilot"].own_seconds.reshape(-1, PERIOD), axis=0)
    assert int(by_place.argmax()) == PERIOD - 1


def test_ratios_and_own_share_of_known_times() -> None:
    plain, ours = result(step=2.0), result(step=2.0, decision=0.4)
    assert ours.against(plain, usual_step).value == 1.0
    assert ours.against(plain, whole_cycle).value == pytest.approx(1.02)
    assert ours.own_share(plain) == pytest.approx(0.02)
    assert ours.own_share_of_a_step(plain) == 0.0
    assert result(step=2.0, own=0.01).own_share_of_a_step(plain) == pytest.approx(0.005)


def test_figures_are_flat_and_complete(results: dict[str, Result]) -> None:
    figures = figures_of("bert", results)
    wanted = {f"bert.{name}.{key}" for name in METHODS for key in HELD}
    wanted |= {f"bert.{name}.{key}" for name in METHODS[1:] for key in RATIOS}
    assert set(figures) == wanted | {"bert.rankpilot.setup_seconds"}
    for name in METHODS[1:]:
        for kind in ("step_ratio", "cycle_ratio"):
            low, value, high = (figures[f"bert.{name}.{kind}{end}"] for end in ("_low", "", "_high"))
            assert low <= value <= high
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("decision", "noise", "word"), [(0.05, 0.0, "kept"), (0.5, 0.0, "missed"), (0.1, 0.05, "undecided")]
)
def test_the_verdict_names_the_side_of_the_bar(decision: float, noise: float, word: str) -> None:
    text = verdict("bert", {"plain": result(), "rankpilot": result(decision=decision, noise=noise)}, quick=False)
    assert f"Bar 1.01: {word}" in text
    assert "1.5 s, once" in text
    quick = verdict("bert", {"plain": result(), "rankpilot": result()}, quick=True)
    assert "Bar 1.01: not for a quick run" in quick


@pytest.mark.parametrize(("own", "word"), [(0.005, "kept"), (0.006, "missed")])
def test_the_verdict_names_the_side_of_the_bar_of_own_work(own: float, word: str) -> None:
    results = {"plain": result(), "rankpilot": result(own=own)}
    assert f"{own:.2%} of plain LoRA's step. Bar 0.5%: {word}" in verdict("bert", results, quick=False)
    assert "Bar 0.5%: not for a quick run" in verdict("bert", results, quick=True)


def test_the_table_shows_each_method(results: dict[str, Result], tmp_path: Path) -> None:
    with (tmp_path / "table.txt").open("w") as stream:
        Console(width=100, file=stream).print(table_of("bert: tiny", results))
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert lines[0].startswith("bert: tiny")
    rows = [line for line in lines if any(label in line for label in overhead.LABELS.values())]
    assert len(rows) == 4
    assert f" {results['rankpilot'].rank_changes} " in rows[3]
    assert not any("…" in line for line in lines)


def test_the_command_writes_all_figures(command: Command) -> None:
    assert command.status == 0
    assert "llama: 2 layers x 32" in command.printed
    assert "Bar 1.01" in command.printed
    figures = json.loads(command.path.read_text())
    assert [item.name for item in command.path.parent.iterdir()] == ["figures.json"]
    assert figures["torch"] == version("torch")
    assert (figures["quick"], figures["seed"], figures["layers"], figures["cycles"]) == (True, 1, 2, 2)
    assert {"bert.adalora.step_ratio", "llama.rankpilot.cycle_ratio", "peft", "threads", "device"} <= set(figures)


@pytest.mark.parametrize(("arguments", "message"), [(["--seed", "-1"], "--seed"), (["--json", "."], "Name a file")])
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmark(["overhead", "--quick", *arguments])
