"""What happens before the first step: the cost of plans is measured, and the modules are probed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..allocation.bounds import Bounds, rank_bounds
from ..allocation.controller import RankController
from ..allocation.probe import ProbeResult, probe
from ..allocation.schedule import DecisionSchedule
from ..data.batches import Collate, largest_batch, rows_at, to_batch
from ..errors import DataError
from ..lora.adapters import PeftAdapters
from ..lora.optimizer_state import reset_state
from ..lora.resize import reset_adapters
from ..lora.targets import TargetModule, check_trains, other_trainable
from ..memory.budget import Budget
from ..memory.for_training import PlanCosts, plan_costs
from ..memory.model import MemoryModel


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run that a Trainer is about to begin.

    Attributes:
        model: the PEFT model, on its device.
        optimizer: as the Trainer made it.
        dataset: the training set.
        collate: makes a batch of its rows.
        rows: the rows of a batch.
        total_steps: the optimiser steps of the run.
        args: the arguments of the Trainer.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Any
    collate: Collate
    rows: int
    total_steps: int
    args: TrainingArguments

    @classmethod
    def of(cls, args: TrainingArguments, state: TrainerState, objects: dict[str, Any]) -> TrainingRun:
        """The run, from the arguments of a callback's event."""
        loader = objects["train_dataloader"]
        return cls(
            objects["model"],
            objects["optimizer"],
            loader.dataset,
            loader.collate_fn,
            state.train_batch_size,
            state.max_steps,
            args,
        )

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context in which the Trainer runs its forward passes."""
        if self.args.bf16 or self.args.fp16:
            return torch.autocast(self.args.device.type, torch.bfloat16 if self.args.bf16 else torch.float16)
        return nullcontext()


def run_costs(run: TrainingRun, targets: Sequence[TargetModule], budget: Budget, *, signals: bool) -> PlanCosts:
    """What plans cost on a run's largest batch, and the limit that a budget sets them.

    Args:
        run: the run.
        targets: the target modules of its model.
        budget: the limit as its user gave it.
        signals: whether plans pay for signal buffers.
    """
    accumulates = run.args.gradient_accumulation_steps > 1
    with undisturbed(), _training_mode(run.model), run.precision():
        batch = largest_batch(run.dataset, run.collate, run.rows, run.args.device)
        return plan_costs(budget, run.model, targets, batch, run.optimizer, signals=signals, accumulates=accumulates)


def prepare(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    budget: Budget,
    schedule: DecisionSchedule,
    bounds: Bounds,
    seed: int,
) -> tuple[RankController[PeftAdapters], MemoryModel | None]:
    """Measure what plans cost and probe the modules. Afterwards all adapters are new, at rank 1.

    Args:
        run: the run.
        targets: the target modules of its model.
        budget: the limit as its user gave it.
        schedule: when decisions fall, and how long the probe is.
        bounds: see `rank_bounds`.
        seed: of the probe and of fresh rows.

    Returns:
        The controller of the run, and the byte model (None under a budget of parameters).

    Raises:
        BudgetError: no plan fits the budget.
        UnknownNameError, ConfigError: see `rank_bounds`.
        NonFiniteError: the loss of the probe is NaN or infinite.
        DataError: the training set is empty, or the model returns no loss.
    """
    check_trains(targets)
    low, high = rank_bounds(targets, bounds)
    # The optimiser may have a state: `train` can be called again, and `auto_find_batch_size` does so.
    reset_state(run.optimizer, (w for target in targets for w in (target.weight_a, target.weight_b)))
    costs = run_costs(run, targets, budget, signals=True)
    with undisturbed(), _training_mode(run.model):
        result = run_probe(run, targets, schedule, seed)
    reset_adapters(targets, 1, seed)
    adapters = PeftAdapters(run.model, targets)
    controller = RankController(
        adapters, costs.cost, costs.limit.value, schedule, run.total_steps, result, low=low, high=high, seed=seed
    )
    return controller, costs.memory


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore torch's random state afterwards, so that the run draws the numbers that it would draw without us.

    A compiled model runs uncompiled meanwhile: each plan that is tried would take one of the few graphs that torch
    keeps.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def run_probe(run: TrainingRun, targets: Sequence[TargetModule], schedule: DecisionSchedule, seed: int) -> ProbeResult:
    """The probe on the data of the run, with a new optimiser. Weights outside the adapter are restored afterwards.

    Args:
        run: the run.
        targets: the target modules of its model.
        schedule: the steps of the probe, and their rows.
        seed: of the adapters at rank 1 and of the choice of rows.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        DataError: the model returns no loss.
    """
    others = other_trainable(run.model, targets)
    before = [parameter.detach().clone() for parameter in others]
    parameters = [*others, *(w for target in targets for w in (target.weight_a, target.weight_b))]
    reset_adapters(targets, 1, seed)
    optimizer = torch.optim.AdamW(parameters, lr=run.args.learning_rate, weight_decay=0.0)
    losses = (partial(_loss, run, rows) for rows in _probe_batches(run.dataset, schedule, seed))
    try:
        return probe(targets, optimizer, losses, seed=seed)
    finally:
        with torch.no_grad():
            for parameter, value in zip(others, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _loss(run: TrainingRun, rows: list[Any]) -> torch.Tensor:
    with run.precision():
        loss = run.model(**to_batch(run.collate(rows), run.args.device)).loss
    if loss is None:
        raise DataError("The model returned no loss: the training set needs labels.")
    return loss.mean()  # type: ignore[no-any-return]


def _probe_batches(dataset: Any, schedule: DecisionSchedule, seed: int) -> Iterator[list[Any]]:
    steps, rows = schedule.probe_steps, schedule.probe_batch
    if hasattr(dataset, "__len__"):
        order = np.random.default_rng(seed).permutation(len(dataset))
        picked = np.resize(order, (steps, rows))
        return (rows_at(dataset, indices.tolist()) for indices in picked)
    examples = list(islice(iter(dataset), steps * rows))
    return (examples[i % len(examples) :][:rows] for i in range(0, steps * rows, rows))
