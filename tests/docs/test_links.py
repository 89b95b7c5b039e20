"""Links in the pages, the README and the texts beside it lead somewhere, anchors too."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .pages import ROOT, TEXTS, name_of, prose_of

_LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, made of them as GitHub and the site do."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        while f"{anchor}-{number}" in found:
            number += 1
        found.add(f"{anchor}-{number}" if anchor in found else anchor)
    return found


def faults_of(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    faults = []
    for link in _LINK.findall(prose_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            faults.append(link)
    return faults


def test_links_lead_somewhere() -> None:
    assert {name_of(text): faults_of(text) for text in TEXTS if faults_of(text)} == {}


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\n[a](page.md#a-title) [b](#a-title) [c](page.md#title) [d](none.md) [e](https://x.y)\n"
    )
    assert faults_of(page) == ["page.md#title", "none.md"]


HISTORY = ("CHANGELOG.md",)
"""Texts that name files as they were at the time."""


def test_sources_that_a_text_names_exist() -> None:
    """Such as `lora/resize.py`; a name in capitals is one that the reader chooses."""
    named = set()
    for text in TEXTS:
        if name_of(text) not in HISTORY:
            prose = re.sub(r"^( *)```.*?^\1```", "", text.read_text(encoding="utf-8"), flags=re.M | re.S)
            found = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|json))\b", prose)
            named |= {(name_of(text), name) for name in found}
    assert named
    assert sorted(each for each in named if not (ROOT / each[1]).is_file()) == []


def test_pages_that_the_code_names_exist() -> None:
    """Errors, help texts and comments name pages, such as docs/savers.md."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("only a git checkout tells which files belong to it")
    named = {
        (name, page)
        for name in listed.stdout.splitlines()
        for page in re.findall(r"\bdocs/[a-z/_-]+\.(?:md|py)\b", (ROOT / name).read_text(encoding="utf-8"))
    }
    assert len(named) >= 10
    assert sorted((name, page) for name, page in named if not (ROOT / page).is_file()) == []


def test_every_picture_is_shown() -> None:
    shown = {
        name for text in TEXTS for name in re.findall(r"images/(\w+\.(?:png|svg))\)", text.read_text(encoding="utf-8"))
    }
    assert {picture.name for picture in (ROOT / "docs" / "images").iterdir()} == shown
