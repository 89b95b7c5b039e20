"""Plan runs of real fine-tunes: one small fine-tune from end to end, resumed, packed and read again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rankpilot.errors import RunFolderError
from rankpilot.training.plan_runs import RUNS, RealPlanRun, read_real_plan_runs
from rich.console import Console

from benchmarks import plan_runs
from benchmarks.methods.tasks import SUITES, MethodTask
from benchmarks.plan_runs import Options, benchmark, write_real_plan_runs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.assets,
]


@pytest.fixture(autouse=True, scope="module")
def _short_fine_tune() -> Iterator[None]:
    """The small fine-tune with fewer steps and held-out rows."""
    tasks = plan_runs.tasks

    def short(quick: bool) -> list[MethodTask]:
        return [replace(task, steps=4, held_out=8) for task in tasks(quick)] if quick else tasks(quick)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_runs, "tasks", short)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RealPlanRun]]:
    folder = tmp_path_factory.mktemp("plan-runs")
    figures = benchmark(Options(folder, seeds=1, workers=1, pack=folder / "packed.safetensors", quick=True), Console())
    assert (figures["fine_tunes"], figures["complete"]) == (1, True)
    return folder, read_real_plan_runs(folder / "packed.safetensors")


def test_plans_of_one_fine_tune(made: tuple[Path, list[RealPlanRun]]) -> None:
    (run,) = made[1]
    assert run.family == "llama-4x32 / german"
    assert run.ranks.shape == (RUNS, len(run.names)) == (RUNS, 28)
    assert (run.ranks[0] == 8).all(), "plain LoRA is the first"
    assert len(np.unique(run.ranks, axis=0)) > RUNS // 2
    assert np.isfinite(run.losses).all()
    assert run.losses.min() < run.losses.max() < run.initial, "all have learned, and not alike"


def test_an_interrupted_run_goes_on(
    made: tuple[Path, list[RealPlanRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_new(*_: object) -> None:
        raise AssertionError("all rows are there")

    monkeypatch.setattr(plan_runs, "perform_any", nothing_new)
    packed = made[0] / "packed.safetensors"
    for options in (
        Options(made[0], seeds=1, workers=1, quick=True),
        Options(tmp_path, seeds=1, pack=packed, quick=True),
    ):
        figures = benchmark(options, Console())
        assert (figures["complete"], figures["cpu_h"]) == (True, 0.0)
    assert len(read_real_plan_runs(packed)) == 1


def test_files_come_back_as_they_were(made: tuple[Path, list[RealPlanRun]], tmp_path: Path) -> None:
    write_real_plan_runs(made[1], tmp_path / "again")
    (again,), (run,) = read_real_plan_runs(tmp_path / "again"), made[1]
    assert (again.task, again.names, again.initial) == (run.task, run.names, run.initial)
    for name in ("modules", "run", "ranks", "losses", "train_losses", "choices"):
        np.testing.assert_array_equal(getattr(again, name), getattr(run, name))


@pytest.mark.parametrize("content", [b"", b"not safetensors" * 9])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_real_plan_runs(path)
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_real_plan_runs(tmp_path / "nowhere")


def test_no_data_of_the_test_cells() -> None:
    judged = {cell.task.data for name in ("quick", "standard", "full") for cell in SUITES[name].cells}
    learned = {task.data for task in plan_runs.tasks(quick=False)}
    assert len(learned) >= 8
    assert not learned & judged
