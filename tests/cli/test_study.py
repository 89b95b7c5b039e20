"""`rankpilot study`."""

from __future__ import annotations

import json
import shutil
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from rankpilot.cli import finetune
from rankpilot.cli import main as cli
from rankpilot.common.files import read_json, write_json
from rankpilot.study.page import page_data, study_html
from rankpilot.study.run_data import read_run

from ..study.conftest import MIB
from ..study.conftest import run_folder as run_folder
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


def test_the_page_of_a_run_lies_in_its_folder(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder.rename(run_folder.with_name("run [x]"))
    assert cli.run(["study", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Page: {folder / 'study.html'}"
    assert (
        "From a single run each, rankpilot's held-out loss is 4.9% lower than that of uniform ranks, "
        "ranks 4 to 16 on 17 of 36 modules." in lines
    )
    assert not any(line.startswith("Not shown on the page") for line in lines)
    assert (folder / "study.html").read_text().startswith("<!DOCTYPE html>")


def test_what_exact_savers_bring_stands_on_the_page_and_is_printed(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "decisions" / "decisions.jsonl"
    first, *others = path.read_text().splitlines()
    saved = [("plain LoRA", 8 * MIB, 4 * MIB), (f"loss in tiles, {NAME}", 6 * MIB, None)]
    for count, rows in ((1, 2), (2, 3)):
        told = [dict(zip(("name", "step_bytes", "again_bytes"), each, strict=True)) for each in saved[:count]]
        path.write_text("\n".join([json.dumps(json.loads(first) | {"saved": told}), *others, ""]))
        assert len(page_data([read_run(run_folder)], [None])["runs"][0]["savers"]) == rows
        assert cli.run(["study", str(run_folder), "--explain", "none"]) == 0
        assert ("Same losses in less memory" in (text := capsys.readouterr().out)) is (rows > 0)
    assert page_data([read_run(run_folder)], [None])["runs"][0]["savers"] == [
        ["step, in MiB", "no checkpointing", "all checkpointed"],
        ["plain LoRA", "8.00", "4.00"],
        [f"+ loss in tiles, {NAME}", "6.00", "–"],
    ]
    assert NAME in text


def test_an_evaluation_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"groups": []}))
    (tmp_path / "study.html").write_text("mine")
    line = failure(["study", str(tmp_path)], capsys)
    assert "is not the folder of a run: there is no decision log, and results (" in line
    assert "for results of `rankpilot policy evaluate`, see its summary.json" in line
    assert (tmp_path / "study.html").read_text() == "mine"


def test_the_data_as_json(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", str(run_folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"][0]["name"] == "demo"
    assert "study.html" not in {path.name for path in run_folder.iterdir()}
    assert cli.run(["study", str(run_folder), "--json", "--output", str(tmp_path / "data.json")]) == 0
    assert json.loads((tmp_path / "data.json").read_text()) == data
    assert study_html(data)


def test_mistakes(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    script = tmp_path / "t.sh"
    script.write_text("echo mine")
    no_folder = "are run folders"
    for words, told in {
        "": "No run given",
        "why": no_folder,
        f"replay {run_folder}": no_folder,
        f"{run_folder} nowhere": no_folder,
        f"{tmp_path / 'empty'}": "it has no decision log (decisions/decisions.jsonl",
        f"{run_folder} --output {tmp_path}": "is a folder. Pass a file name",
        f"{run_folder} --output {script}": "already exists and is not a study page. Choose another name.",
        f"{run_folder} --json --output {script}": "already exists and is not a JSON file. Choose another name.",
        f"{run_folder} --json --open": "Pass only one of them",
    }.items():
        assert told in failure(f"study {words}", capsys)
    assert "to replay a run, use `rankpilot replay`" in failure("study why", capsys)
    assert script.read_text() == "echo mine"


def test_several_runs_stand_side_by_side(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    other, page = folder.with_name("tight"), folder.with_name("both.html")
    shutil.copytree(folder, other)
    summary = read_json(other / "summary.json")
    summary["runs"] = {"rankpilot": summary["runs"]["rankpilot"] | {"held_out_loss": 0.1234}}
    write_json(other / "summary.json", summary)
    both = ["study", str(folder), str(other)]
    assert "2 runs have no common folder for the page. Pass --output FILE." in failure(both, capsys)
    assert cli.run([*both, "--output", str(page), "--open"]) == 0
    assert opened == [page.as_uri()]
    lines = capsys.readouterr().out.splitlines()
    (losses,) = (line for line in lines if "held-out loss" in line and "│" in line)
    assert [cell.strip() for cell in losses.split("│")[2:-1]] == ["0.3841", "0.4041", "0.1234"]
    heads = " ".join(lines[: lines.index(losses)])
    assert "tight:" in heads
    assert "run [x]:" in heads


def test_what_is_wrong_and_what_is_missing_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "decisions" / "decision-000002.safetensors").write_bytes(b"")
    summary = read_json(folder / "summary.json") | {"held_out_rows": 800, "largest_class": 0.9}
    write_json(folder / "summary.json", summary)
    assert cli.run(["study", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "The model is guessing" in " ".join(out.split())
    assert "Not shown on the page: all decisions (" in out
    assert "Picture of the ranks" not in out
    assert f"Adapter (the page shows how to load, merge and export it): {folder / 'rankpilot' / 'adapter'}\n" in out
    assert f"MiniLM on {NAME}" in out


def test_a_finished_run_with_a_torn_decision_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "decisions" / "decision-000002.safetensors").write_bytes(b"{")

    def finished(options: Any, output: Path, **others: Any) -> Any:
        others["on_phase"](f"loading {NAME}")
        return read_json(output / "summary.json")

    monkeypatch.setattr("rankpilot.finetune.experiment.finetune", finished)
    finetune.finetune_command(finetune.Finetune("a/m", "d", output=folder, resume=True))
    out = capsys.readouterr().out
    assert f"loading {NAME}" in out
    assert "decision-000002.safetensors is missing, corrupt" in out
    assert f"Page: {folder / 'study.html'}\n" in out
