"""What one training step of a method takes: its peak measured, and its time beside a step of all-linear rank 8."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import BudgetError
from ...finetune.before_training import run_costs
from ...finetune.recomputation import recomputing
from ...lora.targets import find_target_modules
from ...memory.budget import Budget
from ...memory.peak_meter import PeakMeter
from ...memory.recording import Batch
from ..harness import interleave, paired_ratios
from .loop import CLIP, Driver, new_loader
from .ranks import plan_ranks
from .tasks import MethodTask
from .texts import load_data
from .work import Work, adapted_model, by_name, training_run

ROUNDS = 8
"""Timed steps, in turns with the reference."""


class _Steps:
    """Steps of a driver that can be timed and measured."""

    def __init__(self, task: MethodTask, driver: Driver) -> None:
        self.driver, self.count = driver, 0
        self.optimizer = torch.optim.AdamW(driver.parameters(), lr=task.rate / 100, weight_decay=0.0)
        # A hook, so that the meter of a step counts it.
        self.optimizer.register_step_post_hook(lambda *_: driver.stepped(self.count))
        loader = new_loader(task, load_data(task), 0)
        batches = list(islice(loader, ROUNDS))
        self.largest = max(batches, key=lambda batch: batch["input_ids"].numel())
        self._batches = cycle(batches)

    def step(self, _: int = 0) -> None:
        """One step on the next batch."""
        self._on(next(self._batches))

    def _on(self, batch: Batch) -> None:
        self.count += 1
        self.driver.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(self.driver.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measured(self) -> int:
        """Bytes at the peak of the second step, on the largest of the batches: all states and buffers are there."""
        self.step()
        meter = PeakMeter()
        meter.begin(self.driver.model, self.optimizer, self.driver.buffer_bytes())
        self._on(self.largest)
        return meter.end(self.count) or 0


def _beside_reference(task: MethodTask, driver: Driver) -> dict[str, Any]:
    """Peak of a step in bytes; time of a step, and that over the time of the reference's."""
    model = adapted_model(task, 0)
    ranks = np.array([target.rank for target in find_target_modules(model)])
    sides = {"method": _Steps(task, driver), "reference": _Steps(task, Driver(model, ranks))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        measured = {name: side.measured() for name, side in sides.items()}
        work: dict[str, Callable[[int], object]] = {name: side.step for name, side in sides.items()}
        seconds = interleave(work, ROUNDS, torch.device("cpu"), clock=time.process_time)
    ratio = float(np.median(paired_ratios(seconds["method"], seconds["reference"], 1)))
    return {
        "measured": measured["method"],
        "measured_reference": measured["reference"],
        "step_ratio": round(ratio, 4),
        "reference_s": round(float(np.median(seconds["reference"])), 5),
    }


def time_step(work: Work) -> dict[str, Any]:
    """A step of the training that has these arguments."""
    from .registry import TRAINERS

    return _beside_reference(work.task, TRAINERS[work.get("trainer")](work))


def time_recomputed(work: Work) -> dict[str, Any]:
    """A step of plain LoRA with as few layers checkpointed as the argument `plan` needs under `budget`.

    Raises:
        BudgetError: it does not fit with all layers checkpointed.
    """
    task, plan = work.task, plan_ranks(work.get("plan"))
    model = adapted_model(task, 0)
    names = [target.name for target in find_target_modules(model)]
    with recomputing(model, True) as recomputation:
        assert recomputation is not None, "it was asked for"
        run = training_run(task, model, task.rate, 0)
        costs = run_costs(
            run, find_target_modules(model), Budget.parse(work.get("budget")), signals=False, recompute=True
        )
        recomputation.memory = costs.memory
        layers = recomputation.fewest(plan, costs.limit.value)
        recomputation.take(layers)
        predicted = recomputation.memory_now().peak(plan)
        recomputation.put_back()
    if predicted > costs.limit.value:
        raise BudgetError(f"Rank {plan.max()} takes {predicted:.0f} bytes with all layers checkpointed.")
    chosen = adapted_model(task, 0, by_name(plan, names))
    with recomputing(chosen, True) as again:
        assert again is not None, "it was asked for"
        again.take(layers)
        row = _beside_reference(task, Driver(chosen, plan))
        again.put_back()
    return {**row, "predicted": float(predicted), "limit": costs.limit.value, "layers": len(layers)}
