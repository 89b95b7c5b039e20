"""What needs no extra works without its packages, and what does names the extra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from .data.small_models import WORDS, save, write_rows

ABSENT = """
import sys

for name in ("gymnasium", "stable_baselines3", "scipy", "matplotlib", "optuna", "ray", "trl"):
    sys.modules[name] = None  # so that importing it fails
import rankpilot
from rankpilot.__main__ import silence_libraries

silence_libraries()
from rankpilot.cli.main import run
"""

COMMANDS = """
model, data, *modules = sys.argv[1:]
small = ["--batch-size", "4", "--max-length", "16"]
assert run(["memory", model, "--device-memory", "24GiB", *small, "--output", "memory"]) == 0
assert run(["plan", model, data, *small, "--steps", "8", "--budget", "80%", "--output", "plan.json"]) == 0
steps = ["--steps", "4", "--eval-every", "4", "--held-out-rows", "8"]
assert run(["finetune", model, data, *small, *steps, "--budget", "80%", "--output", "run"]) == 0
"""

NEEDING = """
assert run(["policy", "train", "--output", "policy"]) == 1
assert run(["policy", "evaluate", "uniform"]) == 1
assert rankpilot.attach and rankpilot.allocate
try:
    rankpilot.ENV_ID
except rankpilot.RankPilotError as error:
    print(error, file=sys.stderr)
"""

DEEP = """
from importlib import import_module

print("MODULES")
for module in modules:
    try:
        import_module(module)
    except rankpilot.RankPilotError as error:
        print(module, error)
print("MODULES")
run(["policy", "train", "--help"])  # this ends the process
"""

ROOT = Path(__file__).parents[1]
MORE = ("rankpilot.agents.sb3_policy", "rankpilot.common.statistics")
"""Modules outside of the environment that need its extra."""

LINE = 'Policies and environments require gymnasium: pip install -e ".[agent]".'


def run_without(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ABSENT + code, *arguments],
        cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_memory_plans_and_fine_tunes_need_no_extra_and_each_module_names_its_own(tmp_path: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {package: ROOT.joinpath(*package.split(".")[1:]) for package in packages if package != "rankpilot"}
    modules = [f"{package}.{path.stem}" for package, folder in folders.items() for path in folder.glob("[!_]*.py")]
    rows = [{"text": f"the film was {word}", "label": index % 3} for index, word in enumerate(WORDS * 4)]
    files = save("bert", tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", rows)
    done = run_without(COMMANDS + DEEP, tmp_path, *files, *modules)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("warning|loading weights", done.stderr, re.IGNORECASE), done.stderr
    commands, imported, _ = done.stdout.split("MODULES\n")
    told = " ".join(commands.split())
    assert told.count('require matplotlib: pip install -e ".[study]"') == 1, "of memory; ranks are alike"
    assert (tmp_path / "memory" / "memory.json").is_file()
    assert (tmp_path / "plan.json").is_file()
    assert (tmp_path / "run" / "study.html").is_file()
    assert not [*tmp_path.rglob("*.png")]
    refused = dict(line.split(" ", 1) for line in imported.splitlines())
    assert set(refused.values()) == {LINE}
    assert {"rankpilot.env.fine_tune", "rankpilot.agents.sb3_policy"} <= {*refused}
    assert all(name.startswith("rankpilot.env.") or name in MORE for name in refused)


@pytest.mark.long
def test_what_needs_an_extra_names_it(tmp_path: Path) -> None:
    done = run_without(NEEDING, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.splitlines() == [f"error: {LINE}", f"error: {LINE}", LINE]
    assert not [*tmp_path.iterdir()]
