"""The decision log: whole parts, typed columns, any reader."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rankpilot.allocation.decision_state import DecisionState
from rankpilot.allocation.deliberation import Deliberation
from rankpilot.allocation.features import MODULE_FEATURES, RUN_FEATURES
from rankpilot.allocation.log import DecisionLog, DecisionRecord
from rankpilot.allocation.problem import AllocationProblem
from rankpilot.errors import DataError, RunFolderError
from rankpilot.lora.ladder import RankLadder
from rankpilot.memory.cost import ByteCost, ParameterCost

MODULES = ("layer.1.query", "layer.0.query", "layer.0.dense")
STEPS = (0, 36, 68, 100)


def make_problem(limit: float = 1e9 + 1, **changes: Any) -> AllocationProblem:
    """Three modules of different sizes at ranks 1, 2 and 4."""
    cost = ByteCost(
        moments=("the loss", "layer 0"),
        constant=np.array([1e6, 2e6]),
        per_rank=np.array([[1e3, 2e3, 3e3], [4e3, 5e3, 6e3]]),
        group_bytes=np.array([[7e4], [8e4]]),
        needs=np.array([[True, False, True]]),
    )
    ranks, most, blocks = np.array([1, 2, 4]), np.array([64, 32, 16]), np.array([1, 0, 0])
    return replace(AllocationProblem(ranks, most, blocks, cost, limit, RankLadder(), 2, hysteresis=0.2), **changes)


def make_deliberation(**changes: Any) -> Deliberation:
    """Four candidates with three plans for three modules, on which two networks vote."""
    deliberation = Deliberation(
        candidates=("uniform", "top-down", "actor", "drawn 0"),
        basis=("signal_mean", "actor"),
        weights=np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.5, 2.0]]),
        placements=np.array([[0.5, 0.0], [0.0, 0.0], [-1.0, 2.0], [0.25, -3.0]]),
        plan_of=np.array([0, 1, 1, 2]),
        plans=np.array([[2, 2, 2], [4, 1, 2], [8, 0, 1]]),
        votes=np.array([[0.0, 0.5, 0.25], [0.0, 0.5, -0.25]], dtype=np.float32),
        lcb_coefficient=1.0,
        tie=0.0,
        directions=("snr", "estimate"),
        actor_gains=np.array([0.25, 1.0]),
        actor_estimate=np.array([0.5, -0.5, 0.0]),
        actor_scores=np.array([1.0, -1.0, 0.0]),
        taken=1,
    )
    return replace(deliberation, **changes)


def make_record(decision: int = 0, **changes: Any) -> DecisionRecord:
    """A decision whose numbers all differ, so that a swapped column shows."""
    record = DecisionRecord(
        run="sst2-7",
        policy="pilot-small",
        policy_sha256="5e1f",
        decision=decision,
        step=STEPS[decision % 4],
        seed=2**40,
        loss=0.7 - 0.1 * decision,
        predicted_cost=9e8 + 1,
        measured_cost=None if decision == 0 else 8e8,
        rank_floor=4.0,
        depth_bias=3.5,
        log_prob=-12.5,
        expected=0.75,
        uncertainty=0.125,
        kept=False,
        correction=decision == 3,
        modules=MODULES,
        problem=make_problem(pinned=np.array([False, True, False])),
        rank_wanted=np.array([5, 1, 4]),
        rank_clipped=np.array([4, 1, 4]),
        rank_after=np.array([4, 1, 2]),
        score=np.array([0.1, 1 / 3, -2.0]),
        features=np.arange(6, dtype=np.float32).reshape(3, 2),
        feature_names=("snr", "relative_depth"),
        run_features={"progress": 0.25 * decision},
        state=DecisionState({"max_step": 2}, make_deliberation()),
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
            "policy_sha256": "5e1f",
            "decision": 1,
            "step": 36,
            "seed": 2**40,
            "loss": 0.7 - 0.1,
            "limit": 1e9 + 1,
            "predicted_cost": 9e8 + 1,
            "measured_cost": 8e8,
            "unit": "bytes",
            "max_step": 2,
            "hysteresis": 0.2,
            "rank_floor": 4.0,
            "depth_bias": 3.5,
            "log_prob": -12.5,
            "expected": 0.75,
            "uncertainty": 0.125,
            "margin": 0.5,
            "tie_size": 1,
            "kept": False,
            "filled": 0,
            "correction": False,
            "problem": "problem-00000.safetensors",
            "module_index": 1,
            "module": "layer.0.query",
            "block": 0,
            "pinned": True,
            "rank_before": 2,
            "rank_wanted": 1,
            "rank_clipped": 1,
            "rank_after": 1,
            "score": 1 / 3,  # float64: the projection can be replayed exactly
            "changed_by_projection": False,
            "note": "left alone",
            "feature.snr": 2.0,
            "feature.relative_depth": 3.0,
            "run.progress": 0.25,
        }
    ]


def test_changed_by_projection_compares_clipped_and_applied(log: DecisionLog) -> None:
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
    assert table["feature.relative_depth"].to_pylist()[:3] == [1.0, 3.0, 5.0]


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
    assert pq.ParquetFile(renamed / "part-00000.parquet").schema_arrow.metadata[b"rankpilot.schema"] == b"4"


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (10**6, 4)])
def test_truncate_keeps_the_first_decisions(log: DecisionLog, keep: int, left: int) -> None:
    assert log.truncate(keep) == 4 - left
    assert len(log) == left
    problems = ["problem-00000.safetensors"] if left else []
    assert [path.name for path in sorted(log.folder.iterdir())] == [
        *(f"part-0000{i}.parquet" for i in range(left)),
        *problems,
        *(path.name for path in log.folder.glob("recipes-*") if left),
        *(f"state-0000{i}.safetensors" for i in range(left)),
    ]


def test_a_resumed_run_takes_its_decisions_again(log: DecisionLog) -> None:
    with pytest.raises(RunFolderError, match="Decision 2 is already"):
        log.append(make_record(2))
    log.truncate(2)
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
    assert len(list(log.folder.glob("part-*"))) == 4
    assert not list(log.folder.glob(".*"))


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
        log.truncate(3)
    assert len(log) == 4
    assert log.truncate(2) == 2, "a part that is dropped need not be read"


@pytest.mark.parametrize("metadata", [None, *({b"rankpilot.schema": name} for name in (b"1", b"5", b"new"))])
def test_a_foreign_schema_is_refused(log: DecisionLog, metadata: dict[bytes, bytes] | None) -> None:
    path = log.folder / "part-00001.parquet"
    pq.write_table(pa.table({"step": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(
        RunFolderError, match=r"part-00001\.parquet is no decision log of schema 2, 3 or 4: its schema is "
    ):
        log.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": np.zeros(2)}, r"`score` of decision 0 has shape \(2,\), not \(3,\)"),
        ({"features": np.zeros((3, 1), dtype=np.float32)}, r"`features`"),
        ({"modules": ("a", "a", "b")}, "used twice"),
        ({"feature_names": ("snr", "snr")}, "used twice"),
        (
            {"problem": replace(make_problem(), ranks=np.zeros(2, dtype=np.int64))},
            r"`problem.ranks` .* not \(3,\)",
        ),
        ({"step": -1}, "step -1"),
    ],
)
def test_a_contradictory_record_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_record(**changes)


# Schema 2 -------------------------------------------------------------------------------------------------------------


def to_schema_2(path: Path) -> None:
    """Rewrite a part as the version before wrote it."""
    table = pq.ParquetFile(path).read()
    new = ["margin", "tie_size", "kept", "filled", "correction"]
    new += ["policy_sha256", "max_step", "hysteresis", "depth_bias", "expected", "uncertainty", "problem", "pinned"]
    names = {"rank_wanted": "delta", "rank_clipped": "rank_asked", "feature.relative_depth": "feature.height"}
    table = table.drop_columns(new)
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    pq.write_table(table.replace_schema_metadata({b"rankpilot.schema": b"2"}), path)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_log_of_schema_2_is_read_with_one_line_of_notice(
    log: DecisionLog, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = log.read()
    for part in range(parts):
        to_schema_2(log.folder / f"part-0000{part}.parquet")
    table = log.read()
    assert [record.getMessage() for record in caplog.records] == [
        f"{parts} of 4 decisions in {log.folder} are of log schema 2: columns that it lacks are empty."
    ]
    assert set(whole.column_names) | {"delta"} == set(table.column_names)
    for name in whole.column_names:
        assert table.schema.field(name).type == whole.schema.field(name).type, name
    for name in ("rank_clipped", "rank_after", "score", "feature.snr", "feature.relative_depth", "step"):
        assert table[name].to_pylist() == whole[name].to_pylist()
    for name in ("rank_wanted", "pinned", "expected", "max_step", "problem"):
        assert table[name].to_pylist() == [None] * 3 * parts + whole[name].to_pylist()[3 * parts :]
    assert log.truncate(2) == 2
    with pytest.raises(RunFolderError, match="is of log schema 2, which does not hold the problem"):
        log.problem(1)
    log.append(make_record(2))
    assert len(log.read()) == 9
    assert log.problem(2).limit == 1e9 + 1


# Problems -------------------------------------------------------------------------------------------------------------


def assert_same_problem(problem: AllocationProblem, other: AllocationProblem) -> None:
    for name in ("ranks", "max_ranks", "blocks", "low", "high", "pinned"):
        left, right = getattr(problem, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
    assert (problem.limit, problem.max_step, problem.hysteresis) == (other.limit, other.max_step, other.hysteresis)
    assert problem.ladder == other.ladder
    assert type(problem.cost) is type(other.cost)
    for field in fields(problem.cost):  # type: ignore[arg-type]
        np.testing.assert_array_equal(getattr(problem.cost, field.name), getattr(other.cost, field.name))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_step": None, "hysteresis": 0.0, "pinned": None},
        {"low": np.array([0, 1, 0]), "high": np.array([8, 8, 16])},
        {"cost": ParameterCost(np.array([[10.0, 20.0, 30.0]])), "ladder": RankLadder((0, 1, 2, 4))},
    ],
)
def test_the_problem_of_a_decision_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    log, problem = DecisionLog(tmp_path), make_problem(1 / 3, **changes)
    log.append(make_record(problem=problem))
    assert_same_problem(log.problem(0), problem)


def test_a_problem_is_written_once_for_each_change_of_costs(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    problem = make_problem()
    later = replace(problem, ranks=np.array([8, 8, 8]), pinned=np.array([True, False, False]))
    dearer = replace(problem.cost, constant=problem.cost.constant + 1)
    for number, one in enumerate([problem, later, replace(later, cost=dearer), replace(later, cost=dearer, limit=5.0)]):
        DecisionLog(tmp_path).append(make_record(number, problem=one))
        assert_same_problem(log.problem(number), one)
    assert log.read()["problem"].to_pylist()[::3] == [f"problem-0000{number}.safetensors" for number in (0, 0, 2, 3)]
    log.truncate(2)
    assert sorted(path.name for path in tmp_path.glob("problem-*")) == ["problem-00000.safetensors"]
    log.append(make_record(2, problem=later))
    assert log.read()["problem"].to_pylist()[-1] == "problem-00000.safetensors"


@pytest.mark.parametrize("content", [None, b"", b"PK", b"{}"])
def test_a_lost_problem_is_named(log: DecisionLog, content: bytes | None) -> None:
    path = log.folder / "problem-00000.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"problem-00000\.safetensors is missing, or is no file of an allocation"):
        log.problem(3)
    with pytest.raises(RunFolderError, match="No decision 4 in"):
        log.problem(4)
    log.append(make_record(4))
    assert log.problem(4).limit == 1e9 + 1, "written anew"


def test_a_part_that_cannot_be_read_can_be_left_out(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    for decision in range(3):
        log.append(make_record(decision))
    (tmp_path / "part-00001.parquet").write_bytes(b"PAR1")
    errors: list[RunFolderError] = []
    assert sorted(set(log.read(errors.append)["decision"].to_pylist())) == [0, 2]
    (error,) = errors
    assert "part-00001.parquet is corrupt" in str(error)
    for number in (0, 2):
        (tmp_path / f"part-0000{number}.parquet").write_bytes(b"")
    with pytest.raises(RunFolderError, match="3 parts, and none can be read"):
        log.read(errors.append)


# Decisions as they were taken -----------------------------------------------------------------------------------------


def whole_record(decision: int = 0, **changes: Any) -> DecisionRecord:
    """One whose policy saw the features of this version."""
    generator = np.random.default_rng(decision)
    return make_record(
        decision,
        features=generator.uniform(-3, 3, (3, len(MODULE_FEATURES))).astype(np.float32),
        feature_names=MODULE_FEATURES,
        run_features=dict(zip(RUN_FEATURES, generator.uniform(0, 1, len(RUN_FEATURES)).tolist(), strict=True)),
        **changes,
    )


def test_what_was_seen_and_computed_comes_back(tmp_path: Path) -> None:
    log, record = DecisionLog(tmp_path), whole_record()
    log.append(record)
    logged = log.logged(0)
    np.testing.assert_array_equal(logged.observation.modules, record.features)
    assert logged.observation.modules.dtype == logged.observation.run.dtype == np.float32
    assert logged.observation.run.tolist() == np.array([*record.run_features.values()], dtype=np.float32).tolist()
    assert logged.observation.names == record.modules
    assert_same_problem(logged.problem, record.problem)
    assert_same_problem(logged.observation.problem, replace(record.problem, pinned=None))
    assert (logged.step, logged.rank_after.tolist()) == (0, [4, 1, 2])
    assert logged.state is not None
    assert logged.deliberation is not None
    assert logged.state.schedule == {"max_step": 2}
    assert logged.deliberation.votes.tolist() == make_deliberation().votes.tolist()


def test_a_decision_of_schema_3_comes_back_without_what_was_computed(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.append(whole_record())
    path = tmp_path / "part-00000.parquet"
    table = pq.ParquetFile(path).read().drop_columns(["margin", "tie_size", "kept", "filled", "correction"])
    pq.write_table(table.replace_schema_metadata({b"rankpilot.schema": b"3"}), path)
    logged = log.logged(0)
    assert logged.state is logged.deliberation is logged.correction is None
    assert logged.observation.problem.limit == 1e9 + 1
    assert log.read()["kept"].to_pylist() == [None] * 3


def test_a_decision_made_from_other_features_is_named(log: DecisionLog) -> None:
    with pytest.raises(RunFolderError, match=r"made from other features than those of this version: .*snr|importance"):
        log.logged(0)


def test_a_decision_whose_state_is_torn_is_named_and_its_rows_are_read(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    for number in range(2):
        log.append(whole_record(number))
    path = tmp_path / "state-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunFolderError, match=r"state-00001\.safetensors is missing, or is no file"):
        log.logged(1)
    assert log.logged(0).deliberation is not None
    assert log.read().num_rows == 6
