"""Every code block of the README runs as printed, in order, in one folder.

Python blocks of one section go on from one another. `make test` has tiny models under the names of those that are
fetched, `make test-long` has these.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from .as_printed import ROOT, checked, run_line
from .small_assets import cache as cache
from .small_assets import small_cache as small_cache
from .warm_python import WarmPython


def blocks_of(text: str) -> Iterator[tuple[str, str]]:
    """The kind and the code of each block; those in Python after one another in a section are one."""
    for section in re.split(r"^## ", text, flags=re.M):
        blocks = re.findall(r"```(bash|python)\n(.*?)```", section, re.S)
        for kind, group in groupby(blocks, key=lambda block: block[0]):
            codes = [code for _, code in group]
            yield from [(kind, "\n".join(codes))] if kind == "python" else [(kind, code) for code in codes]


BLOCKS = [*blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))]


@pytest.mark.assets  # the figures of published models
@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_every_block_of_the_readme_runs(warm_python: WarmPython, tmp_path: Path) -> None:
    """As printed; `make` and `pip` alone, which make and fill environments, are asked what they would do."""
    assert len(BLOCKS) >= 2
    for kind, code in BLOCKS:
        if kind == "python":
            checked(warm_python, [sys.executable, "-c", code], tmp_path, code)
            continue
        for line in code.strip().splitlines():
            if line.startswith("make "):
                subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, check=True, capture_output=True)
            elif line.startswith("pip "):
                words = [sys.executable, "-m", *shlex.split(line), "--dry-run", "--no-deps", "--quiet"]
                subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
            else:
                run_line(warm_python, line, tmp_path)
    assert (tmp_path / "runs/finetune/study.html").is_file()
    assert (tmp_path / "runs/served/adapter_model.safetensors").is_file()
    assert any((tmp_path / "runs/sft/decisions").iterdir())
