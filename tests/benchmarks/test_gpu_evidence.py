"""The evidence of a card, on a CPU: what needs one says so, and a section that fails takes no other along."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import read_object

from benchmarks import gpu_evidence
from benchmarks.__main__ import run
from benchmarks.gpu_sections import SECTIONS, Section

NEED_CUDA = ("paged optimizer", "quantised reload", "nccl")


def dry_run(path: Path, *only: str) -> dict[str, Any]:
    run(["gpu-evidence", "--dry-run", "--json", str(path), *(["--only", *only] if only else [])])
    found = read_object(path)["sections"]
    assert list(found) == list(only or SECTIONS)
    shown = path.with_suffix(".md").read_text(encoding="utf-8")
    for name, section in found.items():
        assert section["outcome"] == ("needs CUDA: not run" if name in NEED_CUDA else "ran")
        assert f"| {name} | {section['outcome']} |" in shown
        assert all(f"| {row['what']} |" in shown for row in section["rows"])
    return found


def test_a_dry_run_of_what_moves_memory(tmp_path: Path) -> None:
    found = dry_run(tmp_path / "evidence.json", "out of memory", "elastic budget", "nccl")
    assert {row["what"]: row["measured"] for row in found["out of memory"]["rows"]}["errors"] == 1


@pytest.mark.long
def test_a_dry_run(tmp_path: Path) -> None:
    found = dry_run(tmp_path / "evidence.json")
    assert len(found["peaks"]["rows"]) == 8
    for row in found["peaks"]["rows"]:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.01)
    assert len(found["step times"]["rows"]) == 7
    assert {row["measured"] for row in found["gpu tests"]["rows"]} == {"skipped"}


def test_a_section_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"broken": Section(math.sqrt, 1), "nccl": SECTIONS["nccl"]}  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_evidence, "SECTIONS", sections)
    path = tmp_path / "evidence.json"
    with pytest.raises(SystemExit) as end:
        run(["gpu-evidence", "--dry-run", "--json", str(path)])
    assert end.value.code == 1
    broken, nccl = read_object(path)["sections"].values()
    assert broken["outcome"].startswith("failed: TypeError: must be real number")
    assert nccl["outcome"] == "needs CUDA: not run"
    assert "| broken | failed: TypeError" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_an_unknown_section_and_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no such section. Sections are: gpu tests, peaks"):
        run(["gpu-evidence", "--dry-run", "--only", "peak"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="No CUDA card is at hand"):
        run(["gpu-evidence"])
