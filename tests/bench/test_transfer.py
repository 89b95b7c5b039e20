"""The transfer benchmark: pairs, figures, what goes on after an interruption, bad options; one quick run for real."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.learned.network import RankNetwork
from rankpilot.agents.learned.policy_file import WEIGHTS, save_policy
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.bench import transfer
from rankpilot.bench.ledger import Ledger
from rankpilot.bench.main import run as bench
from rankpilot.bench.transfer import (
    BUDGETS,
    FULL,
    QUICK,
    RATES,
    Course,
    Options,
    figures_of,
    pairs_of,
    run_piece,
)
from rankpilot.common.files import sha256
from rankpilot.common.workers import isolated
from rankpilot.errors import ConfigError, UnknownNameError
from rankpilot.finetune import experiment
from rankpilot.finetune.config import UNIFORM, FinetuneConfig
from rich.console import Console

COURSE = Course(
    {"rotten-tomatoes": {"40%": 1e-3, "80%": 2e-3}, "reuters-r8": {"40%": 3e-3, "80%": 4e-3}}, 2, 3, 8, held_out_rows=16
)
CONSOLE = Console(file=io.StringIO())


def made_up(piece: FinetuneConfig) -> dict[str, Any]:
    """Policy "a" is 10 % better everywhere; "b" 5 % worse on one data set and equal on the other."""
    loss = 0.5 + 0.1 * piece.seed + float(piece.budget.rstrip("%")) / 1000
    factor = {"a": 0.9, "b": 1.05 if piece.data == "reuters-r8" else 1.0}.get(piece.policy, 1.0)
    result: dict[str, Any] = {
        "held_out_loss": loss * factor,
        "held_out_accuracy": 0.8 + 0.01 * (piece.policy == "a"),
        "adapter_parameters": 1000,
        "peak_bytes": 90,
        "budget_bytes": 100.0,
        "median_step_s": 0.2 if piece.policy == UNIFORM else 0.3,
        "guess": math.log(2),
    }
    return result if piece.policy == UNIFORM else result | {"reload": {"identical": piece.seed == 0}}


def results(*policies: str) -> dict[FinetuneConfig, dict[str, Any]]:
    return {piece: made_up(piece) for piece in COURSE.runs(policies)}


def test_all_runs_of_a_comparison_are_paired() -> None:
    pieces = COURSE.runs(("a", "b"))
    assert len(set(pieces)) == len(pieces) == 2 * 2 * 2 * 3
    assert [piece.policy for piece in pieces[:3]] == [UNIFORM, "a", "b"]
    assert len({replace(piece, policy="") for piece in pieces[:3]}) == 1
    assert all(piece.learning_rate == COURSE.rates[piece.data][piece.budget] for piece in pieces)
    outcomes = {piece: made_up(piece) for piece in pieces}
    for policy in ("a", "b"):
        pairs = list(pairs_of(outcomes, policy))
        assert len(pairs) == 8
        for piece, run, uniform_run in pairs:
            assert piece.policy == policy
            assert run == outcomes[piece]
            assert uniform_run == outcomes[replace(piece, policy=UNIFORM)]


def test_figures() -> None:
    outcomes = results("a", "b")
    good = figures_of("a", list(pairs_of(outcomes, "a")))
    assert good["a.runs"] == 8
    assert (good["a.better"], good["a.better_low"], good["a.better_high"]) == (1, 1, 1)
    for name in ("log_loss_gain", "log_loss_gain_low", "log_loss_gain_high"):
        assert good[f"a.{name}"] == pytest.approx(-math.log(0.9))
    assert good["a.accuracy_gain"] == pytest.approx(0.01)
    assert (good["a.one_percent_worse"], good["a.over_budget"], good["a.identical_reloads"]) == (0, 0, 4)
    assert good["a.worst_ratio"] == pytest.approx(0.9)
    assert good["a.step_ratio"] == pytest.approx(1.5)
    bad = figures_of("b", list(pairs_of(outcomes, "b")))
    assert bad["b.better"] == 0.25
    assert bad["b.one_percent_worse"] == 4
    assert bad["b.log_loss_gain"] == pytest.approx(-math.log(1.05) / 2)
    low, high = float(bad["b.log_loss_gain_low"]), float(bad["b.log_loss_gain_high"])
    assert low < -math.log(1.05) / 2 < high


def test_a_run_above_its_budget_is_told() -> None:
    piece = COURSE.runs(("a",))[1]
    pair = piece, made_up(piece) | {"peak_bytes": 101}, made_up(replace(piece, policy=UNIFORM))
    assert figures_of("a", [pair])["a.over_budget"] == 1


def test_a_run_that_diverges_loses_and_counts_as_a_guess() -> None:
    outcomes = results("a")
    first = next(piece for piece in outcomes if piece.policy == "a")
    outcomes[first] = {"held_out_loss": None, "guess": math.log(2)}
    figures = figures_of("a", list(pairs_of(outcomes, "a")))
    assert figures["a.better"] == pytest.approx(7 / 8)
    assert (figures["a.diverged"], figures["a.one_percent_worse"]) == (1, 1)
    uniform = float(outcomes[replace(first, policy=UNIFORM)]["held_out_loss"])
    expected = (-7 * math.log(0.9) + math.log(uniform) - math.log(math.log(2))) / 8
    assert figures["a.log_loss_gain"] == pytest.approx(expected)
    assert figures["a.worst_ratio"] == pytest.approx(math.log(2) / uniform)
    assert figures["a.accuracy_gain"] == pytest.approx(0.01), "of the runs that ended"
    shown = io.StringIO()
    Console(file=shown, width=200).print(transfer._runs_table("a", list(pairs_of(outcomes, "a"))))
    assert shown.getvalue().count("diverged") == 1


@pytest.fixture(scope="module")
def _tokenised_once() -> Iterator[None]:
    """Short runs spend much of their time on the same tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "load_workload", lru_cache(transfer.load_workload))
        yield


@pytest.mark.assets
@pytest.mark.usefixtures("_tokenised_once")
def test_a_rate_that_is_too_high_diverges() -> None:
    _, piece = QUICK.runs(("signal-mean",))
    assert run_piece(replace(piece, learning_rate=1e30)) == {"held_out_loss": None, "guess": math.log(2)}


def test_an_interrupted_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[FinetuneConfig] = []

    def stop_at_seven(piece: FinetuneConfig) -> dict[str, Any]:
        started.append(piece)
        if len(started) == 7:
            raise KeyboardInterrupt
        return made_up(piece)

    monkeypatch.setattr(transfer, "run_piece", stop_at_seven)
    monkeypatch.setattr(transfer, "FULL", COURSE)
    options = Options(policies=("signal-mean",), json=tmp_path / "figures.json", workers=1)
    with pytest.raises(KeyboardInterrupt):
        transfer.benchmark(options, CONSOLE)
    with pytest.raises(ConfigError, match="Go on with --resume"):
        transfer.benchmark(options, CONSOLE)
    figures = transfer.benchmark(replace(options, resume=True), CONSOLE)
    pieces = COURSE.runs(("signal-mean",))
    assert len(started) == len(pieces) + 1, "only the run that failed is repeated"
    assert figures["signal-mean.runs"] == 8
    ledger = Ledger(tmp_path / "figures.json", resume=True)
    assert all(ledger.get([asdict(piece), None]) == made_up(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ConfigError, "--workers is at least 1"),
        ({"policies": ()}, ConfigError, "--policies names at least one"),
        ({"policies": ("signal-mean", "signal-mean")}, ConfigError, "none twice"),
        ({"policies": ("uniform",)}, ConfigError, "leave it out"),
        ({"policies": ("signal-man",)}, UnknownNameError, "signal-mean"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options(**options).check()


def test_resume_needs_a_file() -> None:
    with pytest.raises(ConfigError, match="--json FILE"):
        transfer.benchmark(Options(policies=("signal-mean",), resume=True), CONSOLE)


def test_runs_are_told_apart_by_the_weights(trained: Path) -> None:
    weights = Options(policies=(str(trained), "signal-mean")).weights()
    assert weights == {str(trained): sha256(trained / WEIGHTS)}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return save_policy(tmp_path / "policy", RankNetwork(), DecisionSchedule(), {"name": "mine"})


def test_budgets_and_data_of_the_full_run() -> None:
    pieces = FULL.runs(("default",))
    assert {(piece.data, piece.learning_rate) for piece in pieces} == set(RATES.items())
    assert {piece.budget for piece in pieces} == set(BUDGETS)


@pytest.mark.assets
@pytest.mark.usefixtures("_tokenised_once")
@pytest.mark.long
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    assert bench(["transfer", "--quick", "--policies", "signal-mean", "--workers", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["quick"] is True
    assert figures["signal-mean.runs"] == figures["signal-mean.identical_reloads"] == 1
    assert figures["signal-mean.over_budget"] == 0
    assert "signal-mean against uniform rank" in capsys.readouterr().out
    piece, _ = QUICK.runs(("signal-mean",))
    # The adapter of the first run has been loaded in another process; the second one is compared with the first.
    monkeypatch.setattr(experiment, "check_reload", lambda *_: {"identical": True})
    with isolated():
        again, stored = run_piece(piece), Ledger(path, resume=True).get([asdict(piece), None])
    assert again["held_out_loss"] == stored["held_out_loss"], "the same seed, the same run"
    assert again["ranks"] == stored["ranks"]
