"""What pages show below `$ rankpilot memory ...` is what the command prints, but for frames and line ends."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
from rankpilot.cli import main as cli

from .pages import PAGES, ROOT, blocks_of, write_files

SHOWN: dict[str, list[str]] = defaultdict(list)
"""The parts of what pages show of each command: its paragraphs and tables."""
for page in (ROOT / "README.md", *PAGES):
    for block in blocks_of(page):
        if block.code.startswith("$ rankpilot memory"):
            command, _, output = block.code.partition("\n")
            SHOWN[command.removeprefix("$ rankpilot ")] += output.split("\n\n")


def words(text: str) -> str:
    """A text without the frames of tables, on one line."""
    return " ".join(re.sub(r"[^\x00-\x7f–−]", " ", text).split())


def test_commands_are_found() -> None:
    assert len(SHOWN) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("command", SHOWN)
def test_commands_print_what_pages_show(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    cli.run(shlex.split(command))
    printed = words(capsys.readouterr().out)
    assert [part for part in SHOWN[command] if words(part) not in printed] == []
