"""Fresh Python programs without the seconds that large libraries take to load.

A process that has loaded them, and nothing of rankpilot, runs each program in a fork of itself: with a `__main__`,
arguments, folder, environment and streams of its own, up to the end of the interpreter. Where there is a GPU, programs
run as they are: the libraries open it when they are loaded, and a fork cannot use it after that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_SERVER = """
import os, sys
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
import gc, json, runpy, types
import datasets, gymnasium, peft, stable_baselines3, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments


def program(job):
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(job[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    kind, what, *arguments = job["arguments"]
    sys.argv = [kind, *arguments]
    sys.stdin = open(0, closefd=False)
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


gc.freeze()  # or each program would look through the libraries' objects for garbage
assert not any(name.split(".")[0] == "rankpilot" for name in sys.modules)
print("ready", flush=True)
while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        program(json.loads(line))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmPython:
    """Runs `python -c CODE` and `python -m MODULE ARGUMENTS`; starts with the first program."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of a Python command, its output captured as text.

        Args:
            command: the interpreter, "-c" and code, or "-m", a module and its arguments.
            options: `cwd`, `env` and `input` of `subprocess.run`; any others are ignored.
        """
        assert command[0] == sys.executable
        if torch.accelerator.is_available():
            captured = {"capture_output": True, "text": True, "check": False}
            return subprocess.run(command, **{**options, **captured})
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
            for path in streams.values():
                path.touch()
            streams["stdin"].write_text(options.get("input", ""))
            job = {
                "arguments": command[1:],
                "folder": str(options.get("cwd") or Path.cwd()),
                "environment": dict(options.get("env") or os.environ),
                **{name: str(path) for name, path in streams.items()},
            }
            code = self._code(json.dumps(job))
            return subprocess.CompletedProcess(
                command, code, streams["stdout"].read_text(), streams["stderr"].read_text()
            )

    def close(self) -> None:
        """End the process that has the libraries."""
        if self._server is not None:
            self._server.communicate()

    def _code(self, job: str) -> int:
        if self._server is None:
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == "ready\n"
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(job, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())
