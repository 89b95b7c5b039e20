"""The plans of the benchmark, and its figures on given times; no time is measured here."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.errors import ConfigError
from rich.console import Console

from benchmarks.step_time import Options, accuracy, benchmark, random_plans


def test_errors_and_order() -> None:
    figures = accuracy(np.array([1.1, 1.8, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 5.0]))
    assert figures["median_error"] == pytest.approx(0.1)
    assert figures["worst_error"] == pytest.approx(0.2)
    assert figures["mean_error"] == pytest.approx(-0.05)
    assert figures["rank_correlation"] == pytest.approx(1)
    assert (figures["least_s"], figures["most_s"]) == (1, 5)
    assert accuracy(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"] == pytest.approx(-1)


def test_plans_differ_in_all_that_counts() -> None:
    blocks, most = np.repeat(np.arange(10), 7), np.full(70, 48)
    plans = random_plans(blocks, most, [f"layer{index}" for index in range(10)], 60, np.random.default_rng(0))
    assert len(plans) == 60
    assert all(ranks.any() and ranks.max() <= 48 for ranks, _ in plans)
    assert {int(blocks[ranks > 0].min()) for ranks, _ in plans} >= set(range(8)), "depths"
    assert {len(layers) for _, layers in plans} >= {0, 10}
    assert sum(0 < len(layers) < 10 for _, layers in plans) > 10
    assert sum(len(set(ranks[ranks > 0].tolist())) == 1 for ranks, _ in plans) > 15, "one rank"
    assert sum(len(set(ranks[ranks > 0].tolist())) > 3 for ranks, _ in plans) > 10, "many ranks"


@pytest.mark.parametrize("options", [Options(plans=2), Options(models=0), Options(rounds=0)])
def test_options_out_of_range(options: Options) -> None:
    with pytest.raises(ConfigError, match="--plans is at least 3"):
        benchmark(options, Console())
