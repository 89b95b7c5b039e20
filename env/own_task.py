"""Your own fine-tune as a task: any model, data set and collator."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import default_data_collator

from ..common.checks import is_count, is_positive
from ..cost.budget import Budget
from ..cost.calibration import beside_model, calibrate
from ..cost.cost import ParameterCost, UntimedCost
from ..cost.step_config import check_seed
from ..data.batches import IGNORED, count_predictions, predicted_share
from ..errors import ConfigError, UnsupportedError, first_line, shown
from ..lora.targets import TargetModule, find_target_modules
from .bases import ALPHA
from .proxy_task import Reference

Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]
_ADAPTED = "_rankpilot_own_task"
"""Where a plain model keeps the modules that have adapters, and the PeftModel around it: its tasks share both."""

START_RANK = 8
"""Rank of adapters that are put into a plain model, before ranks are decided."""


@dataclass(frozen=True, eq=False)
class OwnTask:
    """A fine-tune of any model, for `RankAllocationEnv(task=OwnTask(...))`.

    The model computes its own loss, as under transformers' Trainer, but in evaluation mode: without dropout, since
    episodes compare plans, and its noise would hide small differences. All episodes train the same adapters, one after
    another; the model's own weights stay as they are. Modules that train beside the adapter (`modules_to_save`) are
    left frozen.

    From now on the model stays in evaluation mode, and all of it but the adapters is frozen: other tasks may share it,
    so no task can tell when it is free again. Before you train it yourself, call `model.train()`, and set
    `requires_grad` of what trains beside the adapters; or pass a copy. Once a task and its environments are deleted,
    nothing here keeps the model alive.

    Attributes:
        model: a PEFT model with a LoRA adapter, or a plain model, which gets adapters on its linear layers.
        train: rows to train on, at least one batch.
        held_out: rows of the held-out set.
        steps: optimizer steps of an episode.
        batch_size: rows a step.
        learning_rate: peak of a linear decay.
        budget: "24GiB" for all that the device holds, "6GiB step" for a step beside the frozen model, "80%" of what
            rank 8 on all modules takes, or "300k params".
        collate: makes a batch of rows, a dictionary of tensors, "labels" included; transformers' default, which needs
            rows of one length.
        target_modules: of a plain model, as in `peft.LoraConfig`.
        seed: of batches and adapters.
        name: what logs call it.
        reference: what uniform achieves, finite losses; measured when it is needed if it is None.

    Raises:
        ConfigError: a value out of range or of another type, or data shorter than a batch; later, if the collator makes
            no batch of tensors, or the held-out loss is not finite before training.
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
        if not all(map(is_count, counts)) or not is_positive(self.learning_rate):
            raise ConfigError(
                "steps and batch_size are whole numbers of at least 1 and learning_rate is above 0; got "
                f"{self.steps!r}, {self.batch_size!r} and {self.learning_rate!r}."
            )
        check_seed(self.seed)
        self._check_parts()
        if len(self.train) < self.batch_size or len(self.held_out) < 1:
            raise ConfigError(
                f"The training data holds at least one batch of {self.batch_size} rows, and the held-out data at "
                f"least one row; got {len(self.train)} and {len(self.held_out)}. Lower batch_size or add data."
            )
        Budget.parse(self.budget)
        self.adapted()

    def _check_parts(self) -> None:
        """Raise ConfigError for a model, data, a collator or a reference of another kind."""
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"model is a torch model, plain or with adapters of PEFT; got {shown(self.model)}.")
        for name, data in (("train", self.train), ("held_out", self.held_out)):
            if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
                raise ConfigError(
                    f"{name} has a length, and rows that are taken by their number, as a list or a datasets.Dataset "
                    f"has; got {shown(data)}. Make a list of it."
                )
        if not callable(self.collate):
            raise ConfigError(f"collate is a function that makes a batch of a list of rows; got {shown(self.collate)}.")
        known = self.reference
        if known is not None and not (
            isinstance(known, Reference) and math.isfinite(known.initial) and math.isfinite(known.uniform)
        ):
            raise ConfigError(f"reference is a Reference with finite losses, or None to measure it; got {known!r}.")

    @property
    def id(self) -> str:
        """Its name and seed."""
        return f"{self.name}/{self.seed}"

    @cached_property
    def limit(self) -> Budget:
        """The budget; of bytes in all, what is left for a step."""
        return beside_model(Budget.parse(self.budget), self._adapted[0])

    @cached_property
    def known(self) -> dict[Hashable, Any]:
        """What episodes have found out about it; it goes with the task."""
        return {}

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
        batch = _made(self.collate, [data[row] for row in rows])
        return {key: value.to(device) for key, value in batch.items()}

    def train_loss(self, model: nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """See `FineTune`."""
        batch = self._batch(step, rows)
        if _asks_nothing(batch):  # a mean over nothing
            return torch.stack([0.0 * p.sum() for p in model.parameters() if p.requires_grad]).sum()
        return _loss(model, batch)

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """See `FineTune`; the mean over batches, weighted by their rows.

        Batches in which no label counts have no loss, and are left out; NaN if there are no others.
        """
        total, counted = 0.0, 0
        for start in range(0, len(self.held_out), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.held_out)))
            batch = self._collated(self.held_out, rows)
            if _asks_nothing(batch):
                continue
            total += float(_loss(model, batch)) * len(rows)
            counted += len(rows)
        return total / counted if counted else math.nan


def _made(collate: Collator, rows: list[Any]) -> Mapping[str, torch.Tensor]:
    """The batch that a collator makes of rows; ConfigError if that is no dictionary of tensors."""
    try:
        batch = collate(rows)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if collate is not default_data_collator:  # the user's own, whose error says more
            raise
        raise ConfigError(
            f"transformers' default_data_collator cannot make a batch of these rows ({first_line(error)}): it takes "
            "dictionaries of numbers and of lists, all of one length. Pass another `collate`, such as "
            "transformers.DataCollatorWithPadding(tokenizer)."
        ) from error
    named = batch.items() if isinstance(batch, Mapping) else [("batch", batch)]
    for name, value in named:
        if not isinstance(batch, Mapping) or not isinstance(value, torch.Tensor):
            raise ConfigError(
                "collate makes a dictionary of tensors, with which the model is called; got "
                f"{shown(value)} for {name!r}. Make a tensor of it, or leave it out."
            )
    return batch


def _asks_nothing(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has labels of which none counts."""
    labels = batch.get("labels")
    return isinstance(labels, torch.Tensor) and bool((labels == IGNORED).all())


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    loss: torch.Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise UnsupportedError(
            f"{type(model).__name__} returns no loss for a batch with {sorted(batch)}. It has to compute its own loss; "
            'most models of transformers need "labels" for that.'
        )
    return loss
