"""Monitoring of steps in parts: a known loss must stay known, and under any other loss real batches are tested.

Users may ask for parts under any loss. The first batches say nothing about rare cases, so each batch with something new
is tested before its step: a new class, a larger weight, more padding, fewer rows.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ...cost.batch_shape import Batch
from ...lora.resize import gradient_nodes
from .batch_rows import BatchRows
from .exact_parts import TESTED_ROWS, difference_of
from .known_losses import HOOKS, foreign_modes
from .plan_keeper import PlanKeeper
from .run import TrainingRun

LOOK_EVERY = 100
"""Steps between checks of the modules of a model with a known loss; a new hook is noticed at once."""

CHANCE = 1 / 400
"""Probability of testing a step without anything new."""

MOST_VALUES = 64
"""Maximum number of distinct values remembered per tensor; one with more is assumed to hold token ids."""


NEAREST = 32
"""Number of operators that identify how a loss is computed."""

_LAYOUT = re.compile(r"(Unsafe|Reshape)?(View|Alias)|Reshape|Transpose|Permute|T|Clone|Expand|(Un)?[Ss]queeze")
"""Operators that compute nothing; torch may use different ones in a measured step."""


def way_of(loss: torch.Tensor) -> int:
    """Hash how a loss is computed, by the names of the operators nearest to it in autograd's graph."""
    names, found = list[str](), deque([loss.grad_fn])
    while found and len(names) < NEAREST:
        if (node := found.popleft()) is not None:
            if not _LAYOUT.fullmatch(name := node.name().partition("Backward")[0]):
                names.append(name)
            found.extend(before for before, _ in node.next_functions)
    return hash(tuple(names))


class Known:
    """Detects when a known loss becomes another one.

    Args:
        run: the run with this loss.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._seen: tuple[int, ...] | None = None

    def reason(self, step: int, batches: Sequence[Batch]) -> str:
        """Return why batches may no longer run in parts, for people; empty if they may.

        Args:
            step: the number of optimizer steps done.
            batches: the batches of the next step.
        """
        own = [vars(module) for module in self._run.model.modules()]
        trains = {name: each for name, each in self._run.model.named_parameters() if each.requires_grad}
        seen = (
            len(own),
            hash(tuple(id(hook) for each in own for kept in HOOKS for hook in each[kept].values())),
            hash(tuple(id(each.get(name)) for each in own for name in ("forward", "_loss_function"))),
            sum(bool(each._backward_hooks or each._post_accumulate_grad_hooks) for each in trains.values()),
            hash(tuple(map(sys.getrefcount, gradient_nodes(trains).values()))),
            id(functional.cross_entropy),
            len(foreign_modes()),
        )
        looks, self._seen = seen != self._seen or step % LOOK_EVERY == 0, seen
        return self._run.unknown() if looks else self._run.foreign()

    def hear(self, step: int, loss: torch.Tensor) -> None:
        """Take the first loss of a step; a known loss needs no further check."""


class Watch:
    """Tests a run's batches in their parts, under an unknown loss.

    Args:
        keeper: keeps the plan, and knows its run.
        rows_of: returns the rows of a batch; None if they cannot be separated.
        plan: returns the parts of some rows, as indices of examples.
        fits: returns True if all rows of a batch fit as a whole.
        kind: how the loss combines its rows, one of `SHARES`.
        seed: seed of the choice of steps tested at random.
    """

    def __init__(
        self,
        keeper: PlanKeeper,
        rows_of: Callable[[Batch], BatchRows | None],
        plan: Callable[[BatchRows], list[Sequence[int]]],
        fits: Callable[[BatchRows], bool],
        kind: str,
        seed: int,
    ) -> None:
        self._keeper, self._rows_of, self._plan, self._fits = keeper, rows_of, plan, fits
        self._kind = kind
        self._news, self._asked, self._heard = News(seed), False, -1
        self._ways: set[int] = set()  # ways of computing losses so far, and modes of the model

    def reason(self, step: int, batches: Sequence[Batch]) -> str:
        """Test the batches that are due; return why they may not run in parts, for people, else nothing.

        Args:
            step: the number of optimizer steps done.
            batches: the batches of the next step.
        """
        keeper = self._keeper
        checkpointing, layers = keeper.checkpointing, keeper.checkpointed
        for batch in batches:
            rows = self._rows_of(batch)
            parts = self._plan(rows) if rows else []
            if rows is None or (len(parts) == 1 and rows.part(parts[0]) is batch):
                continue
            if not self._news.due(step, rows, parts) and not self._asked:
                continue
            self._asked = False
            if not self._fits(rows):
                rows, parts = self._some(rows)
            tested = partial(difference_of, keeper.run, keeper.applier.targets, rows, parts, kind=self._kind, seed=step)
            try:
                if checkpointing:
                    checkpointing.all()
                    checkpointing.before_step()
                if reason := keeper.run.measured(tested):
                    return reason
            except torch.OutOfMemoryError:
                keeper.run.warn("A batch of step %d ran out of memory while its parts were tested.", step + 1)
            finally:
                if checkpointing:
                    checkpointing.take(layers)
        return ""

    def _some(self, rows: BatchRows) -> tuple[BatchRows, list[Sequence[int]]]:
        """Return as many rows of a batch as fit as a whole, of all lengths, in two parts."""
        order, cuts = np.argsort(rows.lengths, kind="stable"), self._keeper.run.cuts
        for count in range(rows.examples - 1, TESTED_ROWS - 1, -1):
            chosen = order[np.linspace(0, rows.examples - 1, count).round().astype(int)]
            some = BatchRows.of(rows.part(sorted(chosen.tolist())), cuts, rows.each)
            if self._fits(some):
                break
        longest = np.argsort(-some.lengths, kind="stable")
        return some, [sorted(part.tolist()) for part in np.array_split(longest, 2)]

    def hear(self, step: int, loss: torch.Tensor) -> None:
        """Schedule a test of the next batch if the first loss of a step is computed in a way new to this run."""
        if step == self._heard:
            return
        ways = {way_of(loss), hash(tuple(module.training for module in self._keeper.run.model.modules()))}
        self._asked |= bool(self._ways) and not ways <= self._ways
        self._ways, self._heard = self._ways | ways, step


class News:
    """Detects batches with something new, and draws some others at random.

    Args:
        seed: seed of the random draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._first = seed, True
        self._values: dict[str, set[Any]] = {}
        self._ranges: dict[str, tuple[float, float]] = {}

    def due(self, step: int, rows: BatchRows, parts: Sequence[Sequence[int]]) -> bool:
        """Return True if a batch must be tested before it runs: the first, those with something new, some at random.

        Args:
            step: an index of the batch.
            rows: the rows of the batch.
            parts: the indices of their examples.
        """
        new = self._learns(rows, parts)
        first, self._first = self._first, False
        return new or first or np.random.default_rng([self._seed, step]).random() < CHANCE

    def _learns(self, rows: BatchRows, parts: Sequence[Sequence[int]]) -> bool:
        """Return True if a batch holds anything new, and remember it."""
        new = False
        for name, value in _held(rows, parts):
            if isinstance(value, set):
                before = self._values.setdefault(name, set())
                if len(before) <= MOST_VALUES and not value <= before:
                    before |= value
                    new |= len(before) <= MOST_VALUES
            else:
                low, high = self._ranges.get(name, (np.inf, -np.inf))
                new |= value[0] < low or value[1] > high
                self._ranges[name] = min(low, value[0]), max(high, value[1])
        return new


def _held(rows: BatchRows, parts: Sequence[Sequence[int]]) -> Iterator[tuple[str, set[Any] | tuple[float, float]]]:
    """Yield the contents of a batch by name of tensor or list: some values, or the minimum and maximum."""
    yield "rows of a part", (min(map(len, parts)), rows.examples)
    for name, value in rows.named():
        if not isinstance(value, torch.Tensor):
            yield name, {each for each in value if isinstance(each, str | int | float | None)}
        elif value.is_floating_point() and value.numel():
            low, high = value.detach().aminmax()
            yield name, (float(low), float(high))
        elif not value.is_complex() and not value.is_floating_point():
            found = torch.unique(value)
            yield name, set(found[: MOST_VALUES + 1].tolist())
