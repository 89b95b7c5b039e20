"""A small run of the benchmark that checks explanations."""

from __future__ import annotations

import io
import json

import pytest
from rankpilot.bench.study import Options, benchmark
from rankpilot.errors import ConfigError
from rich.console import Console


@pytest.mark.usefixtures("one_thread")
def test_all_that_is_said_of_decisions_is_true() -> None:
    shown = io.StringIO()
    figures = benchmark(Options(tasks=1, statements=3), Console(file=shown, width=120))
    assert figures["decisions"] == figures["redecided_bit_equal"] == figures["shapley_decisions"]
    assert figures["statements"] == figures["statements_true"] == 3
    assert float(figures["shapley_error"]) < 1e-6
    assert "statements_true" in shown.getvalue()
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("options", [Options(tasks=0), Options(statements=0)])
def test_options_out_of_range(options: Options) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        benchmark(options, Console(file=io.StringIO()))


def test_a_rule_has_no_votes_to_check() -> None:
    with pytest.raises(ConfigError, match="top-down has no value ensemble"):
        benchmark(Options(policy="top-down"), Console(file=io.StringIO()))
