"""Settings of training and fine-tuning: what the command line shows and what each run's `config.json` holds."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import tyro

from ..env.schedule import DecisionSchedule
from ..env.suites import SUITES
from ..env.tasks import ProxyTask
from ..errors import ConfigError
from ..lora.budget import Budget

Task = Literal["classification", "causal-lm"]
OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit"]


@dataclass(frozen=True)
class NetworkConfig:
    """Size and start of the network.

    Attributes:
        width: of every hidden layer.
        score_std: standard deviation of exploration on each score.
        floor_std: the same on log2 of the rank floor.
        signal_gain: weight of heur3 in the score at the start.
    """

    width: int = 32
    score_std: float = 0.3
    floor_std: float = 0.7
    signal_gain: float = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained.

    Attributes:
        iterations: PPO updates.
        group: episodes of one task that each worker runs in an iteration.
        workers: worker processes; 0 for as many as there are cores.
        learning_rate: of PPO.
        epochs: passes over each iteration's decisions.
        clip_range: PPO's clip on the probability ratio.
        suites: where tasks come from, "planted" and "shift".
        bases: proxy bases of the tasks.
        task_steps: optimiser steps of an episode; None for as many as the suites' tasks have.
        validation_tasks: tasks of the validation split on which policy and rules are compared at the end, at most; 0
            for none.
        schedule: when ranks are decided in an episode.
        network: size and start of the network.
        seed: of everything.

    Raises:
        ConfigError: a value out of range.
    """

    iterations: int = 10
    group: int = 8
    workers: int = 0
    learning_rate: float = 3e-3
    epochs: int = 6
    clip_range: float = 0.2
    suites: tuple[str, ...] = SUITES
    bases: tuple[str, ...] = ("llama-4x64",)
    task_steps: int | None = None
    validation_tasks: int = 8
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        steps = 1 if self.task_steps is None else self.task_steps
        if min(self.iterations, self.epochs, steps) < 1 or self.group < 2:
            raise ConfigError(
                "iterations, epochs and task_steps are at least 1 and group at least 2 (returns are compared inside "
                f"it); got {self.iterations}, {self.epochs}, {self.task_steps} and {self.group}."
            )
        if self.workers < 0 or self.validation_tasks < 0 or self.learning_rate <= 0:
            raise ConfigError(
                "workers and validation_tasks are at least 0 and learning_rate above 0; got "
                f"{self.workers}, {self.validation_tasks} and {self.learning_rate}."
            )

    @property
    def worker_count(self) -> int:
        """Worker processes that run."""
        return self.workers or os.cpu_count() or 1

    @property
    def rollout_steps(self) -> int:
        """Decisions of one worker in an iteration."""
        return self.group * len(self.schedule.steps(self.task_steps or ProxyTask.steps))

    @property
    def task_overrides(self) -> dict[str, Any]:
        """Fields that every task gets."""
        return {} if self.task_steps is None else {"steps": self.task_steps}


PRESETS: dict[str, TrainConfig] = {
    "quick": TrainConfig(iterations=8, group=8, validation_tasks=6),
    "default": TrainConfig(iterations=120, group=12, learning_rate=1.5e-3, validation_tasks=16),
}
"""Presets of `rankpilot train`; "quick" is made for two cores and a few minutes."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tune.

    Attributes:
        model: packaged name, Hugging Face id or local folder.
        data: packaged name, Hugging Face id, local file or folder.
        policy: folder of a trained policy, or a rule.
        budget: see `Budget.parse`.
        compare_uniform: also run uniform LoRA in the same budget.
        task: classification or causal-lm; by the data's columns if None.
        steps: optimiser steps.
        batch_size: rows a step.
        learning_rate: peak of a linear decay.
        max_length: tokens a row.
        target_modules: as in `peft.LoraConfig`; "all-linear" or names separated by commas.
        scaling: constant factor in front of B A (lora_alpha / r).
        train_rows: at most so many training rows.
        held_out_rows: at most so many held-out rows.
        text_column: column with the text.
        label_column: column with the class.
        seed: of everything.
        eval_every: steps between evaluations and checkpoints.

    Raises:
        ConfigError: a value out of range.
        BudgetError: the budget is unreadable.
    """

    model: tyro.conf.Positional[str]
    data: tyro.conf.Positional[str]
    policy: str = "heur3"
    budget: str = "100%"
    compare_uniform: bool = False
    task: Task | None = None
    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-3
    max_length: int = 64
    target_modules: str = "all-linear"
    scaling: float = 2.0
    train_rows: int | None = None
    held_out_rows: int | None = 800
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0
    eval_every: int = 50

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        if min(self.steps, self.batch_size, self.eval_every) < 1 or self.learning_rate <= 0 or self.scaling <= 0:
            raise ConfigError(
                "steps, batch_size and eval_every are at least 1, learning_rate and scaling above 0; got "
                f"{self.steps}, {self.batch_size}, {self.eval_every}, {self.learning_rate}, {self.scaling}."
            )


@dataclass(frozen=True)
class MemoryConfig:
    """What `rankpilot memory` looks at: a model, an adapter and a batch.

    Attributes:
        model: packaged name, Hugging Face id or local folder.
        data: packaged name, Hugging Face id, local file or folder; its longest rows make the batch. Without it the
            batch is random token ids, all rows of the full length.
        rank: of the adapter on every target module.
        batch_size: rows on the device at once.
        max_length: tokens a row.
        task: classification or causal-lm; without one by the data's columns, or else by the model's architecture.
        labels: classes of a classification without data.
        target_modules: as in `peft.LoraConfig`; "all-linear" or names separated by commas.
        optimizer: decides what is kept for each weight: adamw two numbers, sgd none, adafactor one at the most,
            adamw8bit two bytes (needs the extra rankpilot[quant]).
        bf16: compute in bfloat16 where autocast does, as the Trainer's bf16=True.
        checkpointing: gradient checkpointing: layers keep their inputs alone and run again in the backward pass.
        budget: show which plans the rules make inside it, and what fits: "6GiB", "350MB", "80%" of what rank 8 takes,
            "300k params" or "auto" (what is free on the device).
        measure: run real steps too, and show predicted beside measured bytes.
        text_column: column with the text.
        label_column: column with the class.
        seed: of random ids and fresh adapters.

    Raises:
        ConfigError: a value out of range.
        BudgetError: the budget is unreadable.
    """

    model: tyro.conf.Positional[str]
    data: tyro.conf.Positional[str | None] = None
    rank: int = 8
    batch_size: int = 16
    max_length: int = 64
    task: Task | None = None
    labels: int = 2
    target_modules: str = "all-linear"
    optimizer: OptimizerName = "adamw"
    bf16: bool = False
    checkpointing: bool = False
    budget: str | None = None
    measure: bool = False
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is not None:
            Budget.parse(self.budget)
        if min(self.rank, self.batch_size) < 1 or min(self.max_length, self.labels) < 2:
            raise ConfigError(
                "rank and batch_size are at least 1, max_length and labels at least 2; got "
                f"{self.rank}, {self.batch_size}, {self.max_length} and {self.labels}."
            )


def as_json(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    """A config as JSON values; the fields that a subclass adds are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    base = TrainConfig if isinstance(config, TrainConfig) else FinetuneConfig
    values = asdict(config)
    return {name: plain(values[name]) for name in base.__dataclass_fields__}
