"""All methods by name, and how each piece of work is done: trainings, plans, searches, and timed and measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rankpilot.cost.budget import Budget
from rankpilot.cost.cost import cost_state
from rankpilot.cost.peak_meter import PeakMeter
from rankpilot.cost.recording import Batch
from rankpilot.errors import BudgetError, NonFiniteError, UnknownNameError
from rankpilot.finetune.before_training import run_costs
from rankpilot.finetune.left_as_found import recomputing
from rankpilot.lora.targets import find_target_modules
from rankpilot.plan.plan import least_cost
from torch import nn

from ..harness import interleave, paired_ratios
from . import adalora, policies
from .plans import PLANS, WINDOWS, plain_lora, rslora
from .policies import PilotDriver, make_plan
from .rows import Work, plan_ranks
from .search import Tpe, search
from .starts import Eva, EvaDriver, Gora, GoraDriver, Miss, miss
from .study import Method
from .tasks import MethodTask
from .texts import load_data
from .training import CLIP, Driver, adapted_model, by_name, evaluate, new_loader, train, training_run

_ALL: tuple[Method, ...] = (*PLANS, *WINDOWS, *adalora.METHODS, Eva(), Gora(), Tpe(), Miss(), *policies.METHODS)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""All methods by name, in the order of tables."""

Trainer = Callable[[Work], Driver]
"""Makes the driver of a training, from its work."""


TRAINERS: dict[str, Trainer] = {
    "lora": plain_lora,
    "rslora": rslora,
    "pilot": PilotDriver,
    "adalora": adalora.AdaLoraDriver,
    "eva": EvaDriver,
    "gora": GoraDriver,
    "miss": miss,
}
"""How a run is trained, by the name in its work."""


def find_method(name: str) -> Method:
    """The method of that name; UnknownNameError if there is none."""
    if name not in METHODS:
        raise UnknownNameError.of("method", name, METHODS)
    return METHODS[name]


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
    return _beside_reference(work.task, TRAINERS[work.get("trainer")](work))


def time_recomputed(work: Work) -> dict[str, Any]:
    """A step of plain LoRA with as few layers checkpointed as the argument `plan` needs under `budget`.

    Raises:
        BudgetError: it does not fit with all layers checkpointed.
    """
    task, plan = work.task, plan_ranks(work.get("plan"))
    model = adapted_model(task, 0)
    targets = find_target_modules(model)
    names = [target.name for target in targets]
    with recomputing(model, True) as recomputation:
        assert recomputation is not None, "it was asked for"
        run = training_run(task, model, task.rate, 0)
        least = partial(least_cost, targets, None, None)
        costs = run_costs(run, targets, Budget.parse(work.get("budget")), signals=False, least=least)
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


def _costs(work: Work) -> dict[str, Any]:
    """The modules of a task, and what plans of plain LoRA cost in bytes."""
    model = adapted_model(work.task, 0)
    targets = find_target_modules(model)
    run = training_run(work.task, model, work.task.rate, 0)
    costs = run_costs(run, targets, Budget.parse("100%"), signals=False)
    state = {
        name: value.tolist() if hasattr(value, "tolist") else value for name, value in cost_state(costs.cost).items()
    }
    modules = [[target.name, target.block, target.d_in, target.d_out] for target in targets]
    return {"modules": modules, "cost": state, "reference": costs.limit.value}


def _train(work: Work) -> dict[str, Any]:
    """Train by a method."""
    driver = TRAINERS[work.get("trainer")](work)
    try:
        return train(work.task, driver, work.get("rate"), work.get("seed"), tuning=bool(work.get("tuning")))
    except NonFiniteError:
        data = load_data(work.task)
        untrained = evaluate(adapted_model(work.task, work.get("seed")), data.held_out, data, work.task)["loss"]
        return {"loss": None, "accuracy": None, "untrained_loss": untrained}


def perform(work: Work) -> dict[str, Any]:
    """Do a piece of work; returns its row as JSON values, with the CPU seconds that it took.

    Where a budget allows nothing, the row holds the reason as `refused`.
    """
    _quiet()
    start = time.process_time()
    try:
        row = KINDS_OF_WORK[work.kind](work)
    except BudgetError as error:
        row = {"refused": str(error)}
    return {**row, "cpu_s": round(time.process_time() - start, 3)}


def _quiet() -> None:
    """No progress bars of libraries, and no reports on heads that are new; in each worker."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


KINDS_OF_WORK: dict[str, Callable[[Work], dict[str, Any]]] = {
    "costs": _costs,
    "train": _train,
    "plan": make_plan,
    "search": lambda work: search(work, perform),
    "step": time_step,
    "recompute": time_recomputed,
}
"""What is done, by the kind of work."""
