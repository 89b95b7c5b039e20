"""Every code block of the README runs, in order, in one folder. Only the size of runs is cut down.

Python blocks of one section go on from one another.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from .small_bases import chat_model as chat_model
from .small_bases import smaller
from .warm_python import WarmPython

ROOT = Path(__file__).parents[1]


def blocks_of(text: str) -> Iterator[tuple[str, str]]:
    """The kind and the code of each block; those in Python after one another in a section are one."""
    for section in re.split(r"^## ", text, flags=re.M):
        blocks = re.findall(r"```(bash|python)\n(.*?)```", section, re.S)
        for kind, group in groupby(blocks, key=lambda block: block[0]):
            codes = [code for _, code in group]
            yield from [(kind, "\n".join(codes))] if kind == "python" else [(kind, code) for code in codes]


BLOCKS = [*blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))]

SMALLER = {
    "finetune": "--steps 8 --eval-every 4 --train-rows 64 --held-out-rows 16 --batch-size 4 --max-length 16",
    "export": "",
    "study": "",
    "memory": "--batch-size 4 --max-length 16",
}


def run_shell(python: WarmPython, line: str, folder: Path) -> str:
    """Run one command line of the README; returns what it printed."""
    words = shlex.split(line)
    run: Callable[..., Any] = subprocess.run
    if words[0] == "make":  # the real ones make a virtual environment: here, that make knows how to
        command, where = ["make", "-n", *words[1:]], ROOT
    elif words[0] == "pip":
        command, where = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "-e", str(ROOT)], folder
        assert words[1:] == ["install", "-e", ".[trl]"]
    else:
        assert words[0] == "rankpilot"
        command = [sys.executable, "-m", "rankpilot", *words[1:], *SMALLER[words[1]].split()]
        run, where = python.run, folder
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return str(done.stdout)


def run_python(python: WarmPython, code: str, folder: Path, chat_model: Path) -> str:
    """Run the Python blocks of a section in a fresh process; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = python.run([sys.executable, "-c", smaller(code, chat_model)], cwd=folder, env=environment)
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.assets
@pytest.mark.slow
def test_every_block_of_the_readme_runs(warm_python: WarmPython, tmp_path: Path, chat_model: Path) -> None:
    assert len(BLOCKS) >= 3
    printed = ""
    for kind, code in BLOCKS:
        if kind == "python":
            printed += run_python(warm_python, code, tmp_path, chat_model)
        else:
            for line in code.strip().splitlines():
                printed += run_shell(warm_python, line, tmp_path)
    assert (tmp_path / "runs/finetune/study.html").is_file()
    assert (tmp_path / "runs/served/adapter_model.safetensors").is_file()
    assert any((tmp_path / "runs/sft/decisions").iterdir())
