"""Budgets for everything on the device, the frozen model included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rankpilot
from rankpilot.common.errors import BudgetError
from rankpilot.cost.budget import Budget
from rankpilot.cost.record.calibration import resident_bytes
from transformers import Trainer

from .test_checkpointed_layers import SAVED, SCHEDULE, STEPS, trainer_of


def attached(folder: Path, budget: str) -> tuple[Trainer, Any]:
    trainer, plain = trainer_of(folder, **SAVED), {"exact_savers": False, "parts": "off"}
    return trainer, rankpilot.attach(trainer, "signal-mean", budget=budget, measure_every=1, schedule=SCHEDULE, **plain)


def test_a_total_holds_the_frozen_model(tmp_path: Path) -> None:
    first, reference = attached(tmp_path / "whole", "100%")
    first.train()
    resident, whole = resident_bytes(reference.applier.adapters.model), reference.limit
    total = int(resident + 0.8 * whole)
    trainer, callback = attached(tmp_path, f"{total} bytes")
    trainer.train()
    assert callback.limit == pytest.approx(0.8 * whole, abs=1)
    assert len(callback.peaks) == STEPS
    assert resident + max(peak for _, peak in callback.peaks) <= total
    resumed, again = attached(tmp_path, f"{total + 1000} bytes")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.limit == callback.limit + 1000


def test_a_total_below_the_frozen_model(tmp_path: Path) -> None:
    trainer, _ = attached(tmp_path, "20KiB")
    with pytest.raises(BudgetError, match=r"20 KiB is less than the frozen model .* take, [0-9.]+ KiB"):
        trainer.train()


def test_totals_are_read_at_once() -> None:
    budget = Budget.parse("24GiB")
    assert (budget.kind, budget.value, budget.unit) == ("total", 24 * 2**30, "bytes")
    assert Budget.parse(str(budget)) == budget
    for wrong in ("24 step", "80% step", "300k params step", "step", "24GiB total"):
        with pytest.raises(BudgetError, match="'6GiB step'"):
            Budget.parse(wrong)
