"""Lists settings of the installed trainers that `rankpilot memory --config` does not know.

Each belongs in report/trainer_keys.json: priced, unpriced or harmless. The exit status is 1 if there are any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path

from rankpilot.report.trainer_file import KEYS
from rich.console import Console


def _of_axolotl() -> Iterator[str]:
    """Yield the fields of axolotl's configuration, and those that its plugins add."""
    yield from import_module("axolotl.utils.schemas.config").AxolotlInputConfig.model_fields
    # The plugins' source is read, since importing some of them needs further packages.
    folder = Path(import_module("axolotl").__path__[0], "integrations")
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    added = {name for text in sources for name in re.findall(r'return "axolotl\.integrations\.[\w.]*\.(\w+)"', text)}
    for node in (node for text in sources for node in ast.parse(text).body):
        if isinstance(node, ast.ClassDef) and node.name in added:
            targets = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _of_classes(module: str, *names: str) -> Iterator[str]:
    """Yield the fields of dataclasses."""
    for name in names:
        yield from (each.name for each in fields(getattr(import_module(module), name)))


_HPARAMS = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
SETTINGS: dict[str, Callable[[], Iterator[str]]] = {
    "axolotl": _of_axolotl,
    "TRL": partial(_of_classes, "trl", "SFTConfig", "ModelConfig", "ScriptArguments"),
    "LLaMA-Factory": partial(_of_classes, "llamafactory.hparams", *_HPARAMS),
}
"""Functions that yield the settings of each program; ImportError if it is not installed."""


def unknown_keys(program: str) -> list[str]:
    """Return the settings of an installed program that are in none of our lists.

    Raises:
        ImportError: the program is not installed.
    """
    table = KEYS[program]
    lists = (table["priced"], table["unpriced"], table["harmless"], table["older"], *table["kinds"].values())
    return sorted({*SETTINGS[program]()} - {key for each in lists for key in each})


def main() -> int:
    """Print the unknown settings of each program; return the exit status."""
    console, found = Console(), False
    for program in SETTINGS:
        try:
            unknown = unknown_keys(program)
        except ImportError as error:
            console.print(f"{program} is not checked: {error}", markup=False)
            continue
        found = found or bool(unknown)
        console.print(f"{program}: {', '.join(unknown) or 'every setting is known'}", markup=False)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
