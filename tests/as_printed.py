"""Command lines as they are printed, each in a fresh process, in a folder of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from .warm_python import WarmPython

ROOT = Path(__file__).parents[1]

_SCRIPT = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run_line(python: WarmPython, line: str, folder: Path) -> str:
    """Run a line that begins with rankpilot, python or torchrun; returns what it printed.

    `examples` in the folder are those of the repository.
    """
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    program, *words = shlex.split(line, comments=True)
    starts = {"rankpilot": ["-m", "rankpilot"], "python": ["-c", _SCRIPT], "torchrun": ["-m", "torch.distributed.run"]}
    command = [sys.executable, *starts[program], *words]
    return checked(python, command, folder, line)


def checked(python: WarmPython, command: list[str], folder: Path, shown: str) -> str:
    """Run Python; returns what it printed, if it succeeds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "torch.distributed.run" in command:  # its processes are not forks of one that has the libraries
        options = {"capture_output": True, "text": True, "check": False}
        done = subprocess.run(command, cwd=folder, env=environment, **options)
    else:
        done = python.run(command, cwd=folder, env=environment)
    assert done.returncode == 0, f"{shown}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout
