"""A small run of the benchmark that checks explanations."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rankpilot.bench import study
from rankpilot.bench.study import Options, benchmark
from rankpilot.env.tasks.proxy_task import ProxyTask
from rankpilot.env.tasks.suites import find_tasks
from rankpilot.errors import ConfigError
from rankpilot.study.decision.stability import stability
from rich.console import Console


def short_tasks(*given: Any) -> tuple[ProxyTask, ...]:
    """The tasks of suites with fewer steps."""
    return tuple(replace(task, steps=8) for task in find_tasks(*given))


@pytest.mark.usefixtures("one_thread")
def test_all_that_is_said_of_decisions_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "find_tasks", short_tasks)
    monkeypatch.setattr(study, "stability", lambda *given: stability(*given[:-1], draws=4))
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
