"""Data sets are checked before they are read: one error for each that is torn, foreign or too large."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rankpilot.common.files import sha256
from rankpilot.errors import DataError
from rankpilot.study.dataset import TrialsDataset, open_dataset, sample
from rankpilot.study.dataset import read as module
from rankpilot.study.dataset.read import SAMPLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the sample that a test may damage."""
    shutil.copytree(SAMPLE, tmp_path / "trials")
    return tmp_path / "trials"


def change(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Change what dataset.json tells."""
    path = folder / "dataset.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(edit(facts) or facts))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value)


# The sample -----------------------------------------------------------------------------------------------------------


def test_the_sample_is_small_and_has_a_dozen_tasks() -> None:
    found = sample()
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 200_000
    assert found.facts["tasks"] == 12
    assert {source["kind"] for source in found.facts["sources"]} == {"plan runs", "policy runs"}
    table = found.table(["behaviour", "probability", "split"])
    assert set(table["split"].to_pylist()) == {"train", "validation"}
    assert "default exploring at 0.05" in table["behaviour"].to_pylist()


def test_reading_loads_no_library_for_training() -> None:
    code = (
        "import sys; from rankpilot.study.dataset import sample; print(sample().table().num_rows); "
        "assert not set(sys.modules) & {'torch', 'transformers', 'gymnasium', 'matplotlib', 'tyro'}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sample().facts["rows"]


def test_rows_of_some_columns_and_of_one_source() -> None:
    found = sample()
    table = found.table(["task", "ranks"], source="policy runs")
    assert table.column_names == ["task", "ranks"]
    assert table.num_rows + found.table(source="plan runs").num_rows == found.facts["rows"]
    with pytest.raises(DataError, match="no columns rank; there are source, origin"):
        found.table(["rank"])


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_data_set(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path, "no data set of rankpilot")
    refused(tmp_path / "absent", "no data set of rankpilot")
    (folder / "dataset.json").write_text("{")
    refused(folder, "not that of a data set")


@pytest.mark.parametrize(
    "edit",
    [
        lambda facts: [facts],
        lambda facts: facts.update(format="parquet"),
        lambda facts: facts.update(schema=2),
        lambda facts: facts.update(module_features=["height"]),
        lambda facts: facts.update(rows=1),
        lambda facts: facts.update(files={}),
        lambda facts: facts["files"]["trials-00000.parquet"].pop("rows"),
        lambda facts: facts.pop("sources"),
    ],
    ids=["list", "format", "schema", "features", "rows", "no files", "no rows", "no sources"],
)
def test_facts_that_are_foreign(folder: Path, edit: Callable[[Any], Any]) -> None:
    change(folder, edit)
    refused(folder, "not that of a data set of schema 1")


@pytest.mark.parametrize("name", ["../trials-00000.parquet", "policy.pkl", "/etc/passwd"])
def test_names_of_files_that_lead_elsewhere(folder: Path, name: str) -> None:
    change(folder, lambda facts: facts["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(folder, "no data set has a file")


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_files_that_are_torn(folder: Path, damage: str) -> None:
    path = folder / "trials-00001.parquet"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-10])
    elif damage == "changed":
        path.write_bytes(content[:2000] + b"?" + content[2001:])
    refused(folder, "missing or damaged")


def put(folder: Path, table: pa.Table | None) -> None:
    """Put another table, or text, in place of the first file, with its right size and sha256."""
    path = folder / "trials-00000.parquet"
    if table is None:
        path.write_text("no Parquet")
    else:
        pq.write_table(table, path)
    told = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    change(folder, lambda facts: facts["files"][path.name].update(told))


def test_files_that_hold_something_else(folder: Path) -> None:
    table = pq.read_table(folder / "trials-00000.parquet")
    put(folder, table.slice(1))
    refused(folder, "does not hold")
    put(folder, table.drop_columns("loss"))
    refused(folder, "does not hold")
    put(folder, table.set_column(0, "source", pa.array(range(table.num_rows))))
    refused(folder, "does not hold")
    put(folder, None)
    refused(folder, "no Parquet file")


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch, dataset: TrialsDataset) -> None:
    for name, words in (("MOST_FACTS", "more than 100 bytes"), ("MOST_FILE", "at most"), ("MOST_UNPACKED", "bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 100)
            refused(dataset.folder, words)
