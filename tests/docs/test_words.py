"""User pages and messages use the words of the field, and short sentences. CONTRIBUTING.md has the list of words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, name_of, prose_of

RECORDS = (
    "aims",
    "changelog",
    "decision",
    "design",
    "experiments",
    "glossary",
    "policy",
    "results",
    "saving",
    "scaling",
)
"""Pages of research and of earlier versions, which keep the words of their time; the glossary has no sentences."""

USER_PAGES = [ROOT / "README.md", *(page for page in PAGES if page.stem not in RECORDS and page.parent.name != "api")]

PRIVATE = {
    r"\b(?:layers?|activations?|segments?|functions|all)(?: \w+){0,2} runs? again": "gradient (or selective) checkpointing",
    r"\bsecond runs?\b": "gradient checkpointing",
    r"\brecomput": "gradient checkpointing",
    r"\b[Oo]ptimiser": "optimizer",
    r"\b[Hh]ollow model": "model on the meta device",
    r"\bmodels? that continues?\b": "causal language model",
    r"\bloss in tiles\b": "tiled loss",
    r"\bbeside plain LoRA\b": "versus plain LoRA",
    r"\bin mid-run\b": "during the run",
    r"\b(?:in place of|anew)\b": "instead of; again",
    r"(?<![\w.)\]}])\.\d": "a 0 before the point",
}
"""Words of ours, as patterns, and what the field says."""

MOST_WORDS = 20
"""Words of a sentence, in the mean of a page."""


def sentences_of(page: Path) -> list[str]:
    """The sentences of a page's paragraphs and lists, without headings, tables and code."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose_of(page))
    lines = [re.sub(r"^\s*(?:[*-]|\d+\.) ", "\n", line) for line in text.splitlines()]
    kept = "\n".join("" if line.lstrip().startswith(("#", "|", "<!--", "!")) else line for line in lines)
    found = [each for part in re.split(r"\n\s*\n", kept) for each in re.split(r"(?<=[.:?!])\s+", part)]
    return [each for each in found if len(each.split()) > 2]


def messages_of(source: Path) -> Iterator[str]:
    """The strings of a file that have several words, those inside f-strings too, but for docstrings."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in texts and isinstance(node.value, str) and " " in node.value:
            yield node.value


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = {word: say for pattern, say in PRIVATE.items() for word in re.findall(pattern, text)}
    assert found == {}


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    lengths = [len(each.split()) for each in sentences_of(page)]
    assert sum(lengths) <= MOST_WORDS * len(lengths)


@pytest.mark.parametrize("room", ["cli", "finetune", "study", "cost", "plan", "agents"])
def test_messages_use_them_too(room: str) -> None:
    texts = [text for source in (ROOT / room).rglob("*.py") for text in messages_of(source)]
    assert len(texts) > 50
    patterns = [pattern for pattern in PRIVATE if pattern not in PROSE_ALONE]
    assert [text for text in texts for pattern in patterns if re.search(pattern, text)] == []
