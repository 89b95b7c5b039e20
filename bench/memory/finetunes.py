"""The fine-tunes of the memory benchmark: MiniLM on film reviews, a small Llama on source code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from ...data.models_and_data import Workload, load_model, load_workload
from ...env.proxies.bases import find_base, load_base_model
from ...env.tasks.proxy_finetune import TaskData, load_task
from ...env.tasks.proxy_task import ProxyTask
from ...memory.recording import Batch
from ..learner import Learner

EVAL_ROWS = 64
"""Rows of a forward pass without gradients."""


class Finetune(Protocol):
    """A fine-tune that can be run with any plan and any seed."""

    @property
    def title(self) -> str:
        """Model and data, for people."""

    @property
    def layers(self) -> int:
        """Transformer layers of the model."""

    @property
    def steps(self) -> int:
        """Training steps of a run."""

    def learner(self, seed: int) -> Learner:
        """A fresh model with adapters, the same one for the same seed."""

    def largest(self) -> Batch:
        """A batch that no other exceeds."""

    def batches(self, seed: int) -> Iterator[Batch]:
        """The batches of a run."""

    def held_out_loss(self, learner: Learner, seed: int) -> float:
        """Mean loss in nats over rows that no run trains on."""


@lru_cache(maxsize=1)
def _reviews(length: int, eval_rows: int) -> Workload:
    return load_workload("all-minilm-l6-v2", "rotten-tomatoes", max_length=length, held_out_rows=eval_rows)


@dataclass(frozen=True)
class Reviews:
    """All-MiniLM-L6-v2, which ships as a packaged asset, on Rotten Tomatoes; cross-entropy of two classes.

    Attributes:
        steps: of a run.
        rows: of a batch.
        length: tokens of a row at most.
        eval_rows: of the held-out set.
        learning_rate: of the first step, the best of three for all-linear rank 8 (docs/experiments.md).
        title: for people.
        layers: transformer layers; the pooler stands above them.
    """

    steps: int
    rows: int = 16
    length: int = 48
    eval_rows: int = 256
    learning_rate: float = 2e-3
    title: str = "MiniLM-L6 on Rotten Tomatoes"
    layers: int = 6

    @property
    def _workload(self) -> Workload:
        return _reviews(self.length, self.eval_rows)

    def _batch(self, rows: Iterator[int], *, held_out: bool = False) -> Batch:
        part = self._workload.held_out if held_out else self._workload.train
        batch: Batch = dict(self._workload.collator([part[int(row)] for row in rows]))
        return batch

    def learner(self, seed: int) -> Learner:
        """A fresh model; the classifier and the adapters follow the seed."""
        work = self._workload
        disable_progress_bar()  # transformers would draw one for each model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base = load_model("all-minilm-l6-v2", work.task, work.labels, work.tokenizer)
        return Learner(base, learning_rate=self.learning_rate, seed=seed, task_type="SEQ_CLS")

    def largest(self) -> Batch:
        """The longest rows."""
        lengths = [len(ids) for ids in self._workload.train["input_ids"]]
        return self._batch(iter(np.argsort(lengths)[::-1][: self.rows]))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training rows without repetition, in random order."""
        order = np.random.default_rng(seed).permutation(len(self._workload.train))
        for step in range(self.steps):
            yield self._batch(iter(order[step * self.rows : (step + 1) * self.rows]))

    def held_out_loss(self, learner: Learner, seed: int) -> float:
        """The same rows for every seed; rows of similar length share a batch."""
        rows = np.argsort([len(ids) for ids in self._workload.held_out["input_ids"]])
        parts = [self._batch(iter(rows[i : i + EVAL_ROWS]), held_out=True) for i in range(0, len(rows), EVAL_ROWS)]
        losses = [(float(learner.model(**part).loss), len(part["labels"])) for part in parts]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@dataclass(frozen=True)
class Code:
    """The Llama of 4 layers x 64 that ships with the package, on Python's source code; nats a byte.

    Attributes:
        steps: of a run.
        rows: of a batch.
        length: bytes of a row.
        eval_rows: of the held-out set.
        learning_rate: of the first step, the best of three for all-linear rank 8 (docs/experiments.md).
        title: for people.
        layers: transformer layers.
    """

    steps: int
    rows: int = 8
    length: int = 64
    eval_rows: int = 512
    learning_rate: float = 1e-2
    title: str = "Llama 4 x 64 on Python code"
    layers: int = 4

    def _data(self, seed: int) -> TaskData:
        return load_task(
            ProxyTask(
                "shift", seed, steps=self.steps, batch_size=self.rows, length=self.length, eval_rows=self.eval_rows
            )
        )

    def learner(self, seed: int) -> Learner:
        """A fresh model; the adapters follow the seed."""
        name = ProxyTask("shift", seed).base
        modules = list(find_base(name).target_modules)
        return Learner(load_base_model(name), learning_rate=self.learning_rate, seed=seed, target_modules=modules)

    def largest(self) -> Batch:
        """Any: all have one shape."""
        return next(self.batches(0))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random windows of the training text."""
        for tokens in self._data(seed).inputs:
            yield {"input_ids": tokens, "labels": tokens}

    def held_out_loss(self, learner: Learner, seed: int) -> float:
        """Random windows of the held-out text, others for each seed."""
        return self._data(seed).held_out_loss(learner.model)


@torch.no_grad()
def _evaluate(task: Finetune, learner: Learner, seed: int) -> float:
    learner.model.eval()
    return task.held_out_loss(learner, seed)


def train(task: Finetune, ranks: list[int], seed: int) -> float:
    """Run a fine-tune under a plan, its learning rate falling to zero in a straight line.

    Args:
        task: which one.
        ranks: the plan, (modules,).
        seed: of weights, batches and dropout.

    Returns:
        The held-out loss at the end.
    """
    learner = task.learner(seed)
    learner.set_ranks(ranks)
    schedule = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 1 - step / task.steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in task.batches(seed):
            learner.step(batch)
            schedule.step()
    return _evaluate(task, learner, seed)
