"""One command for all benchmarks: it lists them, explains each, and loads nothing for that."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rankpilot.bench.main import BENCHMARKS, run
from rankpilot.cli import main as cli
from rankpilot.errors import UnknownNameError

EXPLAINED = {
    "overhead": ("--quick", "--json", "--device", "--seed", "adalora", "own work"),
    "start": ("--steps", "--timed", "--quick", "--json", "calibration", "cpu time"),
    "recompute": ("--rounds", "--quick", "--json", "checkpointed", "smollm2", "cpu time"),
    "step-time": ("--plans", "--models", "--quick", "--json", "minilm", "cpu time"),
    "decide": ("--policy", "--quick", "--json", "plans", "one thread"),
    "memory": ("--quick", "--json", "--resume", "--device", "--seed", "checkpointing", "guard"),
    "published": ("--quick", "--json", "t4", "fitcheck", "configurations"),
    "env-speed": ("--quick", "--json", "stacked", "cpu time", "peft"),
    "kills": ("--kills", "--quick", "--json", "--seed", "sigkill", "bit for bit"),
    "scaling": ("--subjects", "--seeds", "--quick", "--json", "--resume", "parabola", "regret"),
    "methods": ("--suite", "--workers", "--cluster", "--pack", "--json", "paired seeds", "tuning seeds"),
    "methods-report": ("--suite", "--rows", "--json", "stored rows", "bootstrap", "worse by construction"),
    "policy": ("--seeds", "--pack", "--rows", "--page", "--json", "test split", "oracle"),
    "aims": ("--page", "--json", "stored rows", "set before the policy was trained"),
    "plan-runs": ("--cells", "--minutes", "--pack", "--quick", "plain lora", "share seed and batches"),
    "transfer": ("--policies", "--quick", "--json", "--resume", "reuters", "same bytes"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run([name, "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.lower().replace("│", " ").split())
    assert f"usage: rankpilot bench {name}" in shown
    for part in EXPLAINED[name]:
        assert part in shown


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["help"], 0)])
def test_all_benchmarks_are_listed(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments]) == status
    shown = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert f"{name} " in shown
        assert benchmark.description[:40] in " ".join(shown.split())


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown benchmark 'overheads'. Did you mean: 'overhead'"):
        run(["overheads"])
    assert cli.run(["bench", "speed"]) == 1
    assert "env-speed" in capsys.readouterr().err


def test_the_list_loads_no_library_of_a_benchmark() -> None:
    code = "import sys; from rankpilot.bench.main import run; run(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
