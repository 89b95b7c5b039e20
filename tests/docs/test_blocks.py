"""Every block of code in the pages: Python runs on tiny models, command lines are read by their programs' parsers.

A block that can do neither has a comment above it that says why: `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import tyro
import yaml
from peft import LoraConfig, get_peft_model
from rankpilot.cli import main as cli
from rankpilot.data import assets, packaged_data
from transformers import AutoModelForSequenceClassification

from benchmarks.__main__ import BENCHMARKS

from ..finetune.trainer_kinds import reviews
from ..small_bases import bert as bert
from ..small_bases import chat_model as chat_model
from ..small_bases import smaller
from .pages import PAGES, ROOT, Block, blocks_of, commands_of, name_of

BLOCKS = {name_of(page): [*blocks_of(page)] for page in PAGES}

KINDS = ("python", "bash", "text", "sql", "yaml", "")
"""What a block may say it is. Another word for Python or shell would hide it from the tests."""

DIRECTIVES = ("{toctree}", "{include}", "{literalinclude}", "{eval-rst}", "{docstring}")

MARKS = {"docs/environment.md": pytest.mark.assets}
"""Marks of pages whose Python needs more than tiny models."""

PRINTED = {
    "docs/trl.md": r"highest peak [\d,]+ bytes, of a budget of [\d,]+",
    "docs/memory.md": r"\d+ layers, \d+ of them checkpointed\n[\d.]+ GiB on the card: it fits",
    "docs/train-anywhere.md": r"\{.*q_proj.*: \d+",
    "docs/decision.md": r"\d+ plans; taken: .+\n.+ rank 8 on all modules",
    "docs/add-a-rule.md": r"\{.*up_proj.*: \d+",
    "docs/environment.md": r"[+-]\d\.\d+ against uniform ranks, \d+\.\d% of the budget used",
    "docs/train-policy.md": r"^signal-mean\n\{",
    "docs/serve.md": r"lora_rank_pattern:",
}
"""What the Python of a page prints, among other things."""


def of_kind(kind: str) -> dict[str, list[Block]]:
    """The blocks of a kind that are to run, by page."""
    found = {
        page: [each for each in blocks if each.kind == kind and not each.excuse] for page, blocks in BLOCKS.items()
    }
    return {page: blocks for page, blocks in found.items() if blocks}


PYTHON = of_kind("python")
SHELL = of_kind("bash")


def test_blocks_are_found() -> None:
    assert len(PYTHON) >= 9
    assert len(SHELL) >= 12
    assert set(PRINTED) <= set(PYTHON)


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_say_what_they_are(page: str) -> None:
    for block in BLOCKS[page]:
        assert block.kind in (*KINDS, *DIRECTIVES), f"{page}:{block.line}"
        if block.excuse is not None:
            assert block.kind in ("python", "bash"), f"{page}:{block.line}: nothing to excuse"
            if block.kind == "python":
                compile(block.code, page, "exec")
        if block.kind == "yaml":
            assert yaml.safe_load(block.code), f"{page}:{block.line}"
        if block.kind == "{literalinclude}":  # tests/test_examples.py runs all of them
            assert block.argument.startswith("../examples/"), f"{page}:{block.line}"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("page", [pytest.param(page, marks=MARKS.get(page, ())) for page in PYTHON])
def test_python_runs(
    page: str,
    bert: Path,
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All Python of a page, in order, in one namespace and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packaged_data, "load_packaged_dataset", lambda name: reviews())
    fetch = assets.fetch_asset
    monkeypatch.setattr(assets, "fetch_asset", lambda name: bert if name == "all-minilm-l6-v2" else fetch(name))
    if page == "docs/serve.md":
        save_adapter(bert, tmp_path / "runs/mine/adapter")
    names = {"__name__": "__main__"}
    for block in PYTHON[page]:
        # Errors name the line of the page.
        code = "\n" * block.line + smaller(block.code, chat_model)
        exec(compile(code, str(ROOT / page), "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(PRINTED.get(page, ""), printed, re.M | re.S), printed


def save_adapter(base: Path, folder: Path) -> None:
    """An adapter as a fine-tune would have left it."""
    lora = LoraConfig(r=8, rank_pattern={"query": 4}, target_modules=["query", "key"], task_type="SEQ_CLS")
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), lora).save_pretrained(folder)


# Command lines --------------------------------------------------------------------------------------------------------


class ReadError(Exception):
    """In place of the command: its options could be read."""


@pytest.fixture
def reads_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands stop when they have read their options."""
    read = tyro.cli

    def read_and_stop(*arguments: object, **options: object) -> None:
        read(*arguments, **options)  # type: ignore[call-overload]
        raise ReadError

    monkeypatch.setattr(tyro, "cli", read_and_stop)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("reads_only")
@pytest.mark.parametrize("page", SHELL)
def test_command_lines_are_right(page: str) -> None:
    for block in SHELL[page]:
        for line in commands_of(block.code):
            words = shlex.split(line, comments=True)
            assert words, f"{page}:{block.line}: no command in {line!r}"
            assert words[0] in PROGRAMS, f"{page}: who reads {line!r}?"
            PROGRAMS[words[0]](words[1:])


def read_by_rankpilot(words: Sequence[str]) -> None:
    with pytest.raises(ReadError):  # else an error was printed, or the options were not read
        cli.run(words)


def read_by_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(words) <= set(targets), words


def read_by_pip(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.fullmatch(r"install -e \.(?:\[([a-z,]+)\])?", " ".join(words))
    assert named, words
    assert {*(named[1] or "test").split(",")} <= set(extras), words


def read_by_script(words: Sequence[str]) -> None:
    """A script of the repository, or a module of its `benchmarks` or `tools`, and options that it knows."""
    if words[0] == "-m":
        return read_by_module(words[1], words[2:])
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[at]
    assert script.is_file(), script
    text = script.read_text(encoding="utf-8")
    for option in (word for word in words[at + 1 :] if word.startswith("--")):
        assert f'"{option}"' in text, f"{script} has no {option}"


def read_by_module(name: str, words: Sequence[str]) -> None:
    options = import_module(f"benchmarks.{BENCHMARKS[words[0]][0]}" if name == "benchmarks" else name).Options
    with pytest.raises(ReadError):
        tyro.cli(options, args=words[1:] if name == "benchmarks" else words)


def read_by_ray(words: Sequence[str]) -> None:
    assert words[0] in ("start", "stop"), words


def read_by_shell(words: Sequence[str]) -> None:
    assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in words), words


PROGRAMS = {
    "rankpilot": read_by_rankpilot,
    "make": read_by_make,
    "pip": read_by_pip,
    "python": read_by_script,
    "torchrun": read_by_script,
    "ray": read_by_ray,
    "export": read_by_shell,
}
