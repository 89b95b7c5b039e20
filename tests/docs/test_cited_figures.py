"""Figures that pages take from the log of experiments stand there."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def text(name: str) -> str:
    """A page in one line."""
    return " ".join((DOCS / f"{name}.md").read_text(encoding="utf-8").split())


CITED = {
    "fewer of them want a higher one, 1.5 times for half of the modules and 1.8 times for a quarter on a small decoder"
    ", about as the inverse root of their share": "1.53 for the top half (.50; 0), 1.82 for the top quarter (.25; 1.7",
    "(1.7 % of the loss at worst)": "1.82 for the top quarter (.25; 1.7 %)",
    "up to 18 % in a run of 30 steps on labels": "and lose 18, 17 and 5 % at the rate of all",
    "45 instead of 16, at half of the rate, ended 1.3 % lower at rank 8, and 128 at a quarter 1.4 % lower": (
        "| 8 | 2: 1.899 (8e-3); 5.7: 1.875 (4e-3); 16: 1.883 (2e-3) | | 32 | .5: 1.861 (8e-3); 1: 1.862 (8e-3); 1.4: "
        "1.848 (4e-3); 2.8: 1.848 (2e-3); 4: 1.836 (2e-3) |"
    ),
}
"""What docs/scaling.md tells, and where it was measured."""


def test_cited_figures() -> None:
    for told, measured in CITED.items():
        assert told in text("scaling")
        assert measured in text("experiments")
