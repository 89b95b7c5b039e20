"""Statistics on known inputs, and the order of an interleaved run."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.common.arrays import FloatArray
from rankpilot.common.text import make_table
from rankpilot.errors import ConfigError
from rankpilot.training import results as statistics
from rankpilot.training.results import Estimate, Statistic
from rich.console import Console

from benchmarks.harness import (
    Figures,
    check_output,
    estimate_cycles,
    interleave,
    machine_facts,
    paired_ratios,
    run_command,
    turn_order,
    usual_step,
    whole_cycle,
)

CPU = torch.device("cpu")


def cycles_of(*, count: int, decision: float) -> np.ndarray:
    """Ratios of a method that costs nothing but a decision at the last of ten places."""
    ratios = np.ones((count, 10))
    ratios[:, -1] = decision
    return ratios


@given(count=st.integers(1, 9), turn=st.integers(0, 50))
def test_every_round_holds_everyone_once(count: int, turn: int) -> None:
    assert sorted(turn_order(count, turn)) == list(range(count))


def test_the_order_of_four() -> None:
    assert [turn_order(4, turn) for turn in range(5)] == [
        (0, 1, 3, 2),
        (1, 2, 0, 3),
        (2, 3, 1, 0),
        (3, 0, 2, 1),
        (0, 1, 3, 2),
    ]


@pytest.mark.parametrize("count", [2, 4, 6])
def test_everyone_takes_each_place_and_follows_each_other_equally_often(count: int) -> None:
    rounds = [turn_order(count, turn) for turn in range(count)]
    assert all(sorted(places) == list(range(count)) for places in zip(*rounds, strict=True))
    followed = [pair for order in rounds for pair in pairwise(order)]
    assert len(set(followed)) == count * (count - 1) == len(followed)


def value_of(ratios: FloatArray, statistic: Statistic) -> float:
    return float(statistic(ratios, np.ones((1, len(ratios)), dtype=np.int64))[0])


def test_interleave_calls_in_turn_and_times_each_call() -> None:
    clock = [0.0]
    calls: list[tuple[str, int]] = []

    def work(name: str, cost: float) -> object:
        def step(turn: int) -> None:
            calls.append((name, turn))
            clock[0] += cost + turn

        return step

    def after_round(turn: int) -> None:
        calls.append(("after", turn))
        clock[0] += 100.0

    seconds = interleave(
        {"a": work("a", 0.5), "b": work("b", 2.0)}, 3, CPU, after_round=after_round, clock=lambda: clock[0]
    )
    assert calls == [
        *[("a", 0), ("b", 0), ("after", 0)],
        *[("b", 1), ("a", 1), ("after", 1)],
        *[("a", 2), ("b", 2), ("after", 2)],
    ]
    assert seconds["a"].tolist() == [0.5, 1.5, 2.5]
    assert seconds["b"].tolist() == [2.0, 3.0, 4.0]


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    before = gc.get_freeze_count()
    assert before > 0, "the tests freeze the libraries"
    interleave({"nothing": lambda turn: None}, 1, CPU)
    assert gc.get_freeze_count() >= before


def test_ratios_are_paired_by_round() -> None:
    ratios = paired_ratios(np.array([2.0, 6.0, 3.0, 4.0]), np.array([1.0, 2.0, 6.0, 4.0]), 2)
    assert ratios.tolist() == [[2.0, 3.0], [0.5, 1.0]]


@pytest.mark.parametrize("rounds", [0, 15])
def test_half_a_cycle_is_refused(rounds: int) -> None:
    with pytest.raises(ConfigError, match=f"{rounds} rounds make no whole number of cycles of 10"):
        paired_ratios(np.ones(rounds), np.ones(rounds), 10)


def test_a_decision_counts_with_a_tenth_in_the_cycle_and_not_in_the_usual_step() -> None:
    ratios = cycles_of(count=6, decision=1.5)
    assert estimate_cycles(ratios, usual_step) == Estimate(1.0, 1.0, 1.0)
    assert estimate_cycles(ratios, whole_cycle) == Estimate(1.05, 1.05, 1.05)


def test_spikes_in_a_minority_of_cycles_do_not_count() -> None:
    ratios = cycles_of(count=9, decision=1.5)
    for cycle in range(4):
        ratios[cycle] = 50.0
    assert value_of(ratios, whole_cycle) == 1.05
    # Every cycle has a spike, each at another place: the ratio of whole cycles' times would be 5.9.
    ratios = cycles_of(count=9, decision=1.5)
    ratios[np.arange(9), np.arange(9)] = 50.0
    assert value_of(ratios, whole_cycle) == 1.05


def test_statistics_of_many_draws_at_once() -> None:
    """Each draw is what it is alone: the cycles that it holds, as often as it holds them."""
    generator = np.random.default_rng(0)
    ratios, counts = generator.uniform(0.9, 1.2, (7, 10)), generator.multinomial(7, np.full(7, 1 / 7), size=20)
    drawn = [np.repeat(ratios, count, axis=0) for count in counts]
    np.testing.assert_allclose(usual_step(ratios, counts), [np.median(draw) for draw in drawn])
    np.testing.assert_allclose(whole_cycle(ratios, counts), [np.median(draw, axis=0).mean() for draw in drawn])


def test_an_interval_holds_the_value_and_narrows_with_more_cycles() -> None:
    noise = np.random.default_rng(1).normal(1.02, 0.05, (400, 10))
    few, many = estimate_cycles(noise[:8], whole_cycle), estimate_cycles(noise, whole_cycle)
    assert few.low < few.value < few.high
    assert many.low < 1.02 < many.high
    assert many.high - many.low < (few.high - few.low) / 4
    assert estimate_cycles(noise[:8], whole_cycle) == few


def test_the_interval_of_identical_methods_holds_one_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 400)
    draws = np.random.default_rng(2).lognormal(0, 0.1, (200, 2, 100))
    inside = 0
    for seconds, base in draws:
        ratio = estimate_cycles(paired_ratios(seconds, base, 10), whole_cycle)
        inside += ratio.low <= 1 <= ratio.high
    assert 0.9 <= inside / 200 <= 1


def test_facts_name_versions_and_threads() -> None:
    facts = machine_facts(CPU)
    assert facts["torch"] == version("torch")
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == "cpu"
    assert all(facts[name] for name in ("rankpilot", "peft", "transformers", "chip"))


def test_output_is_checked_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "figures.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(ConfigError, match=r"Name a file in it"):
        check_output(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot make the folder"):
        check_output(tmp_path / "file" / "figures.json")


@dataclass(frozen=True)
class Plain:
    """Options of a benchmark.

    Attributes:
        json: file for the figures.
    """

    json: Path | None = None


def test_a_command_writes_its_figures_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fine(options: Plain, console: Console) -> Figures:
        console.print("a table")
        return {"a.ratio": 1.5}

    def wrong(options: Plain, console: Console) -> Figures:
        raise ConfigError("no such thing")

    path = tmp_path / "figures.json"
    run_command("fine", Plain, fine, [])
    assert not path.exists()
    run_command("fine", Plain, fine, ["--json", str(path)])
    assert json.loads(path.read_text()) == {"a.ratio": 1.5}
    assert capsys.readouterr().out == "a table\na table\n"
    path.unlink()
    with pytest.raises(ConfigError, match="no such thing"):
        run_command("wrong", Plain, wrong, ["--json", str(path)])
    assert list(tmp_path.iterdir()) == []


def test_table_holds_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(make_table("title", ("name", "figure"), [("first", "1.5"), ("second", "2.5")]))
    text = capsys.readouterr().out
    assert all(part in text for part in ("title", "name", "figure", "first", "1.5", "second", "2.5"))
