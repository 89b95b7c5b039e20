"""Each kind of Trainer under each kind of budget: it trains within the budget, or is refused before the first step."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from rankpilot.errors import BudgetError
from rankpilot.lora.targets import find_target_modules
from transformers import Trainer, TrainerCallback

from .trainer_kinds import TRAINER_KINDS, TRL_KINDS, TrainerKind

SCHEDULE = rankpilot.DecisionSchedule(probe_steps=2, fractions=(0.0, 0.34))


class Weights(TrainerCallback):
    """What the adapters add to each module's weights when training begins; it is kept out of the measured steps."""

    before: dict[str, torch.Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.before = products(objects["model"])


def products(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {t.name: t.weight_b.detach() @ t.weight_a.detach() for t in find_target_modules(model)}


@dataclass
class Run:
    """What a run did, or why it was refused."""

    budget: str
    limit: float = 0.0
    refused: str = ""
    steps: int = 0
    changed: int = 0
    peaks: list[tuple[int, int]] = field(default_factory=list)
    checks: list[tuple[int, float, int]] = field(default_factory=list)
    decided: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        errors = " ".join(f"{100 * (measured / predicted - 1):+.2f}%" for _, predicted, measured in self.checks)
        return f"{self.budget:>14}: " + (f"refused: {self.refused[:90]}" if self.refused else errors)


def run(trainer: Trainer, budget: str) -> Run:
    pilot = rankpilot.attach(trainer, "signal-mean", budget=budget, measure_every=1, schedule=SCHEDULE)
    weights = Weights()
    trainer.add_callback(weights)
    try:
        trainer.train()
    except BudgetError as error:
        return Run(budget, refused=str(error), steps=trainer.state.global_step)
    after = products(trainer.model)
    changed = sum(bool((after[name] - weights.before[name]).norm() > 1e-4) for name in after)
    at = [step for step, _ in pilot.predictions]
    return Run(budget, pilot.limit, "", trainer.state.global_step, changed, pilot.peaks, pilot.pilot.checks, at)


@pytest.fixture(scope="module", params=[*TRL_KINDS, *TRAINER_KINDS], ids=lambda kind: kind.name)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """One kind of Trainer under each budget; where one is refused, also under the smallest that the error names."""
    kind: TrainerKind = request.param
    folder = tmp_path_factory.mktemp(kind.name)
    results: list[Run] = []

    def add(budget: str) -> None:
        results.append(run(kind.build(folder / str(len(results))), budget))

    add("100%")
    for budget in ("70%", "40%", "auto", f"{0.85 * results[0].limit:.0f} bytes", "3k params"):
        add(budget)
        refused = re.search(r"The smallest that works is ([\d.,]+ \w+)", results[-1].refused)
        if refused:
            add(refused.group(1))
    print(f"\n{kind.name}", *results, sep="\n")
    return results


def test_it_trains_or_is_refused_before_the_first_step(runs: list[Run]) -> None:
    for index, one in enumerate(runs):
        if one.refused:
            assert one.steps == 0
            assert "The smallest that works is" in one.refused
            assert not runs[index + 1].refused
        else:
            assert one.changed > 0, one.budget


def test_the_budget_holds(runs: list[Run]) -> None:
    for one in runs:
        if not one.refused and "params" not in one.budget:
            breaches = [step for step, peak in one.peaks if peak > one.limit]
            assert set(breaches) <= set(one.decided), one.budget
            assert len(breaches) <= 1, one.budget


def test_predicted_peaks_are_right(runs: list[Run]) -> None:
    errors = [abs(measured / predicted - 1) for one in runs for _, predicted, measured in one.checks]
    assert len(errors) >= 6
    assert np.median(errors) <= 0.005
    assert max(errors) <= 0.03
