"""What a command prints when it is used wrongly."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import pytest
import tyro
from rankpilot.cli.main import run

OLD_TYRO = not hasattr(tyro, "constructors")
"""True below tyro 0.9: option groups have no title, and rankpilot itself reports values out of range, with status 1."""


def words_of(command: str | Sequence[str]) -> list[str]:
    """The words of a command line, which may be given as a shell has it."""
    return shlex.split(command) if isinstance(command, str) else [*command]


def failure(command: str | Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command which fails leaves on standard error."""
    capsys.readouterr()
    assert run(words_of(command)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = (line for line in error.strip().splitlines() if "Loading weights" not in line)
    assert line.startswith("error: ")
    return line


def usage_error(command: str | Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed about an option that cannot be read, as one line."""
    try:
        status: object = run(words_of(command))
    except SystemExit as end:
        status = end.code
    assert status in ((1, 2) if OLD_TYRO else (2,))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())
