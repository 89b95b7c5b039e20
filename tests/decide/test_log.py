"""The decision log: whole decisions, read as they were written, and as a table."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from rankpilot.common.errors import ConfigError, DataError, RunFolderError
from rankpilot.cost.cost import ByteCost, ParameterCost
from rankpilot.cost.savers.prices import Saved
from rankpilot.cost.step_time import PlanSeconds
from rankpilot.decide.choice import Choice
from rankpilot.decide.log import DecisionLog, DecisionRecord
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.plan.goal import Goal
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.decide.plan.worth import FEATURES
from rankpilot.decide.policy import Decision, decision_line, plan_distance
from rankpilot.lora.spec import RankLadder

MODULES = ("layer.1.query", "layer.0.query", "layer.0.dense")
STEPS = (0, 36, 68, 100)


def make_problem(limit: float = 1e9 + 1, **changes: Any) -> AllocationProblem:
    """Three modules of different sizes at ranks 1, 2 and 4."""
    per_rank, needs = np.array([[1e3, 2e3, 3e3], [4e3, 5e3, 6e3]]), np.array([[True, False, True]])
    cost = ByteCost(("the loss", "layer 0"), np.array([1e6, 2e6]), per_rank, np.array([[7e4], [8e4]]), needs)
    ranks, most, blocks = np.array([1, 2, 4]), np.array([64, 32, 16]), np.array([1, 0, 0])
    return replace(AllocationProblem(ranks, most, blocks, cost, limit, RankLadder(), 2, hysteresis=0.2), **changes)


def make_choice(**changes: Any) -> Choice:
    """Plain LoRA and two other plans for three modules, of which the second is taken."""
    parts = np.zeros((3, len(FEATURES)))
    parts[1:] = np.linspace(-0.01, 0.02, 2 * len(FEATURES)).reshape(2, -1)
    found = Choice(
        names=("rank 8 on all modules", "rank 4 on the top layer", "as much as fits"),
        plans=np.array([[8, 8, 8], [4, 0, 0], [8, 1, 128]]),
        parts=parts, spread=np.array([0.0, 0.125, 1 / 3]), costs=np.array([3.0, 1.0, 1 / 3]), seconds=None,
        fits=np.array([False, True, True]), goal=Goal(), taken=1,
    )  # fmt: skip
    return replace(found, **changes)


def make_record(number: int = 0, **changes: Any) -> DecisionRecord:
    """A decision whose numbers all differ, so that a swapped column shows; `problem` is one of the changes."""
    generator = np.random.default_rng(number)
    features = generator.uniform(-3, 3, (3, len(MODULE_FEATURES))).astype(np.float32)
    run = generator.uniform(0, 1, len(RUN_FEATURES)).astype(np.float32)
    problem = changes.pop("problem", None) or make_problem()
    record = DecisionRecord(
        run="sst2-7", policy="pilot-small", policy_sha256="5e1f", number=number, step=STEPS[number % 4], seed=2**40,
        loss=0.7 - 0.1 * number, measured_cost=None if number == 0 else 8e8, predicted_cost=9e8 + 1,
        observation=Observation(features, run, problem, MODULES),
        decision=Decision(np.array([5, 1, 4]), np.array([0.1, 1 / 3, -2.0]), 4.0, 3.5, False, make_choice()),
        rank_clipped=np.array([4, 1, 4]), rank_after=np.array([4, 1, 2]), pinned=np.array([False, True, False]),
        correction=number == 3, schedule={"max_step": 2}, notes={MODULES[1]: "left alone"},
    )  # fmt: skip
    return replace(record, **changes)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Two values of dataclasses, arrays and plain values are equal, types of arrays among it."""
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(one, other, err_msg=where)
    elif hasattr(one, "__dataclass_fields__"):
        assert type(one) is type(other), where
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    else:
        assert one == other, where


@pytest.fixture
def log(tmp_path: Path) -> DecisionLog:
    log = DecisionLog(tmp_path / "decisions")
    for number in range(4):
        log.append(make_record(number))
    return log


SECONDS = PlanSeconds(1 / 3, np.array([0.1, 0.2, 0.3]), np.array([2.0]), np.array([[True, False, True]]))
TIMED = {"taken": 2, "goal": Goal("time", 0.02), "seconds": np.arange(3) / 3, "caveats": ("it learns labels",)}
OF_ANOTHER = "is missing, corrupt or of another decision"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"problem": make_problem(1 / 3, max_step=None, hysteresis=0.0), "pinned": None},
        {"problem": make_problem(low=np.array([0, 1, 0]), high=np.array([8, 8, 16]))},
        {"problem": make_problem(cost=ParameterCost(np.array([[10.0, 20.0, 30.0]])), ladder=RankLadder((0, 1, 2, 4)))},
        {"problem": replace(make_problem(), time=SECONDS)},
        {"loss": None, "policy_sha256": None, "notes": {}, "schedule": {}},
        {"saved": (Saved("plain LoRA", 8e6), Saved("shared copies of inputs, loss in tiles", 6e6, 1e6))},
        {"rates": (1e-3, 1 / 3)},
        {"decision": Decision(np.array([1, 2, 4]), np.zeros(3), exact=True)},
        {"decision": Decision(np.array([1, 2, 4]), np.zeros(3), choice=make_choice(**TIMED))},
    ],
)
def test_a_decision_comes_back_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    log, record = DecisionLog(tmp_path), make_record(**changes)
    log.append(record)
    logged = log.logged(0)
    assert_same(record, logged)
    assert_same(record.problem, logged.problem)
    assert logged.facts() == record.facts()
    assert logged.kept == bool(changes.get("decision") and changes["decision"].exact)


def test_a_line_tells_the_decision_without_the_arrays(log: DecisionLog) -> None:
    lines = [json.loads(line) for line in (log.folder / "decisions.jsonl").read_text().splitlines()]
    assert [line["decision"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["sentence"] == "step 36: 3 modules changed, 858 of 954 MiB, mean rank 2.3"
    assert lines[1]["ranks"] == {"layer.1.query": 4, "layer.0.query": 1, "layer.0.dense": 2}
    assert lines[1]["notes"] == {"layer.0.query": "left alone"}
    told = {"policy": "pilot-small", "step": 36, "unit": "bytes", "limit": 1e9 + 1, "predicted_cost": 9e8 + 1}
    assert told.items() <= lines[1].items()
    arrays = safetensors.numpy.load_file(log.folder / "decision-000001.safetensors")
    assert arrays["rank_after"].tolist() == [4, 1, 2]
    assert arrays["choice.plans"].tolist() == make_choice().plans.tolist()
    assert arrays["choice.spread"].tolist() == make_choice().spread.tolist()
    assert lines[1]["choice"]["names"] == list(make_choice().names)
    assert lines[1]["choice"]["goal"] == {"kind": "quality", "tolerance": 0.01}


def test_a_table_has_a_row_for_each_module(log: DecisionLog) -> None:
    table = log.to_pandas()
    assert table["module"].tolist() == list(MODULES) * 4
    assert table["decision"].tolist() == np.repeat(range(4), 3).tolist()
    assert table["changed_by_projection"].tolist() == [False, False, True] * 4
    record = make_record(1)
    row = table.iloc[4].to_dict()
    expected = {"run": "sst2-7", "policy": "pilot-small", "policy_sha256": "5e1f", "decision": 1, "step": 36}
    expected |= {"seed": 2**40, "loss": 0.7 - 0.1, "limit": 1e9 + 1, "predicted_cost": 9e8 + 1, "measured_cost": 8e8}
    expected |= {"unit": "bytes", "max_step": 2, "hysteresis": 0.2, "rank_floor": 4.0, "depth_bias": 3.5, "change": 0}
    expected |= {
        "expected": make_choice().expected[1],
        "spread": 0.125,
        "kept": False,
        "filled": 0,
        "correction": False,
    }
    expected |= {"module_index": 1, "module": "layer.0.query", "block": 0, "pinned": True, "note": "left alone"}
    expected |= {"rank_before": 2, "rank_wanted": 1, "rank_clipped": 1, "rank_after": 1, "changed_by_projection": False}
    expected |= {"score": 1 / 3}  # float64: the projection can be replayed exactly
    assert {name: row[name] for name in row if not name.startswith(("feature.", "run."))} == expected
    assert [row[f"feature.{name}"] for name in MODULE_FEATURES] == record.observation.modules[1].tolist()
    assert [row[f"run.{name}"] for name in RUN_FEATURES] == record.observation.run.tolist()


def test_savers_and_rates_of_a_line_are_checked_and_earlier_lines_tell_none(log: DecisionLog) -> None:
    path = log.folder / "decisions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line.pop("saved"), line.pop("rates")) for line in lines] == [([], None)] * 4
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same(log.read()[1], make_record(1))
    whole = {"name": "plain LoRA", "step_bytes": 8.0, "again_bytes": None}
    for wrong in (1, [1], [{}], [whole | {"name": 1}], [whole | {"step_bytes": "8"}], [whole | {"again_bytes": []}]):
        path.write_text(json.dumps(lines[0] | {"saved": wrong}) + "\n")
        with pytest.raises(RunFolderError, match=OF_ANOTHER):
            log.read()
    for rates in (1, [1e-3], ["a", 1e-3], [1e-3, 1e-3, 1e-3]):
        path.write_text(json.dumps(lines[0] | {"rates": rates}) + "\n")
        with pytest.raises(RunFolderError, match=OF_ANOTHER):
            log.read()


def test_without_pandas_there_is_a_line_that_says_so(log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="requires pandas: pip install pandas"):
        log.to_pandas()


def test_more_than_ten_decisions_keep_their_order(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    for number in (11, 2, 100_000, 0):
        log.append(make_record(number))
    assert [record.number for record in log.read()] == [0, 2, 11, 100_000]


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (10**6, 4)])
def test_truncate_keeps_the_first_decisions(log: DecisionLog, keep: int, left: int) -> None:
    before = (log.folder / "decisions.jsonl").read_text().splitlines()
    assert log.truncate(keep) == 4 - left
    assert len(log) == left
    names = [*(f"decision-00000{number}.safetensors" for number in range(left)), *["decisions.jsonl"] * (left > 0)]
    assert sorted(path.name for path in log.folder.iterdir()) == names
    if left:
        assert (log.folder / "decisions.jsonl").read_text().splitlines() == before[:left]


def test_a_resumed_run_takes_its_decisions_again(log: DecisionLog) -> None:
    with pytest.raises(RunFolderError, match="Decision 2 is already"):
        log.append(make_record(2))
    log.truncate(2)
    log.append(make_record(2, loss=float("nan")))
    assert np.isnan(log.read()[-1].loss or 0)
    assert log.truncate(3) == 0, "what is not finite is kept as well"


def test_a_crash_while_writing_leaves_whole_decisions(log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        log.append(make_record(4))
    assert len(log) == 4
    assert len(list(log.folder.iterdir())) == 5


def test_what_a_killed_process_left_is_not_read(log: DecisionLog, caplog: pytest.LogCaptureFixture) -> None:
    """It was killed between the arrays and the line of a decision, in the middle of the line."""
    path = log.folder / "decisions.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    scratch = log.folder / ".decision-000004.safetensors.x1"
    scratch.mkdir()
    assert [record.number for record in log.read()] == [0, 1, 2]
    assert caplog.messages == [f"Line 4 of {path} is incomplete, probably after a crash, and was skipped."]
    assert log.truncate(4) == 0
    log.append(make_record(3))
    assert path.read_bytes() == content


@pytest.mark.parametrize("made", [False, True])
def test_a_missing_or_empty_folder(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "decisions"
    if made:
        folder.mkdir()
    assert len(DecisionLog(folder)) == 0
    assert DecisionLog(folder).truncate(0) == 0
    assert DecisionLog(folder).put_aside() is None
    with pytest.raises(RunFolderError, match="No decision log"):
        DecisionLog(folder).read()


def test_another_run_puts_the_log_aside(log: DecisionLog) -> None:
    records = log.read()
    (log.folder.parent / "decisions-1").mkdir()
    aside = log.put_aside()
    assert aside == log.folder.parent / "decisions-2"
    assert len(log) == 0
    for one, other in zip(records, DecisionLog(aside).read(), strict=True):
        assert_same(one, other)


def test_a_log_of_the_version_before_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    log = DecisionLog(tmp_path)
    for use in (log.read, lambda: log.logged(0), log.to_pandas, lambda: len(log)):
        with pytest.raises(
            RunFolderError, match=r"log of rankpilot 0\.2 .*Study it with that version, or repeat"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    log.append(make_record())
    assert len(log) == 1, "a run in the same folder has a log of its own"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 6}, "is not a decision of log schema 7, but of 6. Read it with the version"),
        ({"step": "1"}, "is corrupt: step is '1'"),
        ({"step": 10**400}, "is corrupt: step is a whole number of"),
        ({"decision": True}, "is corrupt: decision is True"),
        ({"ranks": [1, 2, 4]}, r"is corrupt: ranks is \[1, 2, 4\]"),
    ],
)
def test_a_line_of_something_else_is_named(log: DecisionLog, changes: dict[str, Any], message: str) -> None:
    path = log.folder / "decisions.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | changes)
    path.write_text("\n".join(lines))
    for use in (log.read, lambda: log.truncate(1)):
        with pytest.raises(RunFolderError, match=f"Line 2 of .*jsonl {message}"):
            use()


@pytest.mark.parametrize("content", [None, b"", b"PK", b"{}", "cut"])
def test_arrays_that_cannot_be_read_are_named(log: DecisionLog, content: bytes | str | None) -> None:
    path = log.folder / "decision-000001.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else whole[:-5])
    with pytest.raises(RunFolderError, match=rf"decision-000001\.safetensors {OF_ANOTHER}"):
        log.read()
    assert log.logged(0).step == 0
    with pytest.raises(RunFolderError, match="No decision 4 in"):
        log.logged(4)


@pytest.mark.parametrize(
    ("arrays", "line", "message"),
    [
        ({"rank_after": np.zeros(2, dtype=np.int64)}, {}, OF_ANOTHER),
        ({"rank_wanted": None}, {}, OF_ANOTHER),
        ({"choice.plans": np.zeros((3, 2), dtype=np.uint16)}, {}, r"plans holds no finite numbers of shape \(3, 3\)"),
        ({"choice.spread": np.array([0.0, 1e3, 1.0])}, {}, "spread holds log losses above 20"),
        ({"choice.seconds": np.zeros(4)}, {}, "seconds holds no finite"),
        ({"choice.fits": None}, {}, OF_ANOTHER),
        ({"choice.costs": np.arange(3)}, {}, "costs holds no finite numbers .* and type float64"),
        ({"choice.spread": np.array([0.0, np.nan, 1.0])}, {}, "spread holds no finite"),
        ({}, {"taken": 3}, "plan 3 of 3"),
        ({}, {"taken": True}, "plan True of 3"),
        ({}, {"names": ["a", "b", 5]}, "names and caveats are no texts"),
        ({}, {"caveats": "many"}, "names and caveats are no texts"),
        ({}, {"goal": {"kind": "speed", "tolerance": 0.01}}, "goal must be one of"),
    ],
)
def test_a_decision_that_contradicts_itself_is_refused(log, arrays, line, message):
    path, lines = log.folder / "decision-000001.safetensors", log.folder / "decisions.jsonl"
    changed = {name: value for name, value in (safetensors.numpy.load_file(path) | arrays).items() if value is not None}
    described = {"rankpilot.features": json.dumps([MODULE_FEATURES, RUN_FEATURES])}
    safetensors.numpy.save_file(changed, path, described)
    rows = [json.loads(row) for row in lines.read_text().splitlines()]
    rows[1]["choice"] |= line
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFolderError, match=message):
        log.logged(1)


def test_a_decision_made_from_other_features_is_named(log: DecisionLog) -> None:
    path = log.folder / "decision-000001.safetensors"
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, path, {"rankpilot.features": json.dumps([["snr"], ["progress"]])})
    with pytest.raises(RunFolderError, match="its policy used other features than this version's"):
        log.logged(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_after": np.zeros(2, dtype=np.int64)}, r"`rank_after` of decision 0 has shape \(2,\), not \(3,\)"),
        ({"decision": Decision(np.ones(3, dtype=np.int64), np.zeros(2))}, r"`score` .* not \(3,\)"),
        ({"problem": replace(make_problem(), ranks=np.zeros(2, dtype=np.int64))}, r"`rank_before` .* not \(3,\)"),
        ({"step": -1}, "step -1"),
        ({"observation": replace(make_record().observation, names=("a", "a", "b"))}, "distinct module names"),
    ],
)
def test_a_contradictory_record_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_record(**changes)


# A decision in one line -----------------------------------------------------------------------------------------------

GIB = 2**30
BEFORE = np.array([8, 8, 8, 8])


@pytest.mark.parametrize(
    ("after", "cost", "limit", "unit", "line"),
    [
        ([16, 4, 8, 8], 12.1 * GIB, 12.3 * GIB, "bytes", "2 modules changed, 12.1 of 12.3 GiB, mean rank 9.0"),
        ([8, 8, 8, 0], 0.5 * GIB, 1.5 * GIB, "bytes", "1 module changed, 0.5 of 1.5 GiB, mean rank 6.0"),
        ([8, 8, 8, 8], 900 * 2**20, 1000 * 2**20, "bytes", "no module changed, 900 of 1,000 MiB, mean rank 8.0"),
        (
            [1, 1, 1, 2],
            240_000,
            300_000,
            "parameters",
            "4 modules changed, 240,000 of 300,000 parameters, mean rank 1.2",
        ),
    ],
)
def test_line(after: list[int], cost: float, limit: float, unit: str, line: str) -> None:
    assert decision_line(28, BEFORE, np.array(after), cost, limit, unit) == f"step 28: {line}"


def test_distances_by_hand() -> None:
    plans = np.array([[1, 3, 0], [1, 1, 3]])
    assert plan_distance(plans, plans[1]).tolist() == pytest.approx([(0 + 1 + 2) / 3, 0])
