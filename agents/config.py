"""Settings of training and fine-tuning: what the command line shows and what each run's `config.json` holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import tyro

from ..env.schedule import DecisionSchedule
from ..env.suites import SUITES
from ..errors import ConfigError
from ..files import as_plain
from ..lora.budget import Budget

Task = Literal["classification", "causal-lm"]
OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit"]


def count_workers(asked: int) -> int:
    """Worker processes for a setting in which 0 stands for as many as there are cores."""
    return asked or os.cpu_count() or 1


@dataclass(frozen=True)
class NetworkConfig:
    """Size and start of the network.

    Attributes:
        width: of every hidden layer.
        attention_heads: of one layer of attention between the modules; 0 for none.
        critics: networks that judge a run; their disagreement is the uncertainty.
        score_std: standard deviation of exploration on each score.
        shared_std: of exploration on the gain of each feature, shared by the modules.
        floor_std: of exploration on log2 of the rank floor.
        tilt_std: of exploration on the tilt.
        signal_gain: weight of heur3 in the score at the start.

    Raises:
        ConfigError: a value out of range.
    """

    width: int = 32
    attention_heads: int = 0
    critics: int = 4
    score_std: float = 0.05
    shared_std: float = 0.2
    floor_std: float = 0.5
    tilt_std: float = 0.7
    signal_gain: float = 0.5

    def __post_init__(self) -> None:
        if min(self.width, self.critics) < 1 or self.attention_heads < 0 or self.width % max(self.attention_heads, 1):
            raise ConfigError(
                "width and critics of the network are at least 1, and attention_heads divides the width; got "
                f"{self.width}, {self.critics} and {self.attention_heads}."
            )
        stds = (self.score_std, self.shared_std, self.floor_std, self.tilt_std)
        if not min(stds) > 0:
            raise ConfigError(f"Standard deviations of exploration are above 0; got {stds}.")


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained.

    Attributes:
        iterations: PPO updates; each follows a round of stacks * groups * group episodes.
        stacks: of episodes that train together on one base; each can have a core of its own.
        groups: fresh tasks of each stack.
        group: episodes of each task, whose returns are compared.
        workers: worker processes; 0 for as many as there are cores. Results do not depend on it.
        learning_rate: of PPO at the start; it falls to zero along a line.
        epochs: passes over each iteration's decisions.
        clip_range: PPO's clip on the probability ratio.
        target_kl: an update ends early when the policy has moved so far.
        warm_tasks: fresh tasks of the warm start, which teaches what modules are worth where that is known; 0 for none.
        trial_tasks: fresh tasks of the trials after PPO, from which plan critics learn, half of them varied in text,
            place and budget; 0 for none, and the actor decides alone.
        suites: where tasks come from, "planted" and "shift".
        bases: proxy bases of the tasks; all of the training split if none is given.
        task_steps: optimiser steps of an episode; None for as many as the suites' tasks have.
        validation_tasks: tasks of the validation split on which the policy is measured on the way and at the end, at
            most; 0 for none.
        validate_every: iterations between measurements; the best policy is kept.
        schedule: when ranks are decided in an episode.
        network: size and start of the network.
        seed: of everything.
        device: where episodes train; "auto" is CUDA where there is one.

    Raises:
        ConfigError: a value out of range.
    """

    iterations: int = 10
    stacks: int = 2
    groups: int = 3
    group: int = 8
    workers: int = 0
    learning_rate: float = 1e-3
    epochs: int = 6
    clip_range: float = 0.2
    target_kl: float = 0.05
    warm_tasks: int = 0
    trial_tasks: int = 0
    suites: tuple[str, ...] = SUITES
    bases: tuple[str, ...] = ()
    task_steps: int | None = None
    validation_tasks: int = 32
    validate_every: int = 20
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        steps = 1 if self.task_steps is None else self.task_steps
        if (
            min(self.iterations, self.stacks, self.groups, self.epochs, steps, self.validate_every) < 1
            or self.group < 2
        ):
            raise ConfigError(
                "iterations, stacks, groups, epochs, task_steps and validate_every are at least 1 and group at least "
                f"2 (returns are compared inside it); got {self.iterations}, {self.stacks}, {self.groups}, "
                f"{self.epochs}, {self.task_steps}, {self.validate_every} and {self.group}."
            )
        if min(self.workers, self.validation_tasks, self.warm_tasks, self.trial_tasks) < 0 or self.learning_rate <= 0:
            raise ConfigError(
                "workers, validation_tasks, warm_tasks and trial_tasks are at least 0 and learning_rate above 0; got "
                f"{self.workers}, {self.validation_tasks}, {self.warm_tasks}, {self.trial_tasks} and "
                f"{self.learning_rate}."
            )

    @property
    def worker_count(self) -> int:
        """Worker processes that run."""
        return count_workers(self.workers)

    @property
    def task_overrides(self) -> dict[str, Any]:
        """Fields that every task gets."""
        return {} if self.task_steps is None else {"steps": self.task_steps}


PRESETS: dict[str, TrainConfig] = {
    "quick": TrainConfig(iterations=8, bases=("llama-4x32",), validation_tasks=6, validate_every=4, learning_rate=3e-3),
    "default": TrainConfig(iterations=80, warm_tasks=960, trial_tasks=600),
    "full": TrainConfig(iterations=100, warm_tasks=960, trial_tasks=1200),
}
"""Presets of `rankpilot train`: a few minutes, an hour and a half, and more than two hours on two cores. More trials
make better policies, more rounds of PPO hardly do (docs/experiments.md)."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tune.

    Attributes:
        model: packaged name, Hugging Face id or local folder.
        data: packaged name, Hugging Face id, local file or folder.
        policy: "default", which ships with the package, the folder of a trained one, or a rule.
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
    policy: str = "default"
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


def schedule_from(values: Mapping[str, Any]) -> DecisionSchedule:
    """A schedule from its fields as JSON has them; KeyError, TypeError or ConfigError if these are others."""
    return DecisionSchedule(**{**values, "fractions": tuple(values["fractions"])})


def train_config(values: Mapping[str, Any]) -> TrainConfig:
    """A config from what `as_json` made of it.

    Raises:
        ConfigError: these are no settings of training.
    """
    try:
        return TrainConfig(
            **dict(values)
            | {name: tuple(values[name]) for name in ("suites", "bases")}
            | {"schedule": schedule_from(values["schedule"]), "network": NetworkConfig(**values["network"])}
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"These are no settings of training of this version of rankpilot ({error}).") from error


def as_json(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    """A config as JSON values; the fields that a subclass adds are left out."""
    base = TrainConfig if isinstance(config, TrainConfig) else FinetuneConfig
    values = asdict(config)
    return {name: as_plain(values[name]) for name in base.__dataclass_fields__}
