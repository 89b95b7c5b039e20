"""The Python and SQL of docs/dataset.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rankpilot.study.dataset.read import SAMPLE

PAGE = (Path(__file__).parents[3] / "docs" / "dataset.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=["rows", "minari"])
def test_a_block(
    code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    if "minari" in code:
        pytest.importorskip("minari")
        pytest.importorskip("h5py")
    exec(code, {})
    if "print" in code:
        plans = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in plans].count("uniform") == 1
        assert len(plans) >= 5
    else:
        assert (tmp_path / "rankpilot" / "trials-v0").is_dir()


def test_the_query(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/trials").symlink_to(SAMPLE)
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"```sql\n(.*?)```", PAGE, re.S)
    rows = duckdb.sql(query).fetchall()
    assert len(rows) >= 20
    assert rows == sorted(rows, key=lambda row: (row[0], row[2]))
