"""The pages of the documentation, and what is in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = tuple(sorted((ROOT / "docs").rglob("*.md")))
TEXTS = (*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")))
"""The pages, and the texts beside the code."""

_FENCE = re.compile(r"^( *)```(\S*)(.*)$")
_EXCUSE = re.compile(r"^ *<!-- not run: (.+) -->$")


def name_of(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: of the page, counted from 1.
        kind: what it says it is: "python", "bash", "{include}"; empty if it says nothing.
        code: without the indentation that it has in a list.
        excuse: why it does not run in a test, from the comment above it; None if it does.
        argument: what follows the kind.
    """

    line: int
    kind: str
    code: str
    excuse: str | None
    argument: str


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if not opened:
            number += 1
            continue
        end = next(at for at in range(number + 1, len(lines)) if lines[at].strip() == "```")
        excuse = _EXCUSE.match(lines[number - 1]) if number else None
        code = textwrap.dedent("\n".join(lines[number + 1 : end]) + "\n")
        yield Block(number + 1, opened[2], code, excuse[1] if excuse else None, opened[3].strip())
        number = end + 1


def commands_of(code: str) -> list[str]:
    """The command lines of a block in shell, each on one line."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def prose_of(page: Path) -> str:
    """A page without its blocks of code, and without code inside lines."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`]*`", "", text)


def write_files(folder: Path) -> None:
    """Write the files that pages show, whose first line is a comment with their name."""
    for page in PAGES:
        for block in blocks_of(page):
            if found := re.match(r"# (\w+\.yaml)\n", block.code):
                (folder / found[1]).write_text(block.code, encoding="utf-8")
