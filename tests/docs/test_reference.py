"""The reference describes all that is public."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import rankpilot
from rankpilot import errors
from rankpilot.cli.main import COMMANDS
from rankpilot.cli.study import PARTS

from .pages import PAGES, blocks_of

API = [page for page in PAGES if page.parent.name == "api"]
DIRECTIVE = re.compile(r"^\.\. (?:auto(?:class|function|exception)|py:data):: (\S+)", re.M)
DESCRIBED = {name: page for page in API for block in blocks_of(page) for name in DIRECTIVE.findall(block.code)}


def described(name: str) -> object:
    """The object that a directive names."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def test_every_public_name_is_described() -> None:
    assert {f"rankpilot.{name}" for name in rankpilot.__all__} <= set(DESCRIBED)


def test_every_error_is_described() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    page = next(page for page in API if page.name == "errors.md").read_text(encoding="utf-8")
    assert len(kinds) >= 14
    assert [kind for kind in sorted(kinds) if not re.search(rf"\b{kind}\b", page)] == []


def test_every_command_is_described() -> None:
    page = next(page for page in PAGES if page.name == "command-line.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"`rankpilot {command}`" not in page] == []
    settings = next(page for page in API if page.name == "commands.md").read_text(encoding="utf-8")
    parts = {f"rankpilot.cli.study.{part.replace('-', '_')}." for part in PARTS}
    commands = {f"rankpilot.cli.{command}." for command in COMMANDS} - {
        f"rankpilot.cli.{x}." for x in ("study", "bench")
    }
    known = commands - {"rankpilot.cli.finetune."} | parts  # FinetuneConfig has all of a fine-tune
    assert [module for module in sorted(known) if module not in settings] == []


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_describes_itself(name: str) -> None:
    """And it tells of each of its arguments."""
    found = described(name)
    if name == "rankpilot.ENV_ID":
        return
    text = inspect.getdoc(found) or ""
    assert text
    if inspect.isfunction(found):
        arguments = [each for each in inspect.signature(found).parameters if not each.startswith("_")]
        missing = [each for each in arguments if not re.search(rf"^ +\*{{0,2}}{each}: ", text, re.M)]
        assert len(arguments) == 1 or missing == []


def test_pages_lead_to_the_reference() -> None:
    index = next(page for page in API if page.name == "index.md").read_text(encoding="utf-8")
    assert [page.name for page in API if page.name != "index.md" and f"({page.name})" not in index] == []
    assert isinstance(API[0], Path)
