"""Best learning rates by rank: the search on known losses, the modules of a placement, one small real measurement."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rankpilot.bench import scaling
from rankpilot.bench.scaling import Options, benchmark, search, setting_of
from rankpilot.bench.scaling_runs import Setting, Subject, chosen, log_loss
from rankpilot.errors import ConfigError, UnknownNameError
from rich.console import Console

TINY = Subject("llama-4x32", None, "tales", 6, 2, 16, 8, 1e-2, (1, 8), ("top half",))


@pytest.mark.parametrize("best", [1e-4, 3.1e-3, 0.04])
def test_the_lowest_point_of_a_parabola_is_found(best: float) -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return 1.0 + 0.1 * math.log2(rate / best) ** 2

    found = search(loss, 2e-3)
    assert found.rate == pytest.approx(best, rel=1e-6)
    assert abs(math.log2(found.at / best)) <= 0.5
    assert len(asked) == len(set(asked)) == len(found.losses), "no rate is tried twice"


def test_beside_divergence_the_grid_point_is_the_best() -> None:
    found = search(lambda rate: math.inf if rate > 5e-3 else -math.log(rate), 2e-3)
    assert found.rate == found.at == 4e-3


def test_a_search_ends() -> None:
    assert search(lambda rate: -rate, 1.0).at == 2.0**scaling.FARTHEST


def test_rules_agree_at_rank_8_alone() -> None:
    assert {setting_of(rule, 8).scaling for rule in scaling.RULES} == {2.0}
    assert [setting_of(rule, 32).scaling for rule in scaling.RULES] == [0.5, 1.0, 2.0]


def test_modules_of_placements() -> None:
    parts = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    bert = [(f"bert.encoder.layer.{layer}.{part}", layer) for layer in range(6) for part in parts]
    llama = [
        (f"model.layers.{layer}.{part}", layer) for layer in range(6) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    for targets in (bert, llama):
        every = [name for name, _ in targets]
        attention, mlp = chosen(targets, "attention"), chosen(targets, "mlp")
        assert sorted(attention + mlp) == sorted(every)
        assert len(attention) == len(mlp) == len(every) // 2
        assert all("att" in name for name in attention)
        assert chosen(targets, "top half") == every[len(every) // 2 :]
        assert chosen(targets, "top quarter") == every[len(every) * 4 // 6 :]
        assert chosen(targets, "all") == every


def test_a_run_is_repeatable_and_ranks_differ() -> None:
    first, other = log_loss(TINY, Setting(), 1e-2, 0), log_loss(TINY, Setting(placement="top half"), 1e-2, 0)
    assert log_loss(TINY, Setting(), 1e-2, 0) == first != other
    assert log_loss(TINY, Setting(), 1e-2, 1) != first
    # One step of rank 16 at a quarter of the scaling is not one at all of it.
    assert log_loss(TINY, setting_of("alpha", 16), 1e-2, 0) != log_loss(TINY, setting_of("constant", 16), 1e-2, 0)
    assert log_loss(TINY, Setting(), 1e4, 0) > first


def test_figures_and_resuming(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "QUICK", {"tiny": TINY})
    file, shown = tmp_path / "figures.json", io.StringIO()
    figures = benchmark(Options(quick=True, json=file), Console(file=shown, width=130))
    json.dumps(figures, allow_nan=False)
    for rule in scaling.RULES:
        assert figures[f"tiny.{rule}.cells"] == 1
        assert float(figures[f"tiny.{rule}.range"]) >= 0
        assert figures[f"tiny.{rule}.best_rate.8"] == figures["tiny.alpha.best_rate.8"]
        assert rule in shown.getvalue()
    assert figures["tiny.placement.top_half.share"] == 0.5
    monkeypatch.setattr(scaling, "log_loss", None)  # all of it is in the ledger
    assert benchmark(Options(quick=True, json=file, resume=True), Console(file=io.StringIO())) == figures


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="--seeds is at least 1; got 0"):
        Options(seeds=0).check()
    with pytest.raises(UnknownNameError, match="minilm"):
        Options(subjects=("minilm4",)).check()
