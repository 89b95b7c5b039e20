"""The decision log: whole parts, typed columns, any reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rankpilot.allocation.decision_log import DecisionLog, DecisionRecord
from rankpilot.errors import DataError, RunFolderError

MODULES = ("layer.1.query", "layer.0.query", "layer.0.dense")
STEPS = (0, 36, 68, 100)


def make_record(decision: int = 0, **changes: Any) -> DecisionRecord:
    """A decision whose numbers all differ, so that a swapped column shows."""
    record = DecisionRecord(
        run="sst2-7",
        policy="pilot-small",
        decision=decision,
        step=STEPS[decision % 4],
        seed=2**40,
        loss=0.7 - 0.1 * decision,
        limit=1e9 + 1,
        predicted_cost=9e8 + 1,
        measured_cost=None if decision == 0 else 8e8,
        unit="bytes",
        log_prob=-12.5,
        rank_floor=4.0,
        modules=MODULES,
        blocks=np.array([1, 0, 0]),
        delta=np.array([2, -1, 0]),
        rank_before=np.array([1, 2, 4]),
        rank_asked=np.array([4, 1, 4]),
        rank_after=np.array([4, 1, 2]),
        score=np.array([0.1, 1 / 3, -2.0]),
        features=np.arange(6, dtype=np.float32).reshape(3, 2),
        feature_names=("snr", "height"),
        run_features={"progress": 0.25 * decision},
        notes={MODULES[1]: "left alone"},
    )
    return replace(record, **changes)


@pytest.fixture
def log(tmp_path: Path) -> DecisionLog:
    log = DecisionLog(tmp_path / "decisions")
    for decision in range(4):
        log.append(make_record(decision))
    return log


def test_round_trip(log: DecisionLog) -> None:
    table = log.read()
    assert len(log) == 4
    assert table.num_rows == 12
    assert table["module"].to_pylist() == list(MODULES) * 4
    assert table["decision"].to_pylist() == np.repeat(range(4), 3).tolist()
    assert table.slice(4, 1).to_pylist() == [
        {
            "run": "sst2-7",
            "policy": "pilot-small",
            "decision": 1,
            "step": 36,
            "seed": 2**40,
            "loss": 0.7 - 0.1,
            "limit": 1e9 + 1,
            "predicted_cost": 9e8 + 1,
            "measured_cost": 8e8,
            "unit": "bytes",
            "log_prob": -12.5,
            "rank_floor": 4.0,
            "module_index": 1,
            "module": "layer.0.query",
            "block": 0,
            "delta": -1,
            "rank_before": 2,
            "rank_asked": 1,
            "rank_after": 1,
            "score": 1 / 3,  # float64: the projection can be replayed exactly
            "changed_by_projection": False,
            "note": "left alone",
            "feature.snr": 2.0,
            "feature.height": 3.0,
            "run.progress": 0.25,
        }
    ]


def test_changed_by_projection_compares_asked_and_applied(log: DecisionLog) -> None:
    assert log.read()["changed_by_projection"].to_pylist() == [False, False, True] * 4


def test_columns_are_typed_even_where_all_values_are_missing(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.append(make_record(loss=None, measured_cost=None))
    schema = log.read().schema
    assert schema.field("loss").type == pa.float64()
    assert schema.field("measured_cost").type == pa.float64()
    assert schema.field("rank_after").type == pa.int32()
    assert schema.field("feature.snr").type == pa.float32()
    assert log.read()["loss"].null_count == 3


def test_more_than_ten_decisions_keep_their_order(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    for decision in (11, 2, 100_000, 0):
        log.append(make_record(decision))
    assert log.read()["decision"].to_pylist()[::3] == [0, 2, 11, 100_000]


def test_a_feature_that_came_later_is_null_before(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.append(make_record(0))
    log.append(make_record(1, feature_names=("snr", "age")))
    table = log.read()
    assert table["feature.age"].null_count == 3
    assert table["feature.height"].to_pylist()[:3] == [1.0, 3.0, 5.0]


def test_datasets_opens_it_by_pattern(log: DecisionLog, tmp_path: Path) -> None:
    import datasets

    # A run folder below a name like "seed=3" must not gain a column.
    renamed = log.folder.rename(tmp_path / "seed=3")
    rows = datasets.load_dataset(
        "parquet", data_files=str(renamed / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.num_rows == 12
    assert rows[3]["step"] == 36
    assert set(DecisionLog(renamed).read()["seed"].to_pylist()) == {2**40}
    assert pq.ParquetFile(renamed / "part-00000.parquet").schema_arrow.metadata[b"rankpilot.schema"] == b"2"


@pytest.mark.parametrize(("step", "left"), [(-1, 0), (0, 1), (35, 1), (36, 2), (99, 3), (100, 4), (10**6, 4)])
def test_truncate_keeps_decisions_up_to_the_step(log: DecisionLog, step: int, left: int) -> None:
    assert log.truncate(after_step=step) == 4 - left
    assert len(log) == left
    assert [path.name for path in sorted(log.folder.iterdir())] == [f"part-0000{i}.parquet" for i in range(left)]


def test_a_resumed_run_takes_its_decisions_again(log: DecisionLog) -> None:
    with pytest.raises(RunFolderError, match="Decision 2 is already"):
        log.append(make_record(2))
    log.truncate(after_step=40)
    log.append(make_record(2, loss=0.25))
    assert log.read()["loss"].to_pylist()[-1] == 0.25


def test_a_crash_while_writing_leaves_no_part(log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(table: pa.Table, stream: Any) -> None:
        stream.write(b"PAR1half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", torn)
    with pytest.raises(KeyboardInterrupt):
        log.append(make_record(4))
    assert len(log) == 4
    assert len(list(log.folder.iterdir())) == 4


def test_what_a_killed_process_left_is_ignored(log: DecisionLog) -> None:
    scratch = log.folder / ".part-00004.parquet.x1"
    scratch.mkdir()
    (scratch / "part-00004.parquet").write_bytes(b"PAR1half")
    (log.folder / "part-00005.parquet").mkdir()
    assert len(log) == 4
    assert log.read().num_rows == 12


@pytest.mark.parametrize("made", [False, True])
def test_a_missing_or_empty_folder(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "decisions"
    if made:
        folder.mkdir()
    assert len(DecisionLog(folder)) == 0
    assert DecisionLog(folder).truncate(0) == 0
    with pytest.raises(RunFolderError, match="No decision log"):
        DecisionLog(folder).read()


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_corrupt_part_is_named(log: DecisionLog, keep: int) -> None:
    path = log.folder / "part-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if keep == 1 else content[:keep])
    with pytest.raises(RunFolderError, match=r"part-00002\.parquet is corrupt"):
        log.read()
    with pytest.raises(RunFolderError, match=r"part-00002\.parquet"):
        log.truncate(0)
    assert len(log) == 4


@pytest.mark.parametrize("metadata", [None, {b"rankpilot.schema": b"1"}])
def test_a_foreign_schema_is_refused(log: DecisionLog, metadata: dict[bytes, bytes] | None) -> None:
    path = log.folder / "part-00001.parquet"
    pq.write_table(pa.table({"step": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(RunFolderError, match=r"part-00001\.parquet is no decision log of schema 2"):
        log.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": np.zeros(2)}, r"`score` of decision 0 has shape \(2,\), not \(3,\)"),
        ({"features": np.zeros((3, 1), dtype=np.float32)}, r"`features`"),
        ({"modules": ("a", "a", "b")}, "used twice"),
        ({"feature_names": ("snr", "snr")}, "used twice"),
        ({"unit": "GiB"}, "'bytes' or 'parameters'"),
        ({"step": -1}, "step -1"),
    ],
)
def test_a_contradictory_record_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_record(**changes)
