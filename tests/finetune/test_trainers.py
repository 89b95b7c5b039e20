"""Each kind of Trainer under each kind of budget: it trains within the budget, or is refused before the first step."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from rankpilot.common.errors import BudgetError
from rankpilot.cost.record.calibration import LOOP_BYTES
from rankpilot.lora.targets import find_target_modules
from transformers import Trainer, TrainerCallback

from . import trainer_kinds
from .trainer_kinds import STEPS, TRAINER_KINDS, TRL_KINDS, TrainerKind

SCHEDULE = rankpilot.DecisionSchedule(probe_steps=2, fractions=(0.0, 0.5))


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

    @property
    def smallest(self) -> str | None:
        """The smallest budget that works, of the error that refused the run."""
        match = re.search(r"The smallest that works is '?([\d.]+ \w+(?: step)?)", self.refused)
        return match and match.group(1)

    @property
    def errors(self) -> list[float]:
        """The measured peak and the loop's room over the predicted peak, less 1, of each check."""
        return [(measured + LOOP_BYTES) / predicted - 1 for _, predicted, measured in self.checks]


Runs = tuple[TrainerKind, list[Run]]
"""A kind of Trainer and its runs."""


def run_under(trainer: Trainer, budget: str) -> Run:
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


SHORT = {"sft-messages", "dpo", "token-classification"}
"""Kinds that stand for the others, which are left to `make test-long`; their models have one layer in place of two."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=() if kind.name in SHORT else pytest.mark.long, id=kind.name)
        for kind in (*TRL_KINDS, *TRAINER_KINDS)
    ],
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One kind of Trainer under each budget; where one is refused, also under the smallest that the error names."""
    kind: TrainerKind = request.param
    folder = tmp_path_factory.mktemp(kind.name)
    results: list[Run] = []

    def add(budget: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if kind.name in SHORT:
                patch.setattr(trainer_kinds, "sizes", partial(trainer_kinds.sizes, num_hidden_layers=1))
            trainer = kind.build(folder / str(len(results)))
        results.append(run_under(trainer, budget))

    add("100%")
    # A share between the others is another number of bytes, as the one below is.
    shares = ("40%",) if kind.name in SHORT else ("70%", "40%")
    for budget in (*shares, "auto", f"{0.85 * results[0].limit:.0f} bytes step", "3k params"):
        add(budget)
        smallest = results[-1].smallest
        if smallest and smallest not in [one.budget for one in results]:
            add(smallest)
    return kind, results


def test_it_trains_or_is_refused_before_the_first_step(runs: Runs) -> None:
    trained = {one.budget for one in runs[1] if not one.refused}
    assert {"100%", "auto", "3k params"} <= trained
    for one in runs[1]:
        if one.refused:
            assert one.steps == 0
            assert one.smallest in trained, one.refused
        else:
            assert one.steps == STEPS
            assert one.changed > 0, one.budget


def of_bytes(runs: Runs) -> list[Run]:
    """Those under a budget of bytes that trained."""
    return [one for one in runs[1] if not one.refused and "params" not in one.budget]


def test_the_budget_holds(runs: Runs) -> None:
    for one in of_bytes(runs):
        assert len(one.peaks) == STEPS
        breaches = [step for step, peak in one.peaks if peak > one.limit]
        assert set(breaches) <= set(one.decided), f"{one.budget}: each breach is a correction in the log"
        assert len(breaches) <= 1, one.budget


def test_predicted_peaks_are_right(runs: Runs) -> None:
    errors = [abs(error) for one in of_bytes(runs) for error in one.errors]
    assert len(errors) >= 2 * len(of_bytes(runs))
    assert np.median(errors) <= runs[0].typical_error
    assert max(errors) <= runs[0].largest_error
