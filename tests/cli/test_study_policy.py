"""`rankpilot study policy`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rankpilot.cli import main as cli
from rankpilot.study.policy.suite_page import suite_html

from ..study.policy.conftest import folder as folder  # the fixture
from .mistakes import failure


def test_the_page_and_its_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["study", "policy", str(folder), "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Page: {page}"
    assert any(line.startswith("The gain of default over uniform rank is") for line in lines)
    assert cli.run(["study", "policy", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert suite_html(data) == page.read_text()
    assert cli.run(["study", "policy", str(folder), "--json", "--output", str(tmp_path / "data.json")]) == 0
    assert json.loads((tmp_path / "data.json").read_text()) == data


def test_a_rule_has_no_networks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "policy", str(folder), "--policy", "uniform", "--output", str(tmp_path / "a.html")]) == 0
    assert "What drives it is not known: uniform is a rule" in capsys.readouterr().out


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no runs of 'nobody'" in failure(["study", "policy", str(folder), "--policy", "nobody"], capsys)
    assert "holds no runs of 'default'" in failure(["study", "policy", str(tmp_path)], capsys)
    wrong = ["study", "policy", str(folder), "--output", str(tmp_path)]
    assert "is a folder. Pass the name of a file" in failure(wrong, capsys)
