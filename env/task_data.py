"""The fine-tune described by a proxy task: its model, batches, losses, held-out rows, and its best allocation.

Models are trained on windows of bytes. `labels[..., t]` is the target of the logits at position t, or IGNORED, so
causal and masked language models, and classification by a label byte, share one loss.

The teacher of a planted task is the base plus low-rank changes on a random subset of its modules. Two quantities are
therefore known without training:

* the *utility* of a rank on a module: the drop in the teacher's divergence from undoing the module's change, times the
  share of the change captured at that rank. Utilities are nearly additive, so `best_plan` finds the oracle's plan;
* the *attainable loss* of a plan: the divergence of the base plus the best approximation of each change at its rank
  (Eckart and Young, 1936).
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..common.arrays import FloatArray, IntArray
from ..common.errors import ConfigError
from ..cost.cost import ParameterCost
from ..data.batches import IGNORED
from ..data.corpora import load_corpus, load_labelled, sample_windows
from ..decide.plan.problem import AllocationProblem, best_plan
from ..lora.targets import TargetModule
from .bases import MASK_TOKEN, ProxyBase, adapted_base, find_base
from .tasks import FineTuneTask

MASK_SHARE = 0.2
"""Share of bytes masked for masked language models."""

FIRST_CLASS = ord("0")
"""Label byte of class 0; the other classes follow in order."""

Inputs = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, int64 (rows, length) each."""


def language_inputs(base: ProxyBase, windows: torch.Tensor, generator: np.random.Generator) -> Inputs:
    """Return inputs and targets for windows of text: predict the next byte, or the masked bytes.

    Args:
        base: selects causal or masked language modeling.
        windows: int64 (rows, length).
        generator: draws the masked bytes.
    """
    if base.masked:
        hidden = torch.from_numpy(generator.random(windows.shape) < MASK_SHARE)
        return windows.masked_fill(hidden, MASK_TOKEN), windows.masked_fill(~hidden, IGNORED)
    labels = torch.full_like(windows, IGNORED)
    labels[:, :-1] = windows[:, 1:]
    return windows, labels


def class_inputs(base: ProxyBase, windows: torch.Tensor, classes: torch.Tensor) -> Inputs:
    """Return windows ending in a question: predict the byte of the class at the last position.

    No new layer is needed (a verbalizer; Schick and Schütze, 2021, arXiv 2001.07676).

    Args:
        base: a masked language model reads MASK_TOKEN at the last position, any other base a line feed.
        windows: int64 (rows, length); the last byte is overwritten.
        classes: int64 (rows,), from 0.
    """
    inputs, labels = windows.clone(), torch.full_like(windows, IGNORED)
    inputs[:, -1] = MASK_TOKEN if base.masked else ord("\n")
    labels[:, -1] = FIRST_CLASS + classes
    return inputs, labels


def loss_terms(
    logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None, runs: int = 1
) -> torch.Tensor:
    """Loss of some runs at each position, in nats, (runs, rows, length).

    It is KL(teacher || student), or without a teacher the cross-entropy, 0 at ignored positions.

    Args:
        logits: logits of the runs, concatenated, (runs * rows, length, vocabulary).
        labels: int64 (rows, length), shared by all runs.
        teacher: log-probabilities of the teacher, (rows, length, vocabulary), shared by all runs.
        runs: number of runs.
    """
    if teacher is None:
        labels = labels.repeat(runs, 1).to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(runs, -1, labels.shape[1])
    student = torch.log_softmax(torch.unflatten(logits, 0, (runs, -1)), dim=-1)
    given = teacher.to(logits.device)
    return torch.nn.functional.kl_div(student, given, reduction="none", log_target=True).sum(dim=-1)


def mean_loss(terms: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of `loss_terms` over the predictions of each run, (runs,)."""
    if teacher is not None:
        return terms.flatten(1).mean(dim=1)
    count = (labels != IGNORED).sum().clamp_min(1)  # a mean of 0 if all positions are ignored
    return terms.flatten(1).sum(dim=1) / count.to(terms.device)


EVAL_BATCH = 64
"""Rows of a forward pass without gradients."""

CACHED_TASKS = 32
"""Tasks cached per process, 20 MB each with a teacher; with more tasks in flight, data is drawn again."""

DENSITY = (0.15, 0.5)
"""Range of the share of modules changed by a teacher."""

RANKS = (1, 8)
"""Range of the rank of a change, inclusive."""

STRENGTH = 0.35
"""Norm of a change relative to the norm of the weight."""


# Teachers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Change:
    """A planted change of one weight.

    Attributes:
        name: name of the module.
        left: (d_out, rank), scaled by the singular values of the change; columns in order of decreasing norm.
        right: (rank, d_in), orthonormal rows.
    """

    name: str
    left: torch.Tensor
    right: torch.Tensor

    def truncated(self, rank: int) -> torch.Tensor:
        """Best approximation at a given rank, (d_out, d_in)."""
        return self.left[:, :rank] @ self.right[:rank]

    @property
    def energy(self) -> list[float]:
        """Share of the squared norm in each component, decreasing, (rank,)."""
        squares = self.left.square().sum(dim=0)
        return list((squares / squares.sum()).tolist())


def draw_changes(targets: Sequence[TargetModule], placement: str, generator: np.random.Generator) -> list[Change]:
    """Draw changes of rank 1 to 8 on 15 to 50 % of the modules.

    Args:
        targets: target modules of the base, with unmodified weights.
        placement: "low" or "high" for the lower or upper half of the layers, "spread" for all of them.
        generator: source of all random draws.
    """
    half = (max(target.block for target in targets) + 1) / 2
    low, high = [t for t in targets if t.block < half], [t for t in targets if t.block >= half]
    allowed = {"low": low, "high": high, "spread": list(targets)}[placement]
    count = max(1, round(float(generator.uniform(*DENSITY)) * len(allowed)))
    chosen = generator.choice(len(allowed), size=count, replace=False)
    return [_draw_change(allowed[index], generator) for index in chosen]


def _draw_change(target: TargetModule, generator: np.random.Generator) -> Change:
    rank = int(generator.integers(RANKS[0], RANKS[1] + 1))
    left = torch.from_numpy(generator.standard_normal((target.d_out, rank)))
    right = torch.from_numpy(generator.standard_normal((rank, target.d_in)))
    # Rewrite the change by its singular values: right = l q with q orthonormal, left l = u s v.
    q, upper = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(left @ upper.mT, full_matrices=False)
    s *= STRENGTH * float(target.layer.get_base_layer().weight.norm()) / s.norm()
    return Change(target.name, (u * s).float(), (vh @ q.mT).float())


@contextmanager
def changed_weights(
    targets: Sequence[TargetModule], changes: Sequence[Change], ranks: Sequence[int] | None = None
) -> Iterator[None]:
    """Add changes to the base's weights, each at a given rank (default: in full), and undo them on exit."""
    layers = {target.name: target.layer for target in targets}
    originals = []
    try:
        for index, change in enumerate(changes):
            layer = layers[change.name]
            weight = layer.get_base_layer().weight
            originals.append((weight, weight.data))
            delta = change.truncated(change.left.shape[1] if ranks is None else ranks[index])
            weight.data = weight.data + (delta.T if layer.fan_in_fan_out else delta)
        yield
    finally:
        for weight, data in originals:
            weight.data = data


# The fine-tune --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TaskData:
    """Data shared by all episodes of a task.

    Attributes:
        inputs: token ids, int64 (steps, batch_size, length).
        labels: targets of the logits at each position, or IGNORED; same shape.
        teacher: log-probabilities of the teacher, float32 (steps, batch, length, vocabulary), or None.
        held_out_inputs: int64 (eval_rows, length).
        held_out_labels: same shape.
        held_out_teacher: float32 (eval_rows, length, vocabulary), or None.
        changes: the teacher's changes of the base; empty without a teacher.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor | None
    held_out_inputs: torch.Tensor
    held_out_labels: torch.Tensor
    held_out_teacher: torch.Tensor | None
    changes: tuple[Change, ...]

    def train_losses_of(self, logits: torch.Tensor, step: int, rows: int | None = None, runs: int = 1) -> torch.Tensor:
        """Training loss of some runs on the batch of one step, or on its first rows, in nats, (runs,).

        Args:
            logits: logits of the runs, concatenated, (runs * rows, length, vocabulary).
            step: number of the batch.
            rows: number of rows, None for all.
            runs: number of runs.
        """
        labels, teacher = self.labels[step, :rows], None if self.teacher is None else self.teacher[step, :rows]
        return mean_loss(loss_terms(logits, labels, teacher, runs), labels, teacher)

    @property
    def predicted(self) -> float:
        """Share of tokens counted in the loss; with a teacher, all of them."""
        return 1.0 if self.teacher is not None else float((self.labels != IGNORED).float().mean())

    @torch.no_grad()
    def held_out_loss(self, model: torch.nn.Module) -> float:
        """Loss on the held-out set, in nats."""
        parts = torch.split(self.held_out_inputs, EVAL_BATCH)
        terms = [self.held_out_terms(model(input_ids=part).logits, i * EVAL_BATCH) for i, part in enumerate(parts)]
        return self.mean_of(torch.cat(terms, dim=1)[0])

    def held_out_terms(self, logits: torch.Tensor, start: int, runs: int = 1) -> torch.Tensor:
        """Loss at each position of part of the held-out set, (runs, rows, length); `mean_of` averages it.

        Args:
            logits: logits of the runs, concatenated, (runs * rows, length, vocabulary).
            start: index of the first row in the held-out set.
            runs: number of runs.
        """
        rows = slice(start, start + len(logits) // runs)
        teacher = None if self.held_out_teacher is None else self.held_out_teacher[rows]
        return loss_terms(logits, self.held_out_labels[rows], teacher, runs)

    def mean_of(self, terms: torch.Tensor) -> float:
        """Held-out loss of one run in nats, from its loss at each position, (eval_rows, length)."""
        return float(mean_loss(terms[None], self.held_out_labels, self.held_out_teacher)[0])


@lru_cache(maxsize=1024)
def known_of(task: FineTuneTask) -> dict[Hashable, Any]:
    """Results cached by the episodes of a task, such as its probe; kept for the most recently used tasks."""
    return {}


def first_problem(task: FineTuneTask) -> AllocationProblem:
    """Return the plans allowed at a task's first decision, before its budget moves."""
    _, targets = adapted_base(task.base)
    cost = base_cost(task.base)
    return AllocationProblem.of(targets, cost, first_limit(task), ranks=np.ones(len(targets), dtype=np.int64))


def first_limit(task: FineTuneTask) -> float:
    """Parameters of the task's mean rank on all modules, at least those of the cheapest module at rank 1."""
    per_rank = base_cost(task.base).per_rank
    return float(max(task.mean_rank * per_rank.sum(), 1.001 * per_rank.min()))


@lru_cache(maxsize=16)
def base_cost(base: str) -> ParameterCost:
    """Cost of plans on a base, in parameters."""
    return ParameterCost.of(adapted_base(base)[1])


@lru_cache(maxsize=CACHED_TASKS)
def load_task(task: FineTuneTask) -> TaskData:
    """Draw a task's data and its teacher, if any; the same task always gives the same data."""
    generator = np.random.default_rng(task.seed)
    base, rows = find_base(task.base), task.steps * task.batch_size
    if task.kind == "labels":
        train_rows, held_out_rows = load_labelled(task.corpus) if "+" not in task.corpus else _origins(task.corpus)
        train = _labelled(base, train_rows, rows, task.length, generator)
        held_out = _labelled(base, held_out_rows, task.eval_rows, task.length, generator)
    else:
        first, last = load_corpus(task.corpus), load_corpus(task.then or task.corpus)
        before = task.changes_at * task.batch_size
        parts = [(first[0], before), (last[0], rows - before)]
        drawn = torch.cat([sample_windows(text, count, task.length, generator) for text, count in parts])
        train = language_inputs(base, drawn, generator)
        windows = sample_windows(last[1], task.eval_rows, task.length, generator)
        held_out = language_inputs(base, windows, generator)
    teacher = held_out_teacher = None
    changes: tuple[Change, ...] = ()
    shape = (task.steps, task.batch_size, task.length)
    if task.kind == "planted":
        model, targets = adapted_base(task.base)
        changes = tuple(draw_changes(targets, task.placement, generator))
        with changed_weights(targets, changes), model.disable_adapter():
            teacher = _log_probabilities(model, train[0]).view(*shape, -1)
            held_out_teacher = _log_probabilities(model, held_out[0])
    inputs, labels = (part.view(shape) for part in train)
    return TaskData(inputs, labels, teacher, *held_out, held_out_teacher, changes)


def _origins(corpora: str) -> Iterator[list[tuple[bytes, int]]]:
    """Yield the training and the held-out halves of texts joined by "+", each with its place as the class."""
    for halves in zip(*map(load_corpus, corpora.split("+")), strict=True):
        yield [(half.tobytes(), number) for number, half in enumerate(halves)]


def _labelled(
    base: ProxyBase, texts: list[tuple[bytes, int]], count: int, length: int, generator: np.random.Generator
) -> Inputs:
    """Draw random windows of random texts, with the class byte to predict at the end."""
    windows, classes = np.full((count, length), ord(" "), dtype=np.int64), np.zeros(count, dtype=np.int64)
    for row, index in enumerate(generator.integers(0, len(texts), size=count)):
        text, classes[row] = texts[index]
        start = int(generator.integers(0, max(1, len(text) - length + 1)))
        window = np.frombuffer(text[start : start + length], dtype=np.uint8)
        windows[row, : len(window)] = window
    return class_inputs(base, torch.from_numpy(windows), torch.from_numpy(classes))


@torch.no_grad()
def _log_probabilities(model: PeftModel, tokens: torch.Tensor) -> torch.Tensor:
    parts = [torch.log_softmax(model(input_ids=part).logits, dim=-1) for part in torch.split(tokens, EVAL_BATCH)]
    return torch.cat(parts)


def oracle_plan(task: FineTuneTask, problem: AllocationProblem) -> IntArray:
    """Ranks that capture the most of the planted changes within the budget, (modules,).

    Args:
        task: a planted task.
        problem: prices, budget and ladder; current ranks are ignored.

    Raises:
        ConfigError: the task has no teacher.
    """
    return best_plan(problem, utilities(task, problem))


def utilities(task: FineTuneTask, problem: AllocationProblem) -> FloatArray:
    """Utility of each rung of the ladder on each module, in nats, (modules, rungs)."""
    _, targets = adapted_base(task.base)
    order = {target.name: index for index, target in enumerate(targets)}
    worth = np.zeros((len(targets), len(problem.ladder.ranks)))
    for change, loss in zip(_changes(task), _worth(task), strict=True):
        captured = np.concatenate([[0.0], np.cumsum(change.energy)])
        ranks = np.minimum(problem.ladder.array, len(captured) - 1)
        worth[order[change.name]] = loss * captured[ranks]
    return worth


@lru_cache(maxsize=CACHED_TASKS)
def _worth(task: FineTuneTask) -> list[float]:
    """Divergence of the teacher from itself without each of its changes, in nats."""
    ranks = [change.left.shape[1] for change in _changes(task)]
    return [max(_loss(task, [*ranks[:index], 0, *ranks[index + 1 :]]), 0.0) for index in range(len(ranks))]


def _changes(task: FineTuneTask) -> tuple[Change, ...]:
    if task.kind != "planted":
        raise ConfigError(f"Task {task.id} has no teacher, so its best allocation is unknown.")
    return load_task(task).changes


@torch.no_grad()
def _loss(task: FineTuneTask, ranks: list[int]) -> float:
    """Divergence from the teacher of the base with each change at a given rank, in nats."""
    data = load_task(task)
    model, targets = adapted_base(task.base)
    with changed_weights(targets, data.changes, ranks), model.disable_adapter():
        return data.held_out_loss(model)
