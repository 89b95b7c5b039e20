"""One command for all benchmarks: it lists them and explains each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rankpilot.errors import UnknownNameError

from benchmarks.__main__ import BENCHMARKS, run

ROOT = Path(__file__).parents[2]

EXPLAINED = {
    "overhead": ("--quick", "--json", "--device", "--seed", "adalora", "own work"),
    "step-time": ("--plans", "--models", "--quick", "--json", "minilm", "cpu time"),
    "memory": ("--quick", "--json", "--device", "--seed", "checkpointing", "guard"),
    "savers": ("--rounds", "--batches", "--bf16", "--json", "saver", "cache"),
    "published": ("--quick", "--json", "--page", "t4", "fitcheck", "configurations"),
    "published-time": ("--json", "a100", "held rows", "every second row"),
    "peft-experiment": ("--output", "--json", "16 gib", "row should show"),
    "env-speed": ("--quick", "--json", "stacked", "cpu time", "peft"),
    "methods": ("--suite", "--workers", "--pack", "--json", "paired seeds", "tuning seeds"),
    "methods-report": ("--suite", "--rows", "--json", "stored rows", "bootstrap"),
    "rates": ("--rows", "--json", "published", "sweeps"),
    "loss-runs": ("--models", "--minutes", "--quick", "--json", "drawn plans", "folder of the plan"),
    "no-sweep": ("--output", "--pack", "--quick", "--json", "best rate"),
    "control": ("--learners", "--seeds", "--quick", "--json", "nobody learned"),
    "elastic": ("--trials", "--quick", "--json", "another process"),
    "gpu-evidence": ("--dry-run", "--only", "--json", "24 gib", "exit status is 1"),
    "worth": ("--rows", "--write", "--json", "left out", "loss-runs"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run([name, "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.lower().replace("│", " ").split())
    assert f"usage: python -m benchmarks {name}" in shown
    for part in EXPLAINED[name]:
        assert part in shown


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["help"], 0)])
def test_all_benchmarks_are_listed(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == status
    shown = capsys.readouterr().out
    for name, (_, told) in BENCHMARKS.items():
        assert f"{name} " in shown
        assert told[:40] in " ".join(shown.split())


def test_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown benchmark 'overheads'. Did you mean: 'overhead'"):
        run(["overheads"])


def test_from_a_checkout() -> None:
    command = [sys.executable, "-m", "benchmarks", "overheads"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m benchmarks: Unknown benchmark 'overheads'. Did you mean: 'overhead'")
