"""Pieces of work of the methods benchmark: each is defined by its fields alone, and leads to one stored row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel

from ...common.arrays import IntArray
from ...data.task import KINDS
from ...errors import BudgetError, NonFiniteError
from ...finetune.before_training import run_costs
from ...finetune.run import TrainingRun
from ...lora.fresh import fresh_adapters
from ...lora.ladder import REFERENCE_RANK
from ...lora.targets import find_target_modules
from ...memory.budget import Budget
from ...memory.cost import cost_state
from .bases import new_base
from .loop import Driver, evaluate, new_loader, train
from .tasks import MethodTask
from .texts import load_data

ALPHA = 16
"""`lora_alpha` of every module, as PEFT has it by default when ranks differ: the scaling is alpha / rank."""

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        kind: a name of `KINDS_OF_WORK`.
        task: what it is about.
        arguments: what else defines it, as (name, value) in the order of names.
    """

    kind: str
    task: MethodTask
    arguments: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, kind: str, task: MethodTask, **arguments: Value) -> Work:
        """A piece of work; arguments that are None are left out."""
        return cls(kind, task, tuple(sorted((name, value) for name, value in arguments.items() if value is not None)))

    def get(self, name: str) -> Any:
        """An argument; None if there is none of that name."""
        return dict(self.arguments).get(name)

    @property
    def key(self) -> list[Any]:
        """What names the row."""
        return [self.kind, self.task.key, dict(self.arguments)]

    def __str__(self) -> str:
        return f"{self.kind} {self.task.key} {dict(self.arguments)}"


Trainer = Callable[[Work], Driver]
"""Makes the driver of a training, from its work."""


def adapted_model(task: MethodTask, seed: int, ranks: dict[str, int] | None = None, **options: Any) -> PeftModel:
    """The task's model with fresh LoRA adapters, in training mode.

    Args:
        task: decides the model.
        seed: of adapters and head.
        ranks: of the adapted modules, by name; None for the reference rank on all linear ones.
        options: further ones of LoraConfig.
    """
    kind, labels = KINDS[task.kind], load_data(task).labels
    base = new_base(task, labels, seed)
    plan: dict[str, Any] = {"target_modules": "all-linear", "r": REFERENCE_RANK, "lora_alpha": ALPHA}
    if ranks is not None:
        first = next(iter(ranks.values()))
        plan |= {"target_modules": ",".join(ranks), "r": first}
        plan["rank_pattern"] = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != first}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fresh_adapters(base, task.model, kind.peft_type, new_head=kind.has_head, **plan | options).train()


def training_run(task: MethodTask, model: PeftModel, rate: float, seed: int) -> TrainingRun:
    """A run that is about to begin, as a plain loop gives it to rankpilot."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    loader = new_loader(task, load_data(task), seed)
    return TrainingRun.of_loader(model, optimizer, loader, total_steps=task.steps)


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
    from .registry import TRAINERS

    driver = TRAINERS[work.get("trainer")](work)
    try:
        return train(work.task, driver, work.get("rate"), work.get("seed"), tuning=bool(work.get("tuning")))
    except NonFiniteError:
        data = load_data(work.task)
        untrained = evaluate(adapted_model(work.task, work.get("seed")), data.held_out, data, work.task)["loss"]
        return {"loss": None, "accuracy": None, "untrained_loss": untrained}


KINDS_OF_WORK: dict[str, Callable[[Work], dict[str, Any]]] = {"costs": _costs, "train": _train}
"""What is done, by the kind of work; `registry` adds the methods' own."""


def perform(work: Work) -> dict[str, Any]:
    """Do a piece of work; returns its row as JSON values, with the CPU seconds that it took.

    Where a budget allows nothing, the row holds the reason as `refused`.
    """
    from . import registry

    _quiet()
    start = time.process_time()
    try:
        row = {**KINDS_OF_WORK, **registry.OWN_WORK}[work.kind](work)
    except BudgetError as error:
        row = {"refused": str(error)}
    return {**row, "cpu_s": round(time.process_time() - start, 3)}


def _quiet() -> None:
    """No progress bars of libraries, and no reports on heads that are new; in each worker."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def by_name(ranks: IntArray, names: list[str]) -> dict[str, int]:
    """The adapted modules of a plan with their ranks."""
    return {name: int(rank) for name, rank in zip(names, ranks, strict=True) if rank > 0}
