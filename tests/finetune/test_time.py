"""Runs under a limit of time. Times are counted from rates, so that nothing is measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
from rankpilot.common.errors import BudgetError
from rankpilot.cost.budget import Budget
from rankpilot.cost.record.calibration import resident_bytes
from rankpilot.cost.record.measured_time import count_work
from rankpilot.cost.step_time import Rates
from rankpilot.finetune import before_training as time_before_training
from rankpilot.finetune.options import FinetuneConfig
from transformers import Trainer

from ..cases import first_cases
from .test_checkpointed_layers import LAYERS, SAVED, SCHEDULE, STEPS, checkpointed, trainer_of
from .tiny_runs import PLAIN

RATES = Rates(1e9, 1e9)
SHORT = {"max_steps": 2}
"""For runs of which the plans are looked at: there is a decision before each step."""

SLOWER = 1.0
"""Plans take so many times what is predicted."""


def counted_times(patch: pytest.MonkeyPatch) -> list[int]:
    """Count times from rates; returns where the rows of each batch that would have been timed will stand."""
    seen: list[int] = []

    def counted(step: Any, targets: Any, batch: Any, take: Any = None) -> Any:
        seen.append(len(batch["input_ids"]))
        return count_work(step.model, targets, step.loss, batch).time(RATES)

    def share(step: Any, targets: Any, batch: Any, plan: Any, reference: Any, take: Any) -> float:
        time = count_work(step.model, targets, step.loss, batch).time(RATES)
        planned, plain = (time.seconds(ranks, layers if take else None) for ranks, layers in (plan, reference))
        return SLOWER * planned / plain

    patch.setattr(time_before_training, "measure_step_time", counted)
    patch.setattr(time_before_training, "measured_share", share)
    return seen


@pytest.fixture(autouse=True)
def rows_timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that would have been timed."""
    return counted_times(monkeypatch)


def attached(folder: Path, budget: str | int, time: str | None, **options: Any) -> tuple[Trainer, Any]:
    arguments, options = options.pop("arguments", {}), {"exact_savers": False, "parts": "off"} | options
    trainer = trainer_of(folder, **arguments)
    callback = rankpilot.attach(
        trainer, "signal-mean", budget=budget, time=time, measure_every=1, schedule=SCHEDULE, **options
    )
    return trainer, callback


@dataclass
class Run:
    """A run that has ended, and the rows of each batch that would have been timed."""

    folder: Path
    callback: Any
    rows_timed: list[int]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """The run in a share of the time, in percent; tests that go on from it take a copy of its folder."""

    @cache
    def run(share: int) -> Run:
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            rows = counted_times(patch)
            trainer, callback = attached(folder, "400%", f"{share}%", arguments=SAVED)
            trainer.train()
        return Run(folder, callback, rows)

    return run


@pytest.mark.parametrize("share", first_cases(1, [60, 90, 75]))
def test_a_run_keeps_its_time(ended: Callable[[int], Run], share: int) -> None:
    run = ended(share)
    callback, applier = run.callback, run.callback.applier
    whole = applier.time.time.seconds(applier.reference, ())
    taken = applier.time.of(applier.ranks) / whole
    assert 0.97 * share / 100 < taken <= share / 100
    assert run.rows_timed == [4], "the largest batch, since it fits"
    figures = callback.pilot.figures()
    assert figures["plan_seconds"] <= figures["budget_seconds"] == pytest.approx(share / 100 * whole)
    assert callback.predictions[-1][1] <= callback.limit
    assert len(callback.peaks) == STEPS
    for _, predicted, peak in callback.pilot.checks:
        assert peak == pytest.approx(predicted, rel=0.02), "bytes are predicted as bytes, whatever limits the plan"


def test_a_plan_that_takes_longer_is_made_anew(
    tmp_path: Path, ended: Callable[[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ended(60).callback
    monkeypatch.setitem(globals(), "SLOWER", 1.15)
    slower, other = attached(tmp_path, "400%", "60%", arguments=SHORT)
    slower.train()
    limit, before = other.applier.time, callback.applier.time
    assert limit.seconds == before.seconds
    assert limit.fits(other.applier.ranks)
    assert 1.15 * before.of(other.applier.ranks) == pytest.approx(limit.of(other.applier.ranks), rel=0.02)
    assert 1.15 * before.of(callback.applier.ranks) > before.seconds, "the plan of the prediction was too slow"


def test_a_plan_says_what_time_it_takes(tmp_path: Path) -> None:
    told: list[str] = []
    trainer, callback = attached(tmp_path, "100%", "75%", arguments=SHORT, keep_rate=True)
    callback._tell = told.append
    callback.pilot.journal.tell = told.append
    trainer.train()
    before = told.index(next(line for line in told if line.startswith("The budget is ")))
    assert before > 1, "what takes a while before it is told"
    assert all(line.endswith(" ...") for line in told[:before])
    after = told[before + 1 :]
    assert all(" of " in line and line.endswith(" s") and "a step takes" in line for line in after)
    assert len(after) == 2


def test_fewer_rows_are_timed_where_the_bytes_hold_no_more(tmp_path: Path, rows_timed: list[int]) -> None:
    trainer, callback = attached(tmp_path, "60%", "90%", arguments=SHORT, **PLAIN)
    trainer.train()
    assert 0 < rows_timed[0] < 4
    time = callback.applier.time.time
    run = callback.pilot._piloted.run
    whole = count_work(trainer.model, callback.applier.targets, run.step.loss, run.largest_batch()).time(RATES)
    ranks = np.full(len(callback.applier.targets), 8)
    assert time.seconds(ranks) == pytest.approx(whole.seconds(ranks), rel=0.25), "in proportion to tokens"


def test_a_step_has_all_its_batches(tmp_path: Path, ended: Callable[[int], Run]) -> None:
    trainer, callback = attached(tmp_path, "400%", "60%", arguments={**SHORT, "gradient_accumulation_steps": 2})
    trainer.train()
    assert callback.applier.time.seconds == pytest.approx(2 * ended(60).callback.applier.time.seconds)


@pytest.mark.long
@pytest.mark.parametrize(
    ("budget", "time"),
    first_cases(1, [("60%", "80%"), ("55%", "115%"), ("50%", "65%")]),
)
def test_checkpointing_keeps_bytes_and_time(tmp_path: Path, budget: str, time: str) -> None:
    trainer, callback = attached(tmp_path, budget, time, gradient_checkpointing="auto")
    trainer.train()
    applier = callback.applier
    names = callback.pilot._piloted.guard.plan.checkpointed
    assert applier.time.time.seconds(applier.ranks, names) <= applier.time.seconds
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    assert sum(checkpointed(trainer)) == len(names)
    unlimited, other = attached(tmp_path / "unlimited", budget, None, gradient_checkpointing="auto", arguments=SHORT)
    unlimited.train()
    assert len(names) <= len(other.pilot._piloted.guard.plan.checkpointed) <= LAYERS


def test_a_time_that_fits_nothing(tmp_path: Path) -> None:
    trainer, _ = attached(tmp_path, "100%", "10%")
    with pytest.raises(
        BudgetError, match=r"time of .* s per step is too small for any adapter. The smallest that works is"
    ):
        trainer.train()


def test_a_resumed_run_keeps_its_time(tmp_path: Path, ended: Callable[[int], Run], rows_timed: list[int]) -> None:
    callback = ended(60).callback
    shutil.copytree(ended(60).folder, tmp_path / "run")
    resumed, again = attached(tmp_path / "run", "400%", "60%")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert rows_timed == [], "nothing is measured again"
    assert again.applier.ranks.tolist() == callback.applier.ranks.tolist()
    assert again.applier.time.seconds == callback.applier.time.seconds


@pytest.mark.long
def test_a_resumed_run_may_have_another_time(tmp_path: Path, rows_timed: list[int]) -> None:
    trainer, callback = attached(tmp_path, "400%", None, arguments=SAVED)
    trainer.train()
    told: list[str] = []
    for time, measured in (("90%", 1), ("60%", 2)):
        resumed, again = attached(tmp_path, "400%", time, arguments=SAVED)
        again.pilot.journal.tell = told.append
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        applier = again.applier
        assert applier.time.fits(applier.ranks)
        assert len(rows_timed) == measured
        assert f"step 1: the time is {time} now, and was none" in told
    assert applier.ranks.sum() < callback.applier.ranks.sum()
    back, without = attached(tmp_path, "400%", None)
    back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert without.applier.time is None


def test_a_budget_of_parameters_and_a_time(tmp_path: Path) -> None:
    trainer, callback = attached(tmp_path, "10k params", "70%", arguments=SHORT)
    trainer.train()
    applier = callback.applier
    assert applier.time.fits(applier.ranks)
    assert callback.predictions[-1][1] == sum(t.rank * (t.d_in + t.d_out) for t in applier.targets) <= 10_000


@pytest.mark.long
def test_a_total_holds_the_frozen_model(tmp_path: Path, ended: Callable[[int], Run]) -> None:
    reference = ended(60).callback
    resident, whole = resident_bytes(reference.applier.adapters.model), reference.limit / 4
    total = int(resident + 0.8 * whole)
    trainer, callback = attached(tmp_path, f"{total} bytes", None, arguments=SAVED)
    trainer.train()
    assert callback.limit == pytest.approx(0.8 * whole, abs=1)
    assert len(callback.peaks) == STEPS
    assert resident + max(peak for _, peak in callback.peaks) <= total
    resumed, again = attached(tmp_path, f"{total + 1000} bytes", None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.limit == callback.limit + 1000


def test_a_total_below_the_frozen_model(tmp_path: Path) -> None:
    trainer, _ = attached(tmp_path, "20KiB", None)
    with pytest.raises(BudgetError, match=r"20 KiB is less than the frozen model .* take, [0-9.]+ KiB"):
        trainer.train()


def test_totals_and_times_are_read_at_once() -> None:
    budget = Budget.parse("24GiB")
    assert (budget.kind, budget.value, budget.unit) == ("total", 24 * 2**30, "bytes")
    assert Budget.parse(str(budget)) == budget
    for wrong in ("24 step", "80% step", "300k params step", "step", "24GiB total"):
        with pytest.raises(BudgetError, match="'6GiB step'"):
            Budget.parse(wrong)
    with pytest.raises(BudgetError, match="The time '3' has no unit"):
        FinetuneConfig("model", "data", time="3")


def test_without_a_limit_plain_lora_runs_the_same_layers_again(tmp_path: Path) -> None:
    """Under a goal of time, plans of a checkpointed model are told beside plain LoRA that is checkpointed as well."""
    trainer = trainer_of(tmp_path, gradient_checkpointing=True, **SHORT)
    callback = rankpilot.attach(trainer, "default", budget="400%", schedule=SCHEDULE, goal="time", exact_savers=False)
    trainer.train()
    time, most = callback.applier.time, np.array([target.max_rank for target in callback.applier.targets])
    assert time.beside == pytest.approx(time.of(np.minimum(8, most)))
    assert time.beside > 1.1 * time.time.seconds(callback.applier.reference, ())
