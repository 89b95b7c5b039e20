"""The messages of docs/troubleshooting.md are those of the code."""

from __future__ import annotations

import ast
import re

import pytest

from .pages import ROOT
from .test_words import ROOMS, messages_of

FOREIGN = ("size mismatch", "Your setup doesn't support bf16/gpu")
"""Messages of other libraries."""

ROWS = re.findall(
    r"^\| `([^|]+?)`(?: \(of \w+\))? \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M
)


@pytest.fixture(scope="module")
def told() -> str:
    """All strings of the package, a line each."""
    return "\n".join(
        " ".join(text.split())
        for room in (*ROOMS, "lora", "common")
        for source in (ROOT / room).rglob("*.py")
        for text in messages_of(ast.parse(source.read_text(encoding="utf-8")))
    )


def test_errors_that_the_page_explains_exist(told: str) -> None:
    assert len(ROWS) > 35
    pieces = [piece.strip() for row in ROWS if row not in FOREIGN for piece in row.split("...")]
    assert [piece for piece in pieces if piece not in told] == []
