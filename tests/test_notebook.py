"""The notebook runs from start to end, and says what its text promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "study.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANKPILOT_NOTEBOOK", str(tmp_path))
    runpy.run_path(str(NOTEBOOK), run_name="__main__")
    told = capsys.readouterr().out
    for key_result in (
        r"default: mean gain over uniform rank [+-]\d\.\d\d of the headroom, on 8 tasks",
        r"Decisions that differ when they are taken again: 0\n",
        r"  total +[+-]\d+\.\d %",
        r"Fewest bytes, at most 3% more loss: ",
        r"step 0: \d+ of \d+ ranks as signal-mean would have them",
        r"The gain of default over uniform rank is",
        r"It leaves plain LoRA in \d+% of the runs",
        r"signal-mean: [+-]\d\.\d\d of the headroom",
    ):
        assert re.search(key_result, told), key_result
    assert "Checked: False" not in told
    for name in ("ranks.png", "run.html"):
        assert (tmp_path / name).stat().st_size > 10_000, name


def test_cells_are_markdown_or_code() -> None:
    """What jupytext takes for Markdown is comments alone, so that nothing of it is lost."""
    cells = re.split(r"^# %%", NOTEBOOK.read_text(encoding="utf-8"), flags=re.M)
    assert cells[0] == ""
    text = [cell for cell in cells[1:] if cell.startswith(" [markdown]\n")]
    code = [cell for cell in cells[1:] if cell.startswith("\n")]
    assert len(text) + len(code) == len(cells) - 1
    assert len(text) > 10
    for cell in text:
        assert all(line.startswith("#") or not line for line in cell.splitlines()[1:])
