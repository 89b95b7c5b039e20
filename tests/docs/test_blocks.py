"""Every block of code in the pages runs as printed, in order, in a folder of its page.

A block that cannot has a comment above it that says why: `<!-- not run: REASON -->`. All command lines are read by the
parsers of their programs. `make test` has tiny models under the names of those that are fetched, `make test-long` has
these.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from peft import LoraConfig, get_peft_model
from rankpilot import fetch_asset
from rankpilot.cli import main as cli
from transformers import AutoModelForSequenceClassification

from benchmarks.__main__ import BENCHMARKS

from ..as_printed import run_line
from ..small_assets import cache as cache
from ..small_assets import small_cache as small_cache
from ..warm_python import WarmPython
from .pages import PAGES, ROOT, Block, blocks_of, commands_of, name_of

BLOCKS = {name_of(page): [*blocks_of(page)] for page in PAGES}

KINDS = ("python", "bash", "text", "sql", "yaml", "")
"""What a block may say it is. Another word for Python or shell would hide it from the tests."""

DIRECTIVES = ("{toctree}", "{include}", "{literalinclude}", "{eval-rst}", "{docstring}")

LONG = {f"docs/{name}.md" for name in ("command-line", "index", "memory", "compatibility", "study")}
"""Pages whose blocks take long with tiny models too."""

FETCHES = re.compile("all-minilm|smollm2|fetch_asset|load_packaged_dataset|examples/")

PRINTED = {
    "docs/your-script.md": r"highest peak [\d,]+ bytes, of a budget of [\d,]+",
    "docs/memory.md": r"\d+ layers, \d+ of them checkpointed\n[\d.]+ GiB on the card: it fits",
    "docs/train-anywhere.md": r"\{.*q_proj.*: \d+",
    "docs/environment.md": r"[+-]\d+\.\d % below the loss of the run left alone.*\{.*up_proj.*: \d+",
    "docs/train-policy.md": r"^union$",
}
"""What the Python of a page prints, among other things."""


READ_ONLY = ("export", "make", "pip")
"""Programs that set up environments: they do not run here."""


def lines_of(block: Block) -> list[str]:
    """The command lines of a block that run."""
    return [line for line in commands_of(block.code) if shlex.split(line)[0] not in READ_ONLY]


def runs(block: Block) -> bool:
    """Whether something of a block runs."""
    return not block.excuse and (block.kind == "python" or (block.kind == "bash" and bool(lines_of(block))))


RUN = {page: found for page, blocks in BLOCKS.items() if (found := [*filter(runs, blocks)])}
"""The blocks that run, by page."""

SHELL = {page: found for page, blocks in BLOCKS.items() if (found := [b for b in blocks if b.kind == "bash"])}


def pages() -> Iterator[Any]:
    """Pages with what they are run with."""
    for page, blocks in RUN.items():
        marks = [pytest.mark.long] if page in LONG else []
        yield pytest.param(page, "small", marks=[*marks, pytest.mark.assets])
        if any(FETCHES.search(block.code) for block in blocks):
            yield pytest.param(page, "real", marks=[pytest.mark.assets, pytest.mark.slow, pytest.mark.long])


def test_blocks_are_found() -> None:
    assert len(RUN) >= 10
    assert len(SHELL) >= 10
    assert set(PRINTED) <= set(RUN)


def test_blocks_say_what_they_are() -> None:
    for page, block in ((page, block) for page, blocks in BLOCKS.items() for block in blocks):
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
@pytest.mark.parametrize(("page", "cache"), [*pages()], indirect=["cache"])
def test_blocks_run_as_printed(
    page: str,
    cache: str,
    warm_python: WarmPython,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python in one namespace."""
    monkeypatch.chdir(tmp_path)
    GIVEN.get(page, lambda *given: None)(warm_python, tmp_path)
    names = {"__name__": "__main__"}
    for block in RUN[page]:
        if block.kind == "python":
            # Errors name the line of the page.
            exec(compile("\n" * block.line + block.code, str(ROOT / page), "exec"), names)
            continue
        for line in lines_of(block):
            run_line(warm_python, line, tmp_path)
    printed = capsys.readouterr().out
    assert re.search(PRINTED.get(page, ""), printed, re.M | re.S), printed


def an_adapter(python: WarmPython, folder: Path) -> None:
    """An adapter as a fine-tune would have left it."""
    lora = LoraConfig(r=8, rank_pattern={"query": 4}, target_modules=["query", "key"], task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(fetch_asset("all-minilm-l6-v2"))
    get_peft_model(base, lora).save_pretrained(folder / "runs/mine/adapter")


def three_runs(python: WarmPython, folder: Path) -> None:
    """Runs to look at."""
    for name in ("finetune", "a", "b"):
        line = f"rankpilot finetune all-minilm-l6-v2 rotten-tomatoes --max-steps 8 --eval-steps 4 --output runs/{name}"
        run_line(python, line, folder)


GIVEN = {"docs/train-anywhere.md": an_adapter, "docs/study.md": three_runs}
"""What a page says is there already."""


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
    (tmp_path / "qlora.yaml").write_text("base_model: qwen3-8b\nadapter: qlora\nload_in_4bit: true\n")


@pytest.mark.usefixtures("reads_only")
@pytest.mark.parametrize("page", SHELL)
def test_command_lines_are_right(page: str) -> None:
    for block in SHELL[page]:
        for line in commands_of(block.code):
            words = shlex.split(line, comments=True)
            assert words, f"{page}:{block.line}: no command in {line!r}"
            if block.excuse and words[0] == "tensorboard":
                continue
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
