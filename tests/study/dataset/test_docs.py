"""The Python of docs/dataset.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "dataset.md").read_text(), re.S)


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
