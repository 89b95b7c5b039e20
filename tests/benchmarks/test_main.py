"""One command for all benchmarks: it lists them and explains each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, run

ROOT = Path(__file__).parents[2]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for name in BENCHMARKS:
        with pytest.raises(SystemExit) as end:
            run([name, "--help"])
        assert end.value.code == 0, name
        shown = " ".join(capsys.readouterr().out.lower().replace("│", " ").split())
        assert f"usage: python -m benchmarks {name}" in shown
        assert "--json" in shown, name


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["help"], 0)])
def test_all_benchmarks_are_listed(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == status
    shown = capsys.readouterr().out
    for name, (_, told) in BENCHMARKS.items():
        assert f"{name} " in shown
        assert told[:40] in " ".join(shown.split())


def test_from_a_checkout() -> None:
    command = [sys.executable, "-m", "benchmarks", "overheads"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m benchmarks: Unknown benchmark 'overheads'. Did you mean: 'overhead'")
