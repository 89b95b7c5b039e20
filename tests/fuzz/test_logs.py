"""Decision logs: their parts, problems and states, and what is made of them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from rankpilot.agents.rules import find_rule
from rankpilot.allocation.decision_state import DecisionState, read_state
from rankpilot.allocation.log import DecisionLog, read_part
from rankpilot.allocation.plan import check_budget, project
from rankpilot.allocation.problem_file import problem_bytes, read_problem
from rankpilot.errors import RunFolderError
from rankpilot.study.decision.explain import explanations
from rankpilot.study.decision.replay import replay
from rankpilot.study.page.data import page_data
from rankpilot.study.page.html import study_html
from rankpilot.study.run.run_data import read_run

from ..allocation.test_decision_log import make_deliberation, whole_record
from .damage import damaged, damaged_tensors, edited_table, opened
from .running import fuzz

PART, PROBLEM, STATE = "part-00001.parquet", "problem-00000.safetensors", "state-00001.safetensors"


@cache
def small_log() -> dict[str, bytes]:
    """The files of a log of three decisions on three modules, by name."""
    with tempfile.TemporaryDirectory() as name:
        log = DecisionLog(Path(name))
        for number in range(3):
            log.append(whole_record(number))
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


@st.composite
def parts(draw: st.DrawFn) -> bytes:
    """A damaged part."""
    content = small_log()[PART]
    if not draw(st.integers(0, 3)):
        return draw(damaged(content))
    table = draw(edited_table(pq.read_table(pa.BufferReader(content))))
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException:  # a column of nothing but nested nothing cannot be written
        return content
    return sink.getvalue().to_pybytes()


@st.composite
def logs(draw: st.DrawFn) -> dict[str, bytes]:
    """A log with one or two damaged files."""
    files = dict(small_log())
    if draw(st.booleans()):
        files[PART] = draw(parts())
    for name in draw(st.lists(st.sampled_from(sorted(files)), max_size=1)):
        if name.endswith("safetensors"):
            files[name] = draw(damaged_tensors(files[name], opened))
    return files


def write(files: dict[str, bytes], folder: Path) -> DecisionLog:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return DecisionLog(folder)


@fuzz(logs(), examples=25)
def test_logs(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        log = write(files, Path(name) / "run" / "decisions")
        run = read_run(Path(name) / "run")
        study_html(page_data([run], [None]))
        replay(log, find_rule("signal-mean"))
        log.truncate(1)
        assert len(log) == 1
        assert {path.name for path in Path(name).iterdir()} == {"run"}


@fuzz(parts(), examples=60)
def test_parts(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / PART
        path.write_bytes(content)
        table = read_part(path)
        assert table["module_index"].to_pylist() == list(range(table.num_rows))
        assert len(set(table["module"].to_pylist())) == table.num_rows > 0


@fuzz(st.deferred(lambda: damaged_tensors(small_log()[PROBLEM], opened)), examples=100)
def test_problems(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / PROBLEM
        path.write_bytes(content)
        problem = read_problem(path)
        check_budget(problem, [f"module {number}" for number in range(len(problem.ranks))])
        plan = project(problem, problem.max_ranks, np.zeros(len(problem.ranks)))
        assert problem.fits(plan.ranks)


@fuzz(st.deferred(lambda: damaged_tensors(small_log()[STATE], opened)), examples=100)
def test_states(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        log = write({**small_log(), STATE: content}, Path(name) / "decisions")
        found = read_state(log.folder / STATE).deliberation
        if found is not None:
            assert found.plans[found.plan].shape == found.plans[found.reference].shape
            assert len(found.tied) == len(found.plans)


# What was found -------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> DecisionLog:
    return write(small_log(), tmp_path / "decisions")


def put(log: DecisionLog, table: pa.Table, **options: object) -> None:
    pq.write_table(table, log.folder / PART, **options)


def table_of(log: DecisionLog) -> pa.Table:
    return pq.ParquetFile(log.folder / PART).read()


def with_column(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, name, pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    "name", ["../problem-00000.safetensors", "/dev/zero", "state-00000.safetensors", "", "problem-0.safetensors"]
)
def test_a_problem_outside_the_log_is_not_read(log: DecisionLog, name: str) -> None:
    put(log, with_column(table_of(log), "problem", [name] * 3))
    for read in (lambda: log.problem(1), lambda: log.logged(1), lambda: log.truncate(2), log.read):
        with pytest.raises(RunFolderError, match="its problem is in a file called"):
            read()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("decision", [1, 1, 2], "decision differs between its rows"),
        ("decision", [-1] * 3, "it is of decision -1"),
        ("module_index", [0, 1, 1], "not numbered from 0 on"),
        ("module", ["a", "a", "b"], "two modules have one name"),
        ("module", ["a", None, "b"], "module is missing"),
        ("rank_after", [1, -4, 1], "rank_after is below 0"),
        ("rank_wanted", [1, None, 1], "rank_wanted is missing"),
        ("score", [None] * 3, "score is missing"),
        ("predicted_cost", [None] * 3, "predicted_cost is missing"),
        ("unit", ["bits"] * 3, "unit 'bits'"),
        ("feature.snr", [0.0, None, 0.0], "'feature.snr' is missing in some row"),
    ],
)
def test_values_that_are_missing_or_of_two_decisions(
    log: DecisionLog, name: str, values: list[object], words: str
) -> None:
    put(log, with_column(table_of(log), name, values))
    with pytest.raises(RunFolderError, match=words):
        log.read()


@pytest.mark.parametrize("number", [2, 2**31 - 1])
def test_a_decision_that_is_not_the_one_of_its_name(log: DecisionLog, number: int) -> None:
    """Pages have a place for each decision up to the last one, so its number is no stranger's to choose."""
    put(log, with_column(table_of(log), "decision", [number] * 3))
    with pytest.raises(RunFolderError, match=f"it is of decision {number}; its name says another"):
        log.read()
    assert log.read(lambda error: None)["decision"].unique().to_pylist() == [0, 2]
    assert len(explanations(log, find_rule("signal-mean"), what_ifs=False)) == 3


def test_a_decision_of_a_number_that_no_run_reaches(log: DecisionLog) -> None:
    put(log, with_column(table_of(log), "decision", [2**31 - 1] * 3))
    (log.folder / PART).rename(log.folder / f"part-{2**31 - 1}.parquet")
    with pytest.raises(RunFolderError, match="or one above 999,999"):
        log.read()


def test_a_column_of_another_type(log: DecisionLog) -> None:
    table = table_of(log)
    index = table.column_names.index("step")
    put(log, table.set_column(index, "step", pa.array(["1", "1", "1"])))
    with pytest.raises(RunFolderError, match="'step' is of type 'string', not int32"):
        log.read()
    put(log, table.drop_columns(["module"]))
    with pytest.raises(RunFolderError, match="module is missing"):
        log.read()


@pytest.mark.parametrize("name", ["max_step", "hysteresis", "pinned"])
def test_a_problem_without_its_columns(log: DecisionLog, name: str) -> None:
    """Found after a hundred thousand inputs: a column may be missing whose lack another version would explain."""
    put(log, table_of(log).drop_columns([name]))
    with pytest.raises(RunFolderError, match=f"is corrupt: {name} is missing"):
        log.logged(1)


def test_a_decision_of_millions_of_modules_is_not_read(log: DecisionLog) -> None:
    """A file of some kilobytes: columns of one value take no room."""
    table, count = table_of(log).select(["decision", "step", "module", "rank_after"]), 1_000_000
    whole = pa.table({name: pa.repeat(table[name][0], count) for name in table.column_names})
    put(log, whole.replace_schema_metadata(table.schema.metadata))
    assert (log.folder / PART).stat().st_size < 2**20
    with pytest.raises(RunFolderError, match=r"has 1,000,000 rows and \d+ columns; at most 262,144 rows"):
        log.read()


def test_texts_that_are_huge_when_written_out_are_not_read(log: DecisionLog) -> None:
    """A text of a megabyte for each of 100,000 modules: a hundred gigabytes, in a file of one."""
    table, count = table_of(log), 100_000
    columns = {name: pa.repeat(table[name][0], count) for name in table.column_names}
    columns["note"] = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), count), ["x" * 2**20])
    put(log, pa.table(columns).replace_schema_metadata(table.schema.metadata), store_schema=False)
    assert (log.folder / PART).stat().st_size < 2**22
    with pytest.raises(RunFolderError, match=r"The texts of .* would take 104,857,600,000 bytes"):
        log.read()


def test_a_problem_of_other_modules(log: DecisionLog) -> None:
    record, two = whole_record(0), slice(0, 2)
    cost = record.problem.cost
    problem = replace(
        record.problem,
        **{name: getattr(record.problem, name)[two] for name in ("ranks", "max_ranks", "blocks")},
        cost=replace(cost, per_rank=cost.per_rank[:, two], needs=cost.needs[:, two]),
    )
    (log.folder / PROBLEM).write_bytes(problem_bytes(problem))
    with pytest.raises(RunFolderError, match="is the problem of other modules"):
        log.problem(1)


def test_a_state_of_other_modules(log: DecisionLog) -> None:
    found = make_deliberation()
    cut = {name: getattr(found, name)[:2] for name in ("actor_estimate", "actor_scores")}
    state = DecisionState({}, replace(found, plans=found.plans[:, :2], **cut))
    for name, content in state.files(STATE).items():
        (log.folder / name).write_bytes(content)
    with pytest.raises(RunFolderError, match="its plans are for other modules"):
        log.logged(1)
