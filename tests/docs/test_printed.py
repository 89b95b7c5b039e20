"""What pages show below `$ rankpilot ...` is what the command prints, but for frames and line ends."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from rankpilot.cli import main as cli

from .pages import PAGES, ROOT, blocks_of, name_of

SHOWN = [
    pytest.param(block.code, id=f"{name_of(page)}:{block.line}")
    for page in (ROOT / "README.md", *PAGES)
    for block in blocks_of(page)
    if block.kind == "text" and block.code.startswith("$ rankpilot memory")
]


def words(text: str) -> str:
    return " ".join(re.sub(r"[^\x00-\x7f–−×]", " ", text).split())


def test_commands_are_found() -> None:
    assert len(SHOWN) >= 3


@pytest.mark.long
@pytest.mark.parametrize("shown", SHOWN)
def test_commands_print_what_pages_show(
    shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, _, output = shown.partition("\n")
    cli.run(shlex.split(command)[2:])
    printed = words(capsys.readouterr().out)
    for part in output.split("\n\n"):
        assert words(part) in printed
