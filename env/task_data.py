"""The fine-tune that a proxy task describes: its model, batches, losses, held-out rows, and its best allocation.

Models are trained on windows of bytes. `labels[..., t]` is what the logits at position t should predict, IGNORED where
nothing is asked, so causal and masked language models, and classification by a label byte, share one loss.

The teacher of a planted task is the base plus low-rank changes on a random subset of its modules. So two things are
known without training:

* the *utility* of a rank on a module: how much the teacher's divergence falls if the module's change is undone, times
  the share of the change that the rank captures. Utilities add up nearly, so `best_plan` finds the oracle's plan;
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
from ..cost.cost import ParameterCost
from ..data.batches import IGNORED
from ..data.corpora import load_corpus, load_labelled, sample_windows
from ..errors import ConfigError
from ..lora.targets import TargetModule
from ..plan.problem import AllocationProblem, best_plan
from .bases import MASK_TOKEN, ProxyBase, adapted_base, find_base
from .tasks import FineTuneTask

MASK_SHARE = 0.2
"""Share of the bytes that a masked language model has to fill in."""

FIRST_CLASS = ord("0")
"""Label byte of class 0; the classes follow one another."""

Inputs = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, int64 (rows, length) each."""


def language_inputs(base: ProxyBase, windows: torch.Tensor, generator: np.random.Generator) -> Inputs:
    """What a base reads and predicts of windows of text: the next byte, or the bytes hidden from it.

    Args:
        base: decides which.
        windows: int64 (rows, length).
        generator: hides bytes.
    """
    if base.masked:
        hidden = torch.from_numpy(generator.random(windows.shape) < MASK_SHARE)
        return windows.masked_fill(hidden, MASK_TOKEN), windows.masked_fill(~hidden, IGNORED)
    labels = torch.full_like(windows, IGNORED)
    labels[:, :-1] = windows[:, 1:]
    return windows, labels


def class_inputs(base: ProxyBase, windows: torch.Tensor, classes: torch.Tensor) -> Inputs:
    """Windows that end in a question: the byte of the class is to be predicted at the last position.

    So no new layer is needed (a verbaliser; Schick and Schütze, 2021, arXiv 2001.07676).

    Args:
        base: reads MASK_TOKEN there if it fills in masked bytes, else a line feed.
        windows: int64 (rows, length); the last byte is overwritten.
        classes: int64 (rows,), from 0.
    """
    inputs, labels = windows.clone(), torch.full_like(windows, IGNORED)
    inputs[:, -1] = MASK_TOKEN if base.masked else ord("\n")
    labels[:, -1] = FIRST_CLASS + classes
    return inputs, labels


def label_terms(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats at each position, (rows, length); 0 where nothing is asked.

    Args:
        logits: (rows, length, vocabulary).
        labels: int64 (rows, length).
    """
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def label_mean(terms: torch.Tensor, labels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """The mean of `label_terms` over the predictions of each group, (groups,)."""
    counts = (labels != IGNORED).view(groups, -1).sum(dim=1)
    return terms.view(groups, -1).sum(dim=1) / counts.clamp_min(1)  # 0 where nothing is asked


def label_loss(logits: torch.Tensor, labels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Mean cross-entropy in nats for each prediction, shape (groups,).

    Args:
        logits: (groups * rows, length, vocabulary).
        labels: int64 (groups * rows, length), at least one prediction in each group.
        groups: how many runs share the batch, one after another.
    """
    return label_mean(label_terms(logits, labels), labels, groups)


def divergence_terms(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats at each position, (..., rows, length).

    Args:
        logits: the student's, (..., rows, length, vocabulary).
        teacher: log-probabilities, (rows, length, vocabulary).
    """
    student = torch.log_softmax(logits, dim=-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def divergence(logits: torch.Tensor, teacher: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Mean KL(teacher || student) in nats a position, shape (groups,).

    Args:
        logits: the student's, (groups * rows, length, vocabulary).
        teacher: log-probabilities for all groups, (rows, length, vocabulary).
        groups: how many runs share the batch, one after another.
    """
    return divergence_terms(torch.unflatten(logits, 0, (groups, -1)), teacher).view(groups, -1).mean(dim=1)


EVAL_BATCH = 64
"""Rows of a forward pass without gradients."""

CACHED_TASKS = 32
"""Tasks whose data a process holds, of 20 MB each with a teacher; where more run side by side, they are drawn again."""

DENSITY = (0.15, 0.5)
"""Share of the modules that a teacher changes, drawn between these."""

RANKS = (1, 8)
"""Rank of a change, drawn between these, both included."""

STRENGTH = 0.35
"""Norm of a change over the norm of the weight."""


# Teachers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Change:
    """One planted change of a weight.

    Attributes:
        name: the module.
        left: (d_out, rank), with the singular values of the change; columns of falling norm.
        right: (rank, d_in), orthonormal rows.
    """

    name: str
    left: torch.Tensor
    right: torch.Tensor

    def truncated(self, rank: int) -> torch.Tensor:
        """Its best approximation of a rank, (d_out, d_in)."""
        return self.left[:, :rank] @ self.right[:rank]

    @property
    def energy(self) -> list[float]:
        """Share of its squared norm that each component holds, falling, (rank,)."""
        squares = self.left.square().sum(dim=0)
        shares: list[float] = (squares / squares.sum()).tolist()
        return shares


def draw_changes(targets: Sequence[TargetModule], placement: str, generator: np.random.Generator) -> list[Change]:
    """Changes of rank 1 to 8 on 15 to 50 % of the modules.

    Args:
        targets: of the base, whose weights must be its own.
        placement: "low" or "high" for the lower or upper half of the layers, "spread" for all of them.
        generator: draws everything.
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
    # The same change by its singular values: right = l q with q orthonormal, left l = u s v.
    q, upper = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(left @ upper.mT, full_matrices=False)
    s *= STRENGTH * float(target.layer.get_base_layer().weight.norm()) / s.norm()
    return Change(target.name, (u * s).float(), (vh @ q.mT).float())


@contextmanager
def changed_weights(
    targets: Sequence[TargetModule], changes: Sequence[Change], ranks: Sequence[int] | None = None
) -> Iterator[None]:
    """The base with changes added to its weights, each at a rank (in full without them); undone afterwards."""
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
    """Everything that a task's episodes share.

    Attributes:
        inputs: token ids, int64 (steps, batch_size, length).
        labels: what the logits at each position should predict, or IGNORED; of the same shape.
        teacher: a teacher's log-probabilities for them, float32 (steps, batch, length, vocabulary), or None.
        held_out_inputs: int64 (eval_rows, length).
        held_out_labels: of the same shape.
        held_out_teacher: float32 (eval_rows, length, vocabulary), or None.
        changes: what the teacher has and the base does not; empty without a teacher.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor | None
    held_out_inputs: torch.Tensor
    held_out_labels: torch.Tensor
    held_out_teacher: torch.Tensor | None
    changes: tuple[Change, ...]

    def train_losses_of(self, logits: torch.Tensor, step: int, rows: int | None = None, runs: int = 1) -> torch.Tensor:
        """Loss of the answers of some runs to the batch of one step, or to its first rows, in nats, (runs,).

        Args:
            logits: of one run after another, (runs * rows, length, vocabulary).
            step: number of the batch.
            rows: how many, None for all.
            runs: how many.
        """
        if self.teacher is None:
            return label_loss(logits, self.labels[step, :rows].repeat(runs, 1).to(logits.device), runs)
        return divergence(logits, self.teacher[step, :rows].to(logits.device), runs)

    @property
    def predicted(self) -> float:
        """Share of the tokens whose prediction the loss counts; a teacher's answers count at all of them."""
        return 1.0 if self.teacher is not None else float((self.labels != IGNORED).float().mean())

    @torch.no_grad()
    def held_out_loss(self, model: torch.nn.Module) -> float:
        """Loss on the held-out set, in nats."""
        parts = torch.split(self.held_out_inputs, EVAL_BATCH)
        terms = [self.held_out_terms(model(input_ids=part).logits, i * EVAL_BATCH) for i, part in enumerate(parts)]
        return self.mean_of(torch.cat(terms, dim=1)[0])

    def held_out_terms(self, logits: torch.Tensor, start: int, runs: int = 1) -> torch.Tensor:
        """The loss at each position of some of the held-out set, (runs, rows, length), of which `mean_of` is the mean.

        Args:
            logits: answers of one run after another, (runs * rows, length, vocabulary).
            start: number of their first row in the held-out set.
            runs: how many.
        """
        rows = slice(start, start + len(logits) // runs)
        if self.held_out_teacher is None:
            labels = self.held_out_labels[rows].repeat(runs, 1).to(logits.device)
            return torch.unflatten(label_terms(logits, labels), 0, (runs, -1))
        return divergence_terms(torch.unflatten(logits, 0, (runs, -1)), self.held_out_teacher[rows].to(logits.device))

    def mean_of(self, terms: torch.Tensor) -> float:
        """Loss of one run on the held-out set in nats, from that at each position of it, (eval_rows, length)."""
        if self.held_out_teacher is None:
            return float(label_mean(terms, self.held_out_labels.to(terms.device))[0])
        return float(terms.view(1, -1).mean(dim=1)[0])


@lru_cache(maxsize=1024)
def known_of(task: FineTuneTask) -> dict[Hashable, Any]:
    """What episodes of a task have found out, such as its probe; of the tasks that were used last."""
    return {}


def first_problem(task: FineTuneTask) -> AllocationProblem:
    """The plans that a task's first decision allows, before its budget moves."""
    _, targets = adapted_base(task.base)
    cost = base_cost(task.base)
    return AllocationProblem.of(targets, cost, first_limit(task), ranks=np.ones(len(targets), dtype=np.int64))


def first_limit(task: FineTuneTask) -> float:
    """The parameters of a task's mean rank on all modules, at least those of its cheapest module at rank 1."""
    per_rank = base_cost(task.base).per_rank
    return float(max(task.mean_rank * per_rank.sum(), 1.001 * per_rank.min()))


@lru_cache(maxsize=16)
def base_cost(base: str) -> ParameterCost:
    """What plans on a base cost: parameters."""
    return ParameterCost.of(adapted_base(base)[1])


@lru_cache(maxsize=CACHED_TASKS)
def load_task(task: FineTuneTask) -> TaskData:
    """Draw a task's data, and its teacher if it has one; the same task gives the same data."""
    generator = np.random.default_rng(task.seed)
    base, rows = find_base(task.base), task.steps * task.batch_size
    if task.kind == "labels":
        train_rows, held_out_rows = load_labelled(task.corpus)
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


def _labelled(
    base: ProxyBase, texts: list[tuple[bytes, int]], count: int, length: int, generator: np.random.Generator
) -> Inputs:
    """Random windows of random texts, with the byte of their class to be predicted at the end."""
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
    """The ranks that capture most of what was planted within the budget, (modules,).

    Args:
        task: a planted one.
        problem: prices, budget and ladder; current ranks play no part.

    Raises:
        ConfigError: the task has no teacher.
    """
    return best_plan(problem, utilities(task, problem))


def utilities(task: FineTuneTask, problem: AllocationProblem) -> FloatArray:
    """What each rung of the ladder is worth on each module, in nats, (modules, rungs)."""
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
    """The divergence of the teacher from itself without each of its changes, in nats."""
    ranks = [change.left.shape[1] for change in _changes(task)]
    return [max(_loss(task, [*ranks[:index], 0, *ranks[index + 1 :]]), 0.0) for index in range(len(ranks))]


def _changes(task: FineTuneTask) -> tuple[Change, ...]:
    if task.kind != "planted":
        raise ConfigError(f"Task {task.id} has no teacher, so its best allocation is not known.")
    return load_task(task).changes


@torch.no_grad()
def _loss(task: FineTuneTask, ranks: list[int]) -> float:
    """Divergence of the base with each change at some rank from the teacher, in nats."""
    data = load_task(task)
    model, targets = adapted_base(task.base)
    with changed_weights(targets, data.changes, ranks), model.disable_adapter():
        return data.held_out_loss(model)
