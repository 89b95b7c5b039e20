"""The reference describes all that is public."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module

import rankpilot
from rankpilot.cli.main import COMMANDS
from rankpilot.common import errors

from .pages import ROOT

DIRECTIVE = re.compile(r"^\.\. (?:auto(?:class|function|exception)|py:data):: (\S+)", re.M)
PARTS = re.split(r"^## ", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
DESCRIBED = {name: part.partition("\n")[0] for part in PARTS for name in DIRECTIVE.findall(part)}
"""The heading under which each name is described."""


def described(name: str) -> object:
    """The object that a directive names."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def test_every_public_name_is_described() -> None:
    assert {f"rankpilot.{name}" for name in rankpilot.__all__} <= set(DESCRIBED)


def text_of(name: str) -> str:
    """A page of docs/, by its path there."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_every_error_is_described() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert len(kinds) >= 13
    assert kinds == {name.rpartition(".")[2] for name, heading in DESCRIBED.items() if heading == "Errors"}


def test_every_command_is_described() -> None:
    assert [command for command in COMMANDS if f"`rankpilot {command}`" not in text_of("command-line.md")] == []
    commands = {*COMMANDS} - {"bench", "finetune"}  # of a fine-tune, FinetuneConfig has all
    described = {name.rpartition(".")[0] for name, heading in DESCRIBED.items() if heading == "Settings of commands"}
    assert {f"rankpilot.cli.{command.split()[-1]}" for command in commands} <= described


def test_what_is_described_describes_itself() -> None:
    """And it tells of each of its arguments."""
    for name in DESCRIBED:
        found = described(name)
        if name == "rankpilot.ENV_ID":
            continue
        text = inspect.getdoc(found) or ""
        assert text, name
        if inspect.isfunction(found):
            arguments = [each for each in inspect.signature(found).parameters if not each.startswith("_")]
            missing = [each for each in arguments if not re.search(rf"^ +\*{{0,2}}{each}: ", text, re.M)]
            assert len(arguments) == 1 or missing == [], name


def test_every_extra_is_told() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\|.*\|", text_of("first-steps.md"), re.M)
    assert [extra for extra in extras if not any(f"`{extra}`" in row for row in rows)] == []
