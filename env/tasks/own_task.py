"""Your own fine-tune as a task: any model, data set and collator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import default_data_collator

from ...data.batches import count_predictions, predicted_share
from ...errors import ConfigError, UnsupportedError
from ...lora.targets import TargetModule, find_target_modules
from ...memory.budget import Budget
from ...memory.calibration import calibrate
from ...memory.cost import ParameterCost, UntimedCost
from ...memory.step_config import check_seed
from ..proxies.adapted import ALPHA
from .finetune import Reference

Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]
_ADAPTED = "_rankpilot_own_task"
"""Where a plain model keeps the modules that have adapters, and the PeftModel around it: its tasks share both."""

START_RANK = 8
"""Rank of adapters that are put into a plain model, before ranks are decided."""


@dataclass(frozen=True, eq=False)
class OwnTask:
    """A fine-tune of any model, for `RankAllocationEnv(task=OwnTask(...))`.

    The model computes its own loss, as under transformers' Trainer. All episodes train the same adapters, one after
    another; the model's own weights stay as they are. Modules that train beside the adapter (`modules_to_save`) are
    left frozen.

    Attributes:
        model: a PEFT model with a LoRA adapter, or a plain model, which gets adapters on its linear layers.
        train: rows to train on, at least one batch.
        held_out: rows of the held-out set.
        steps: optimiser steps of an episode.
        batch_size: rows a step.
        learning_rate: peak of a linear decay.
        budget: of a training step: "6GiB", "350MB", "80%" of what uniform rank 8 takes, or "300k params".
        collate: makes a batch of rows, "labels" included; transformers' default.
        target_modules: of a plain model, as in `peft.LoraConfig`.
        seed: of batches and adapters.
        name: what logs call it.
        reference: what uniform achieves; measured when it is needed if it is None.

    Raises:
        ConfigError: a value out of range, or data shorter than a batch.
        BudgetError: the budget is unreadable.
        UnsupportedError: the model has no target module whose rank can change; later, if it returns no loss.

    Example:
        >>> env = gym.make(rankpilot.ENV_ID, task=OwnTask(model, train, held_out, steps=100))  # doctest: +SKIP
    """

    model: nn.Module
    train: Sequence[Any]
    held_out: Sequence[Any]
    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-3
    budget: Budget | str | float = "70%"
    collate: Collator = default_data_collator
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0
    name: str = "own"
    reference: Reference | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size)
        if not all(isinstance(count, int) and count > 0 for count in counts) or not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                "steps and batch_size are whole numbers of at least 1 and learning_rate is above 0; got "
                f"{self.steps!r}, {self.batch_size!r} and {self.learning_rate!r}."
            )
        check_seed(self.seed)
        if len(self.train) < self.batch_size or len(self.held_out) < 1:
            raise ConfigError(
                f"The training data holds at least one batch of {self.batch_size} rows, and the held-out data at "
                f"least one row; got {len(self.train)} and {len(self.held_out)}. Lower batch_size or add data."
            )
        Budget.parse(self.budget)
        self.adapted()

    @property
    def id(self) -> str:
        """Its name and seed."""
        return f"{self.name}/{self.seed}"

    @property
    def limit(self) -> Budget:
        """The budget."""
        return Budget.parse(self.budget)

    @cached_property
    def predicted(self) -> float:
        """See `FineTune`; of the first batch."""
        return predicted_share([count_predictions(self._batch(0))])

    @cached_property
    def _adapted(self) -> tuple[PeftModel, list[TargetModule]]:
        model = self.model
        if not isinstance(model, PeftModel):
            model = self._with_adapters(model)
        targets = find_target_modules(model)
        factors = {id(weight) for target in targets for weight in (target.weight_a, target.weight_b)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in factors)
        return model.eval(), targets

    def _with_adapters(self, base: nn.Module) -> PeftModel:
        """A plain model with adapters; those that an earlier task has put on the same modules of it."""
        modules = self.target_modules
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            made: tuple[Any, PeftModel] = vars(base).get(_ADAPTED, (None, None))
            if made[0] == modules:
                return made[1]
            raise ConfigError(
                f"This {type(base).__name__} has adapters already, on other modules than {modules!r}: pass another "
                "copy of the model, or the PeftModel that holds them."
            )
        names = modules if isinstance(modules, str) else list(modules)
        config = LoraConfig(r=START_RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise ConfigError(
                f"No adapter can be put on {modules!r} of {type(base).__name__}: {error} Names of modules are a tuple; "
                "a text alone is 'all-linear' or a regular expression of the whole name."
            ) from error
        vars(base)[_ADAPTED] = modules, model
        return model

    def adapted(self) -> tuple[PeftModel, list[TargetModule]]:
        """See `FineTune`."""
        return self._adapted

    @cached_property
    def _cost(self) -> UntimedCost:
        model, targets = self.adapted()
        if self.limit.kind == "parameters":
            return ParameterCost.of(targets)
        return calibrate(model, targets, self._batch(0)).cost()

    def cost(self) -> UntimedCost:
        """See `FineTune`."""
        return self._cost

    @cached_property
    def _order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows that each step trains on, (steps, batch_size): whole passes over the data, each in its own order."""
        generator = np.random.default_rng(self.seed)
        passes = -(-self.steps * self.batch_size // len(self.train))
        rows = np.concatenate([generator.permutation(len(self.train)) for _ in range(passes)])
        return rows[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)

    def _batch(self, step: int, rows: int | None = None) -> dict[str, Any]:
        return self._collated(self.train, self._order[step, :rows].tolist())

    def _collated(self, data: Sequence[Any], rows: Sequence[int]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        batch = self.collate([data[row] for row in rows])
        return {key: value.to(device) for key, value in batch.items()}

    def train_loss(self, model: nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """See `FineTune`."""
        return _loss(model, self._batch(step, rows))

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """See `FineTune`; the mean over batches, weighted by their rows."""
        total = 0.0
        for start in range(0, len(self.held_out), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.held_out)))
            total += float(_loss(model, self._collated(self.held_out, rows))) * len(rows)
        return total / len(self.held_out)


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    loss: torch.Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise UnsupportedError(
            f"{type(model).__name__} returns no loss for a batch with {sorted(batch)}. It has to compute its own loss; "
            'most models of transformers need "labels" for that.'
        )
    return loss
