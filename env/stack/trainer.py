"""Train many short fine-tunes at once on one frozen base.

Losses, signals and rank changes equal those of a PEFT model (tests/env/stack compares them); only the arithmetic is
batched.

Runs are trained and evaluated in the order of their lowest adapters. A run computes nothing below its lowest adapter:
it joins the batch there, with hidden states computed once by the frozen model for all runs of its task. Losses are
bit-identical to those of a batch with all runs from the first block on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from ...common.arrays import IntArray
from ...common.errors import UnsupportedError
from ...lora.spec import ModuleSpec
from ..bases import adapted_base, load_base_model
from ..task_data import TaskData, load_task
from ..tasks import FineTuneTask
from .adapters import StackedAdapters
from .runs import StackedMeter, accumulate_all

FORWARD_TOKENS = 4096
"""Tokens of a forward pass without gradients."""

States = Mapping[int, torch.Tensor]
"""Hidden states entering a block, (rows, length, width), by block."""


class _Reached(Exception):
    """Raised on entering the last requested block."""


class Blocks:
    """The list of blocks containing all target modules of a model.

    Args:
        model: takes `input_ids`. Its blocks take hidden states (rows, length, width) first; their other arguments must
            work for any number of rows.
        targets: target modules of the model.

    Raises:
        UnsupportedError: there is no such list.
    """

    def __init__(self, model: nn.Module, targets: Sequence[ModuleSpec]) -> None:
        self._model = model
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        prefixes = [name for name in lists if all(t.name.startswith(f"{name}.{t.block}.") for t in targets)]
        if not prefixes:
            raise UnsupportedError(
                "Stacked runs require all target modules in one list of blocks, such as `model.layers.3.`; got "
                f"{targets[0].name!r} among them."
            )
        parent, _, self._name = prefixes[0].rpartition(".")
        self._parent = model.get_submodule(parent)
        self._all: nn.ModuleList = getattr(self._parent, self._name)
        self._numbers = np.array([target.block for target in targets])
        self._states: States = {}
        self._seen: dict[int, torch.Tensor] | None = None
        self._last = 0
        for block, module in enumerate(self._all):
            module.register_forward_pre_hook(self._hook(block))

    def _hook(self, block: int) -> Callable[..., tuple[Any, ...] | None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._seen is not None:
                self._seen[block] = args[0]
                if block == self._last:
                    raise _Reached
            if block not in self._states:
                return None
            new = self._states[block]
            return (new if block == min(self._states) else torch.cat([args[0], new]), *args[1:])

        return enter

    def entries(self, ranks: IntArray) -> list[int]:
        """Block of each run's lowest adapter, or the last block for runs without one.

        Args:
            ranks: (runs, modules).
        """
        last = len(self._all) - 1
        return list(np.where(ranks > 0, self._numbers, last).min(axis=1).tolist())

    @torch.no_grad()
    def frozen(self, tokens: torch.Tensor, blocks: Sequence[int]) -> States:
        """Hidden states of the frozen model entering some blocks.

        Args:
            tokens: int64 (rows, length).
            blocks: block numbers from 0, at least one.
        """
        parts = []
        for part in torch.split(tokens, max(1, FORWARD_TOKENS // tokens.shape[1])):
            self._seen, self._last = {}, max(blocks)
            try:
                self._model(input_ids=part)
            except _Reached:
                parts.append(self._seen)
            finally:
                self._seen = None
        return {block: torch.cat([seen[block] for seen in parts]) for block in blocks}

    @contextmanager
    def joined(self, states: States) -> Iterator[torch.Tensor]:
        """Let rows join the batch, those of each block after all earlier ones.

        Args:
            states: states entering each block; the model starts at the lowest one.

        Yields:
            Token ids (1, length) to call the model with; only their length matters.
        """
        first = min(states)
        self._states = states
        setattr(self._parent, self._name, self._all[first:])
        try:
            yield torch.zeros(1, states[first].shape[1], dtype=torch.int64, device=states[first].device)
        finally:
            self._states = {}
            setattr(self._parent, self._name, self._all)


MAX_GRAD_NORM = 1.0
"""Gradient clipping norm, the Trainer's default."""

CACHED_TOKENS = 2560
"""Tokens of a training pass on a CPU: the activations of one layer of the proxy bases fit in a core's cache."""


def parts_of(members: Sequence[Member], size: int) -> list[list[Member]]:
    """Split members into parts of at most `size`, keeping those with the same batch together where they fit."""
    alike: dict[tuple[int, int], list[Member]] = {}
    for member in members:
        alike.setdefault((id(member.data), member.batch), []).append(member)
    parts: list[list[Member]] = [[]]
    for together in alike.values():
        for start in range(0, len(together), size):
            piece = together[start : start + size]
            if len(parts[-1]) + len(piece) > size:
                parts.append([])
            parts[-1] += piece
    return parts


@dataclass(eq=False)
class Member:
    """A member of the stack in training: an episode, a probe or a uniform run.

    Attributes:
        task: task being trained.
        row: row of its adapters.
        step: optimizer steps done.
        until: train up to this step.
        rate: learning rate of each step.
        meter: accumulates gradients.
        rows: number of leading rows of each batch to use.
        failed: True if a loss was not finite.
        losses: losses of the steps.
        alignments: alignments of the steps, if requested; see `StackedAdapters.alignments`.
    """

    task: FineTuneTask
    row: int
    step: int
    until: int
    rate: Callable[[int], float]
    meter: StackedMeter | None
    rows: int | None = None
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    alignments: list[float] | None = None
    data: TaskData = field(init=False)

    def __post_init__(self) -> None:
        self.data = load_task(self.task)  # held here: more tasks can be in training than fit in the task cache

    @property
    def batch(self) -> int:
        """Number of the next batch; a probe may be longer than its task."""
        return self.step % self.task.steps


class FrozenStates:
    """Hidden states below the lowest adapters of a task's runs, shared by all of them.

    They are computed for many steps at a time.

    Args:
        blocks: blocks of the model.
        batches: token ids of consecutive steps, int64 (steps, rows, length).
        wanted: block numbers.
        first: number of the first step.
    """

    def __init__(self, blocks: Blocks, batches: torch.Tensor, wanted: Sequence[int], first: int = 0) -> None:
        self._blocks, self._batches, self._wanted, self._first = blocks, batches, sorted(set(wanted)), first
        self._start, self._end = 0, 0
        self._states: States = {}

    def at(self, step: int) -> States:
        """Hidden states of one step, (rows, length, width) by block."""
        place = step - self._first
        if not self._start <= place < self._end:
            part = self._batches[place : place + max(1, FORWARD_TOKENS // self._batches[0].numel())]
            states = self._blocks.frozen(part.flatten(0, 1), self._wanted)
            self._states = {block: torch.unflatten(each, 0, part.shape[:2]) for block, each in states.items()}
            self._start, self._end = place, place + len(part)
        return {block: each[place - self._start] for block, each in self._states.items()}


def joining(entries: Sequence[int], states: Sequence[torch.Tensor]) -> States:
    """Return the states of runs joining a batch, by block.

    Args:
        entries: block where each run joins, in increasing order.
        states: states of each run, (rows, length, width).
    """
    parts: dict[int, list[torch.Tensor]] = {}
    for block, own in zip(entries, states, strict=True):
        parts.setdefault(block, []).append(own)
    return {block: torch.cat(each) for block, each in parts.items()}


class StackTrainer:
    """Train and evaluate runs of tasks on one base.

    Args:
        base: name of the proxy base.
        runs: number of runs to allocate.
        device: device to train on.

    Attributes:
        adapters: adapters of the runs.
    """

    def __init__(self, base: str, runs: int, *, device: torch.device) -> None:
        targets = adapted_base(base)[1]
        model = load_base_model(base).to(device)
        model.config.use_cache = False  # no text is generated
        self.adapters: StackedAdapters = StackedAdapters(model, targets, runs)
        self._blocks = Blocks(model, targets)
        self._device = device

    # Training ---------------------------------------------------------------------------------------------------------

    def train(self, members: Sequence[Member]) -> None:
        """Train each member to its end; a member with a non-finite loss stops there."""
        if not members:
            return
        entries = self._blocks.entries(self.adapters.ranks)  # ranks are constant here
        states = self._states_of(members, entries)
        tokens = members[0].data.inputs[0, : members[0].rows].numel()
        size = max(1, CACHED_TOKENS // tokens) if self._device.type == "cpu" else len(members)

        def losses_of(active: Sequence[Member]) -> dict[Member, float]:
            losses: dict[Member, float] = {}
            for part in parts_of(active, size):
                part.sort(key=lambda member: entries[member.row])
                losses |= self._joined_losses(part, entries, states)
            return losses

        self._train(members, losses_of)

    def _train(self, members: Sequence[Member], losses_of: Callable[[Sequence[Member]], dict[Member, float]]) -> None:
        while active := [member for member in members if member.step < member.until and not member.failed]:
            losses = losses_of(active)
            for member in active:
                member.losses.append(losses[member])
                member.failed = not math.isfinite(losses[member])
            self._step([member for member in active if not member.failed])

    def _states_of(self, members: Sequence[Member], entries: Sequence[int]) -> dict[Member, FrozenStates]:
        """Frozen states for each member to join the batch with, shared by members with the same batches."""
        alike: dict[tuple[Any, ...], list[Member]] = {}
        for member in members:
            alike.setdefault((member.task, member.step, member.until, member.rows), []).append(member)
        states: dict[Member, FrozenStates] = {}
        for members in alike.values():
            first = members[0]
            numbers = [step % first.task.steps for step in range(first.step, first.until)]
            batches = first.data.inputs[numbers, : first.rows].to(self._device)
            shared = FrozenStates(self._blocks, batches, [entries[member.row] for member in members], first.step)
            states |= dict.fromkeys(members, shared)
        return states

    def _joined_losses(
        self, part: Sequence[Member], entries: Sequence[int], states: Mapping[Member, FrozenStates]
    ) -> dict[Member, float]:
        """Compute losses and gradients of the next batches of some members, in the order of their entries."""
        order = [entries[member.row] for member in part]
        joined = joining(order, [states[each].at(each.step)[at] for each, at in zip(part, order, strict=True)])
        with self.adapters.running([member.row for member in part], order) as model:
            with self._blocks.joined(joined) as tokens:
                logits = model(input_ids=tokens).logits
            losses = self._losses(logits, part)
            self.adapters.backward(losses)
        return dict(zip(part, losses.tolist(), strict=True))

    def _losses(self, logits: torch.Tensor, members: Sequence[Member]) -> torch.Tensor:
        """Loss of each member, (members,), from their concatenated logits."""
        losses, start, rows = [], 0, len(logits) // len(members)
        for _, neighbours in groupby(members, lambda member: (id(member.data), member.batch)):
            alike = list(neighbours)
            end, member = start + rows * len(alike), alike[0]
            losses.append(member.data.train_losses_of(logits[start:end], member.batch, member.rows, len(alike)))
            start = end
        return torch.cat(losses)

    def _step(self, members: Sequence[Member]) -> None:
        """Clip, accumulate signals and step."""
        if not members:
            return
        members = sorted(members, key=lambda member: member.row)  # an index of all rows in order makes no copy
        rows = [member.row for member in members]
        squares = self.adapters.clip(rows, MAX_GRAD_NORM)
        metered = [index for index, member in enumerate(members) if member.meter]
        accumulate_all([member.meter for member in members if member.meter], squares[metered])
        watched = [member for member in members if member.alignments is not None]
        if watched:
            cosines = self.adapters.alignments([member.row for member in watched]).tolist()
            for member, cosine in zip(watched, cosines, strict=True):
                member.alignments.append(cosine)  # type: ignore[union-attr]
        self.adapters.step(rows, [member.rate(member.step) for member in members])
        for member in members:
            member.step += 1

    # Evaluation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, tasks: Mapping[int, FineTuneTask]) -> list[float]:
        """Held-out loss of each of these rows, in nats."""
        entries = self._blocks.entries(self.adapters.ranks)
        losses: dict[int, float] = {}
        for task in dict.fromkeys(tasks.values()):
            rows = sorted((row for row, own in tasks.items() if own == task), key=lambda row: entries[row])
            losses |= dict(zip(rows, self._held_out(task, rows, [entries[row] for row in rows]), strict=True))
        return [losses[row] for row in tasks]

    def _held_out(self, task: FineTuneTask, rows: Sequence[int], order: Sequence[int]) -> list[float]:
        """`held_out` for runs of one task, in the order of their entries."""
        data, runs = load_task(task), len(rows)
        states = self._blocks.frozen(data.held_out_inputs.to(self._device), sorted(set(order)))
        size = max(1, FORWARD_TOKENS // (runs * task.length))
        terms = []
        with self.adapters.running(rows, order) as model:
            for start in range(0, task.eval_rows, size):
                joined = joining(order, [states[entry][start : start + size] for entry in order])
                with self._blocks.joined(joined) as tokens:
                    terms.append(data.held_out_terms(model(input_ids=tokens).logits, start, runs))
        return [data.mean_of(own) for own in torch.cat(terms, dim=1)]
