"""What happens before the first step, as shares of a run: one small real measurement, and bad options."""

from __future__ import annotations

import io
import json

import pytest
from rankpilot.bench import start
from rankpilot.bench.models import Size
from rankpilot.bench.start import QUICK, Case, Options, benchmark
from rankpilot.errors import ConfigError
from rich.console import Console


def test_shares_are_of_the_whole_run(tiny: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = QUICK.values()
    monkeypatch.setattr(start, "QUICK", {"tiny": Case(case.family, tiny, case.base)})
    shown = io.StringIO()
    figures = benchmark(Options(steps=50, timed=2, quick=True), Console(file=shown, width=130))
    both = figures["tiny.calibration_s"] + figures["tiny.probe_s"]
    assert figures["tiny.share"] == pytest.approx(both / (50 * figures["tiny.step_s"]))
    assert figures["tiny.share"] == pytest.approx(figures["tiny.calibration_share"] + figures["tiny.probe_share"])
    assert figures["tiny.calibration_s"] > 0
    assert figures["tiny.probe_s"] > 0
    assert "shares of 50 steps" in shown.getvalue()
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("options", [Options(steps=0), Options(timed=0)])
def test_options_out_of_range(options: Options) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        benchmark(options, Console(file=io.StringIO()))
