"""Proxy tasks: short fine-tunes of a small pretrained transformer that stand for the real ones.

* *planted*: a teacher is the base plus known low-rank changes on some modules; the student learns its outputs. The
  loss is the divergence KL(teacher || student) in nats a token: where the rank is needed is known.
* *shift*: the base, pretrained on documentation, is fine-tuned on text of another kind; the loss is next-byte
  cross-entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..errors import ConfigError
from ..lora.targets import TargetModule, find_target_modules
from .bases import find_base, load_base_model
from .corpora import CORPORA, load_corpus, sample_windows

Kind = Literal["planted", "shift"]
Placement = Literal["low", "high", "spread"]
KINDS: tuple[Kind, ...] = ("planted", "shift")
PLACEMENTS: tuple[Placement, ...] = ("low", "high", "spread")

EVAL_BATCH = 64
"""Rows of a forward pass without gradients."""

SCALING = 2.0
"""Constant LoRA scaling of proxy runs (alpha 16 at rank 8, PEFT users' most common setting)."""


@dataclass(frozen=True)
class ProxyTask:
    """One proxy fine-tune, fully determined by its fields.

    Attributes:
        kind: "planted" or "shift".
        seed: of data, teacher and adapters.
        base: name of a proxy base.
        budget: share of uniform rank 8's bytes, > 0.
        placement: which layers a planted teacher changes; unused by "shift".
        corpus: the text; planted teachers are queried on it.
        steps: optimiser steps.
        batch_size: rows a step.
        length: tokens a row.
        eval_rows: rows of the held-out set.
        learning_rate: peak of a linear decay, tuned for uniform rank (docs/experiments.md).

    Raises:
        ConfigError: a value out of range.
    """

    kind: Kind
    seed: int
    base: str = "llama-4x64"
    budget: float = 0.7
    placement: Placement = "spread"
    corpus: str = "code"
    steps: int = 100
    batch_size: int = 8
    length: int = 32
    eval_rows: int = 192
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.placement not in PLACEMENTS:
            raise ConfigError(f"The kind of a task is one of {KINDS}, its placement one of {PLACEMENTS}; got {self}.")
        if min(self.steps, self.batch_size, self.eval_rows) < 1 or self.length < 2 or self.budget <= 0:
            raise ConfigError(f"Steps, batch, rows, length and budget of a task are positive; got {self}.")

    @property
    def id(self) -> str:
        """A readable name, unique among tasks that differ in kind, place, budget or seed."""
        where = self.placement if self.kind == "planted" else self.corpus
        return f"{self.base}/{self.kind}-{where}/{self.budget:.0%}/{self.seed}"


def sample_task(generator: np.random.Generator, corpora: tuple[str, ...] = ("code",)) -> ProxyTask:
    """Draw a training task: half planted, half shift; budgets from a third of uniform rank 8's bytes to all of them."""
    kind = KINDS[int(generator.integers(len(KINDS)))]
    return ProxyTask(
        kind=kind,
        seed=int(generator.integers(1_000_000, 2**31)),
        budget=round(float(generator.uniform(0.35, 1.05)), 3),
        placement=PLACEMENTS[int(generator.integers(len(PLACEMENTS)))],
        corpus=corpora[int(generator.integers(len(corpora)))] if kind == "shift" else "documentation",
    )


def validation_tasks(count: int, corpora: tuple[str, ...] = ("code",)) -> list[ProxyTask]:
    """A fixed set of tasks that training never draws (their seeds lie below 1,000,000)."""
    tasks = []
    for seed in range(count):
        kind, turn = KINDS[seed % 2], seed // 2
        corpus = corpora[turn % len(corpora)] if kind == "shift" else "documentation"
        budget = (0.45, 0.65, 0.8, 1.0)[turn % 4]
        tasks.append(ProxyTask(kind, seed, budget=budget, placement=PLACEMENTS[turn % 3], corpus=corpus))
    return tasks


@lru_cache(maxsize=2)
def adapted_base(name: str) -> tuple[PeftModel, list[TargetModule]]:
    """The proxy base with a LoRA pair on every target module; one a process, since episodes run one after another."""
    config = LoraConfig(
        r=8,
        lora_alpha=int(8 * SCALING),
        target_modules=list(find_base(name).target_modules),
        lora_dropout=0.0,
    )
    model = get_peft_model(load_base_model(name), config)
    return model, find_target_modules(model)


@dataclass(frozen=True, eq=False)
class TaskData:
    """Everything that a task's episodes share.

    Attributes:
        train: token ids, int64 (steps, batch_size, length).
        held_out: token ids, int64 (eval_rows, length).
        train_logits: the teacher's log-probabilities for `train`, float32 (steps, batch, length, vocabulary), or None.
        held_out_logits: the same for `held_out`.
        planted: names of the modules that the teacher changed.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    train_logits: torch.Tensor | None
    held_out_logits: torch.Tensor | None
    planted: tuple[str, ...]

    def loss(self, model: torch.nn.Module, tokens: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        """Mean loss in nats a token."""
        if teacher is None:
            loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
            return loss
        student = torch.log_softmax(model(input_ids=tokens).logits, dim=-1)
        divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
        return divergence.sum(-1).mean()

    def train_loss(self, model: torch.nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """Loss of the batch of one step, or of its first rows."""
        teacher = self.train_logits[step, :rows] if self.train_logits is not None else None
        return self.loss(model, self.train[step, :rows], teacher)

    @torch.no_grad()
    def held_out_loss(self, model: torch.nn.Module) -> float:
        """Loss on the held-out set."""
        parts = []
        for start in range(0, len(self.held_out), EVAL_BATCH):
            rows = slice(start, start + EVAL_BATCH)
            teacher = self.held_out_logits[rows] if self.held_out_logits is not None else None
            tokens = self.held_out[rows]
            parts.append(float(self.loss(model, tokens, teacher)) * len(tokens))
        return sum(parts) / len(self.held_out)


@lru_cache(maxsize=6)
def load_task(task: ProxyTask) -> TaskData:
    """Draw a task's data, and its teacher if it has one; the same task gives the same data."""
    generator = np.random.default_rng(task.seed)
    train_text, held_out_text = load_corpus(task.corpus)
    rows = task.steps * task.batch_size
    train = sample_windows(train_text, rows, task.length, generator)
    held_out = sample_windows(held_out_text, task.eval_rows, task.length, generator)
    train_logits = held_out_logits = None
    names: tuple[str, ...] = ()
    if task.kind == "planted":
        model, targets = adapted_base(task.base)
        with _teacher(targets, task.placement, generator) as names, model.disable_adapter():
            train_logits = _log_probabilities(model, train).view(task.steps, task.batch_size, task.length, -1)
            held_out_logits = _log_probabilities(model, held_out)
    shape = (task.steps, task.batch_size, task.length)
    return TaskData(train.view(shape), held_out, train_logits, held_out_logits, names)


@torch.no_grad()
def _log_probabilities(model: PeftModel, tokens: torch.Tensor) -> torch.Tensor:
    parts = [torch.log_softmax(model(input_ids=part).logits, dim=-1) for part in torch.split(tokens, EVAL_BATCH)]
    return torch.cat(parts)


def _planted_modules(
    targets: list[TargetModule], placement: Placement, generator: np.random.Generator
) -> list[TargetModule]:
    """15 to 50 % of the modules, from the lower half of the layers, the upper half, or anywhere."""
    half = (max(target.block for target in targets) + 1) / 2
    allowed = {
        "low": [t for t in targets if t.block < half],
        "high": [t for t in targets if t.block >= half],
        "spread": targets,
    }[placement]
    count = max(1, round(float(generator.uniform(0.15, 0.5)) * len(allowed)))
    return [allowed[index] for index in generator.choice(len(allowed), size=count, replace=False)]


@contextmanager
def _teacher(
    targets: list[TargetModule], placement: Placement, generator: np.random.Generator
) -> Iterator[tuple[str, ...]]:
    """The base with planted changes of rank 1 to 8, each about a third of the weight's norm; undone afterwards."""
    chosen = _planted_modules(targets, placement, generator)
    originals = []
    try:
        for target in chosen:
            weight = target.layer.get_base_layer().weight
            originals.append((weight, weight.data))
            rank = int(generator.integers(1, 9))
            left = torch.from_numpy(generator.standard_normal((target.d_out, rank))).float()
            right = torch.from_numpy(generator.standard_normal((rank, target.d_in))).float()
            change = left @ right / math.sqrt(rank)
            weight.data = weight.data + change * (0.35 * weight.data.norm() / change.norm())
        yield tuple(target.name for target in chosen)
    finally:
        for weight, data in originals:
            weight.data = data


def check_corpora(names: tuple[str, ...]) -> None:
    """Make sure that the corpora exist and can be read, before a long run starts.

    Raises:
        UnknownNameError, AssetError: see `load_corpus`.
        ConfigError: none was named.
    """
    if not names:
        raise ConfigError(f"Name at least one corpus of {CORPORA}.")
    for name in names:
        load_corpus(name)
