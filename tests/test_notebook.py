"""The notebooks run from start to end, and say what their text promises."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a notebook prints."""
    monkeypatch.setenv("RANKPILOT_NOTEBOOK", str(folder))
    path = FOLDER / name
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        path = folder / "cells.py"
        path.write_text(re.sub(r"^%", "# %", code, flags=re.M), encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.long
def test_a_run_is_studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = run("study.py", tmp_path, monkeypatch, capsys)
    for key_result in (
        r"rate: held-out losses from \d+\.\d{3} to \d+\.\d{3}",
        r"Decisions that differ when they are taken again: 0\n",
        r"  total +[+-]\d+\.\d %",
        r"step 0: \d+ of \d+ ranks as signal-mean would have them",
        r"left-alone: the loss is [+-]\d+\.\d \(.* % above that of rate",
    ):
        assert re.search(key_result, told), key_result
    assert "Checked: False" not in told
    assert (tmp_path / "run.html").stat().st_size > 10_000


@pytest.mark.long
def test_an_agent_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two updates, and four tasks: what it says is there, and not what it wins."""
    monkeypatch.setenv("RANKPILOT_UPDATES", "2")
    told = run("train_agent.py", tmp_path, monkeypatch, capsys)
    for key_result in (
        r"oracle +[+-]\d+\.\d \(",
        r"after update 2: [+-]\d+\.\d % above the rule's loss on validation tasks",
        r"agent: the loss is [+-]\d+\.\d \(.* % above that of left-alone",
        r"agent: the loss is [+-]\d+\.\d \(.* % above that of union",
        r"decides at 12 moments of a run",
    ):
        assert re.search(key_result, told), key_result
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.assets
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_what_is_predicted_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run("fit_your_card.ipynb", tmp_path, monkeypatch, capsys)
    assert re.search(r"llama-3.1-8b on RTX 4090: 32 layers, \d+ of them checkpointed\n[\d.]+ GiB .* it fits", told)
    assert re.search(r" 1 rows of +512 tokens: 0\n", told)
    peak, limit = map(float, re.findall(r"Highest peak ([\d.]+) MiB, of a budget of ([\d.]+) MiB", told)[0])
    assert 0.5 * limit < peak <= limit
    assert re.search(r"step 1: predicted [\d.]+ MiB, measured [\d.]+ MiB", told)
    assert "r=16, lora_alpha=32, rank_pattern={}" in told


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_cells_are_markdown_or_code(notebook: Path) -> None:
    """What jupytext takes for Markdown is comments alone, so that nothing of it is lost."""
    cells = re.split(r"^# %%", notebook.read_text(encoding="utf-8"), flags=re.M)
    assert cells[0] == ""
    text = [cell for cell in cells[1:] if cell.startswith(" [markdown]\n")]
    code = [cell for cell in cells[1:] if cell.startswith("\n")]
    assert len(text) + len(code) == len(cells) - 1
    assert len(text) >= 5
    for cell in text:
        assert all(line.startswith("#") or not line for line in cell.splitlines()[1:])
