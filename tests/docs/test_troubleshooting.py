"""The messages of docs/troubleshooting.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from .pages import ROOT

ROOMS = ("cli", "finetune", "study", "report", "cost", "agents", "decide", "lora", "common")
"""Folders whose messages users read."""

FOREIGN = ("size mismatch", "Your setup doesn't support bf16/gpu")
"""Messages of other libraries."""

ROWS = re.findall(
    r"^\| `([^|]+?)`(?: \(of \w+\))? \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M
)


def messages_of(tree: ast.AST) -> Iterator[str]:
    """The strings of several words in a program, without docstrings; of an f-string each piece."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield from messages_of(node)


@pytest.fixture(scope="module")
def told() -> str:
    """All strings of the package, a line each."""
    return "\n".join(
        " ".join(text.split())
        for room in ROOMS
        for source in (ROOT / room).rglob("*.py")
        for text in messages_of(ast.parse(source.read_text(encoding="utf-8")))
    )


def test_errors_that_the_page_explains_exist(told: str) -> None:
    assert len(ROWS) > 20
    pieces = [piece.strip() for row in ROWS if row not in FOREIGN for piece in row.split("...")]
    assert [piece for piece in pieces if piece not in told] == []
