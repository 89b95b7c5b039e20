"""`rankpilot study`."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest
from rankpilot.cli import main as cli
from rankpilot.study.page.html import study_html

from ..study.conftest import run_folder as run_folder  # the fixture
from .mistakes import failure


def test_the_page_of_a_run_lies_in_its_folder(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder.rename(run_folder.with_name("run [x]"))
    (folder / "decisions" / "decision-000002.safetensors").write_bytes(b"")
    assert cli.run(["study", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Page: {folder / 'study.html'}"
    assert len(lines) == 2
    assert lines[0].startswith("Left out of the page: all decisions (")
    assert (folder / "study.html").read_text().startswith("<!DOCTYPE html>")
    assert not (folder / "figures").exists()


def test_an_evaluation_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"groups": []}))
    (tmp_path / "study.html").write_text("the page of the policy")
    line = failure(["study", str(tmp_path)], capsys)
    assert "holds no run: there is no decision log, and the results (" in line
    assert "The page of an evaluation is made by `rankpilot study policy`" in line
    assert (tmp_path / "study.html").read_text() == "the page of the policy"


def test_several_runs_need_a_place(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    both = ["study", "page", str(run_folder), str(run_folder / "decisions")]
    assert "2 runs have no common folder for their page. Pass --output FILE." in failure(both, capsys)
    page = tmp_path / "both.html"
    assert cli.run([*both, "--output", str(page), "--open"]) == 0
    assert opened == [page.as_uri()]


def test_the_data_as_json(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", str(run_folder), "--json", "--png"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"][0]["name"] == "demo"
    assert sorted(path.name for path in (run_folder / "figures").iterdir()) == ["loss.png", "memory.png", "ranks.png"]
    assert not (run_folder / "study.html").exists()
    assert cli.run(["study", str(run_folder), "--json", "--output", str(tmp_path / "data.json")]) == 0
    assert json.loads((tmp_path / "data.json").read_text()) == data
    assert study_html(data)


def test_mistakes(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No run was given" in failure(["study"], capsys)
    assert "there is no decision log" in failure(["study", str(tmp_path / "nowhere")], capsys)
    assert "is a folder. Pass the name of a file" in failure(
        ["study", str(run_folder), "--output", str(tmp_path)], capsys
    )
    script = tmp_path / "t.sh"
    script.write_text("echo mine")
    for options, kind in (([], "page"), (["--json"], "JSON")):
        told = failure(["study", str(run_folder), *options, "--output", str(script)], capsys)
        assert f"exists and is no {kind}. Pass a name that is free." in told
    assert script.read_text() == "echo mine"
    assert "Pass one of them" in failure(["study", str(run_folder), "--json", "--open"], capsys)
