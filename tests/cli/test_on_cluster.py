"""`--cluster`: mistakes in one line, and a comparison whose rows and logs are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from rankpilot.agents.log import DecisionLog
from rankpilot.cli import main as cli
from rankpilot.training.results import read_rows

from .mistakes import failure

TINY = ["--suite", "planted", "--bases", "llama-4x32", "--task-steps", "8", "--tasks", "2", "--logs"]


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = f"--output {tmp_path / 'out'}"
    line = failure(f"evaluate top-down {output} --cluster head", capsys)
    assert "--cluster is 'local', 'auto' or HOST:PORT of a Ray cluster" in line
    assert "got 'head'" in line
    line = failure(f"train {output} --cluster local --device meta", capsys)
    assert "Workers of a cluster train on CPUs, and --device meta is meta. Pass --device cpu." in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_comparison_is_that_of_one_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name, where in (("here", []), ("there", ["--cluster", "local"])):  # where one worker is an actor too
        command = ["evaluate", "top-down", *TINY, "--workers", "1", *where, "--output", str(tmp_path / name)]
        assert cli.run(command) == 0
    assert "On the cluster: 1 node with " in capsys.readouterr().out
    rows = [read_rows(tmp_path / name / "rows.jsonl") for name in ("here", "there")]
    here, there = (sorted(of_one, key=lambda row: row.key) for of_one in rows)
    assert here == there
    assert len(here) == 4
    folders = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here" / "logs").glob("*/*"))
    assert len(folders) == 4
    for folder in folders:
        first, second = (DecisionLog(tmp_path / name / folder) for name in ("here", "there"))
        assert len(first) > 1
        assert first.to_pandas().equals(second.to_pandas())
