"""What the shipped policy is to reach: the page says what the stored rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rankpilot.bench.aims import Aim, Options, benchmark, page
from rich.console import Console

PAGE = Path(__file__).parents[2] / "docs" / "aims.md"


def test_the_page_in_the_docs_is_what_the_stored_rows_say(tmp_path: Path) -> None:
    figures = benchmark(Options(page=tmp_path / "aims.md"), Console(quiet=True))
    assert (tmp_path / "aims.md").read_text() == PAGE.read_text()
    verdicts = re.findall(r"\| (yes|no|in part) \|$", PAGE.read_text(), re.M)
    assert len(verdicts) == figures["aims"] >= 15
    assert verdicts.count("yes") == figures["reached"]


@pytest.mark.parametrize(
    ("reached", "verdict"),
    [((True, True), "yes"), ((True, False), "in part"), ((False,), "no"), ((False, False), "no")],
)
def test_a_line_says_whether_all_parts_of_a_bar_are_reached(reached: tuple[bool, ...], verdict: str) -> None:
    aim = Aim("loss", "at most 1 %", "+.5 %", reached)
    assert aim.line() == f"| loss | at most 1 % | +.5 % | {verdict} |"
    told = page([aim, Aim("time", "at most .8", ".7", (True,))])
    assert f"{1 + all(reached)}\nof 2 are reached" in told
