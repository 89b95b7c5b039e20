"""`--cluster`: mistakes in one line, and a comparison whose rows and logs are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from rankpilot.agents.evaluation.results import read_rows
from rankpilot.allocation.decision_log import DecisionLog
from rankpilot.cli import main as cli

from .mistakes import failure

TINY = ["--suite", "planted", "--bases", "llama-4x32", "--task-steps", "8", "--tasks", "2", "--logs"]


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = ["--output", str(tmp_path / "out")]
    line = failure(["evaluate", "top-down", *output, "--cluster", "head"], capsys)
    assert "--cluster is 'local', 'auto' or HOST:PORT of a Ray cluster" in line
    assert "got 'head'" in line
    line = failure(["train", *output, "--cluster", "local", "--device", "meta"], capsys)
    assert "Workers of a cluster train on CPUs, and --device meta is meta. Pass --device cpu." in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_is_that_of_one_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name, where in (("one", ["--workers", "1"]), ("two", ["--workers", "2", "--cluster", "local"])):
        assert cli.run(["evaluate", "top-down", *TINY, *where, "--output", str(tmp_path / name)]) == 0
    assert "On the cluster: 1 node with " in capsys.readouterr().out
    one, two = (sorted(read_rows(tmp_path / name / "rows.jsonl"), key=lambda row: row.key) for name in ("one", "two"))
    assert one == two
    assert len(one) == 4
    folders = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "logs").glob("*/*"))
    assert len(folders) == 4
    for folder in folders:
        first, second = (DecisionLog(tmp_path / name / folder) for name in ("one", "two"))
        assert len(first) > 1
        assert first.read().equals(second.read())
