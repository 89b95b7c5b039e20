"""User pages and messages use the words of the field, and short sentences. CONTRIBUTING.md has the list of words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, name_of, prose_of

RECORDS = ("aims", "changelog", "design", "experiments", "glossary", "policy", "results", "saving")
"""Pages of research and of earlier versions, which keep the words of their time; the glossary has no sentences."""

USER_PAGES = [ROOT / "README.md", *(page for page in PAGES if page.stem not in RECORDS and page.parent.name != "api")]

PRIVATE = {
    r"\b(?:layers?|activations?|segments?|functions|all)(?: \w+){0,2} run(?:s|ning)? again": "gradient checkpointing",
    r"\bsecond runs?\b": "gradient checkpointing",
    r"\brecomput": "gradient checkpointing",
    r"\b[Oo]ptimiser": "optimizer",
    r"\b[Hh]ollow model": "model on the meta device",
    r"\bmodels? that continues?\b": "causal language model",
    r"\bloss in tiles\b": "tiled loss",
    r"\bbeside plain LoRA\b": "versus plain LoRA",
    r"\bin mid-run\b": "during the run",
    r"\b(?:in place of|anew)\b": "instead of; again",
    r"(?<![\w.)\]}:+%])\.\d": "a 0 before the point",
}
"""Words of ours, as patterns, and what the field says."""

ROOMS = ("cli", "finetune", "study", "cost", "plan", "agents")
"""Folders whose messages users read."""

MOST_WORDS = 20
"""Words of a sentence, in the mean of a page."""


def sentences_of(page: Path) -> list[str]:
    """The sentences of a page's paragraphs and lists, without headings, tables and code."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose_of(page))
    lines = [re.sub(r"^\s*(?:[*-]|\d+\.) ", "\n", line) for line in text.splitlines()]
    kept = "\n".join("" if line.lstrip().startswith(("#", "|", "<!--", "!")) else line for line in lines)
    found = [each for part in re.split(r"\n\s*\n", kept) for each in re.split(r"(?<=[.?!])\s+", part)]
    return [each for each in found if len(each.split()) > 2]


def messages_of(tree: ast.AST) -> Iterator[str]:
    """The strings of several words in a program, without docstrings; of an f-string each piece."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield from messages_of(node)


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    text = prose_of(page)
    found = {word: say for pattern, say in PRIVATE.items() for word in re.findall(pattern, text)}
    assert found == {}


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    lengths = [len(each.split()) for each in sentences_of(page)]
    assert sum(lengths) <= MOST_WORDS * len(lengths)


@pytest.mark.parametrize("room", ROOMS)
def test_messages_use_them_too(room: str) -> None:
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in (ROOT / room).rglob("*.py")]
    texts = [text for tree in trees for text in messages_of(tree)]
    assert len(texts) > 20
    assert [text for text in texts for pattern in PRIVATE if re.search(pattern, text)] == []


def test_a_private_word_is_found() -> None:
    for text in ("4 layers run again", "the optimiser", "a loss of .3", "second runs"):
        assert any(re.search(pattern, text) for pattern in PRIVATE), text
    for text in ("Run it again.", "`:+.3f`"[1:-1], "0.3", "e.g. 3"):
        assert not any(re.search(pattern, text) for pattern in PRIVATE), text
