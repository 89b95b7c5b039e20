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
from rankpilot.study.run_data import read_run

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


AGENT = re.search(r"^## Train an agent\n.*?```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S | re.M)

TINY = {
    "python": "--rounds 1 --warm-rounds 1 --stacks 1 --episodes 8 --steps 25 --workers 1 --validation-tasks 1",
    "rankpilot finetune": "--max-steps 12 --per-device-train-batch-size 4 --held-out-rows 32",
    "rankpilot study": "",
}
"""Numbers in place of the defaults of the lines that train an agent: hours become seconds."""


@pytest.mark.slow
@pytest.mark.usefixtures("small_cache")
def test_the_lines_that_train_an_agent_run(warm_python: WarmPython, tmp_path: Path) -> None:
    """With the least that the training takes, some 15 CPU seconds."""
    (tmp_path / "train_agent.py").symlink_to(ROOT / "train_agent.py")
    assert AGENT
    install, *lines = AGENT[1].strip().replace("\\\n", "").splitlines()
    assert install == 'pip install -e ".[agent]"'
    for line, (start, numbers) in zip(lines, TINY.items(), strict=True):
        assert line.startswith(start)
        run_line(warm_python, f"{line.partition('#')[0]} {numbers}", tmp_path)
    decisions = read_run(tmp_path / "runs/flown").decisions
    assert len(decisions) > 1, "the agent decided once the run was under way"
    assert (tmp_path / "runs/flown/study.html").is_file()
