"""Pages have the figures that stored rows tell: `python -m benchmarks pages` would change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from rankpilot.common.errors import DataError, UnknownNameError

from benchmarks import pages, pictures
from benchmarks.__main__ import run

from .pages import ROOT


def test_pages_are_up_to_date() -> None:
    assert [page.relative_to(ROOT).as_posix() for page in pages.outdated()] == []


def test_pictures_are_up_to_date() -> None:
    assert [path.name for path in pictures.outdated()] == []


def test_every_block_stands_on_a_page() -> None:
    texts = "\n".join(page.read_text(encoding="utf-8") for page in pages.pages())
    assert {found[1] for found in pages.BLOCK.finditer(texts)} == set(pages.BLOCKS)


def test_a_stale_figure_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, made = tmp_path / "page.md", "Before.\n\n<!-- generated: a -->\n\n1 %\n\n<!-- end -->\n\nAfter.\n"
    page.write_text(made.replace("1 %", "2 %"))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "pages", lambda: [page])
    monkeypatch.setattr(pages, "BLOCKS", {"a": lambda: "1 %"})
    with pytest.raises(DataError, match=r"Out of date: page\.md"):
        run(["pages", "--check"])
    assert "2 %" in page.read_text()
    run(["pages"])
    assert page.read_text() == made
    run(["pages", "--check"])


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("<!-- generated: rate -->\n<!-- end -->\n", UnknownNameError, "Did you mean: 'rates'"),
        ("<!-- generated: rates -->\n", DataError, "is between"),
        ("Such as <!-- generated: rates --> in a line.\n", DataError, "a line of its own"),
    ],
)
def test_a_block_that_nothing_can_make(text: str, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        pages.made_again(text)
