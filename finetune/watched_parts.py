"""Watches steps in parts: that a known loss stays known, and that real batches have the same gradient under another.

A user who asks for parts has them under any loss. What the first batches hold tells nothing of what is rare, so a batch
is tested before its step runs where it shows something new: a class, a weight above all others, padding, fewer rows.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..cost.batch_shape import Batch
from .batch_rows import BatchRows
from .exact_parts import TESTED_ROWS, difference_of
from .plan_keeper import PlanKeeper
from .run import TrainingRun

LOOK_EVERY = 100
"""Steps from one look at the modules of a model whose loss is known to the next; a new hook is noticed at once."""

CHANCE = 1 / 400
"""Of a step to be tested that shows nothing new."""

MOST_VALUES = 64
"""Different values of a tensor that are remembered; one that has more is taken for token ids."""


NEAREST = 32
"""Operators that tell how a loss is computed."""

_LAYOUT = re.compile(r"(Unsafe|Reshape)?(View|Alias)|Reshape|Transpose|Permute|T|Clone|Expand|(Un)?[Ss]queeze")
"""Operators that compute nothing; torch takes one or another where it measures a step."""


def way_of(loss: torch.Tensor) -> int:
    """A number that tells how a loss is computed: by the names of the operators nearest to it in autograd's graph."""
    names, found = list[str](), deque([loss.grad_fn])
    while found and len(names) < NEAREST:
        if (node := found.popleft()) is not None:
            if not _LAYOUT.fullmatch(name := node.name().partition("Backward")[0]):
                names.append(name)
            found.extend(before for before, _ in node.next_functions)
    return hash(tuple(names))


class Known:
    """Notices where a loss that is known becomes another one.

    Args:
        run: whose loss it is.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._seen: tuple[int, ...] | None = None

    def reason(self, step: int, batches: Sequence[Batch]) -> str:
        """Why batches may not run in parts any more, for people; empty where they may.

        Args:
            step: the optimizer steps done.
            batches: of the step that begins.
        """
        modules = list(self._run.model.modules())
        kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        seen = (
            len(modules),
            sum(len(own[name]) for m in modules if (own := m.__dict__) for name in kept),
            sum("forward" in m.__dict__ or "_loss_function" in m.__dict__ for m in modules),
            sum(bool(p._backward_hooks) for p in self._run.model.parameters() if p.requires_grad),
            id(functional.cross_entropy),
        )
        looks, self._seen = seen != self._seen or step % LOOK_EVERY == 0, seen
        return self._run.unknown() if looks else self._run.foreign()

    def hear(self, step: int, loss: torch.Tensor) -> None:
        """Hear of the first loss of a step, which tells nothing more of a loss that is known."""


class Watch:
    """Tests batches of a run in their parts, whose loss is not known.

    Args:
        keeper: keeps the plan, and knows its run.
        rows_of: the rows of a batch; None where they cannot be told apart.
        plan: the parts of some rows, as places of examples.
        fits: whether all rows of a batch fit as a whole.
        kind: what the loss is of its rows, one of `SHARES`.
        seed: of the steps that are tested at random.
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
        self._ways: set[int] = set()  # in which losses were computed, with the modes of the model

    def reason(self, step: int, batches: Sequence[Batch]) -> str:
        """Why batches may not run in parts, by tests of those that are due, for people; else nothing.

        Args:
            step: the optimizer steps done.
            batches: of the step that begins.
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
                keeper.warn("A batch of step %d ran out of memory in the test of its parts.", step + 1)
            finally:
                if checkpointing:
                    checkpointing.take(layers)
        return ""

    def _some(self, rows: BatchRows) -> tuple[BatchRows, list[Sequence[int]]]:
        """As many rows of a batch as fit as a whole, of all lengths, in two parts."""
        order, cuts = np.argsort(rows.lengths, kind="stable"), self._keeper.run.cuts
        for count in range(rows.examples - 1, TESTED_ROWS - 1, -1):
            chosen = order[np.linspace(0, rows.examples - 1, count).round().astype(int)]
            some = BatchRows.of(rows.part(sorted(chosen.tolist())), cuts, rows.each)
            if self._fits(some):
                break
        longest = np.argsort(-some.lengths, kind="stable")
        return some, [sorted(part.tolist()) for part in np.array_split(longest, 2)]

    def hear(self, step: int, loss: torch.Tensor) -> None:
        """Have the next batch tested where the first loss of a step is computed in a way that is new in this run."""
        if step == self._heard:
            return
        ways = {way_of(loss), hash(tuple(module.training for module in self._keeper.run.model.modules()))}
        self._asked |= bool(self._ways) and not ways <= self._ways
        self._ways, self._heard = self._ways | ways, step


class News:
    """Tells which batches show something new, and draws some others at random.

    Args:
        seed: of those at random.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._first = seed, True
        self._values: dict[str, set[Any]] = {}
        self._ranges: dict[str, tuple[float, float]] = {}

    def due(self, step: int, rows: BatchRows, parts: Sequence[Sequence[int]]) -> bool:
        """Whether a batch is to be tested before it runs: the first, those with something new, some at random.

        Args:
            step: a number of the batch.
            rows: of the batch.
            parts: the places of their examples.
        """
        new = self._learns(rows, parts)
        first, self._first = self._first, False
        return new or first or np.random.default_rng([self._seed, step]).random() < CHANCE

    def _learns(self, rows: BatchRows, parts: Sequence[Sequence[int]]) -> bool:
        """Whether a batch holds what none before it held; it is remembered from now on."""
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
    """What a batch holds by the names of its tensors and lists: some values, or the least and the largest number."""
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
