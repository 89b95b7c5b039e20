"""Watches steps in parts under a loss that nobody knows: real batches are tested in their real parts during the run.

A user who asks for parts has them under any loss. What the first batches hold tells nothing of what is rare, so a batch
is tested before its step runs where it shows something new: a class, a weight above all others, padding, fewer rows.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .batch_rows import BatchRows

CHANCE = 1 / 150
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


class Watch:
    """Decides which batches of a run are tested.

    Args:
        seed: of the steps that are tested at random.

    Attributes:
        seed: as above.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._tested, self._asked, self._heard = seed, False, False, -1
        self._ways: set[int] = set()  # in which losses were computed, with the modes of the model
        self._values: dict[str, set[Any]] = {}
        self._ranges: dict[str, tuple[float, float]] = {}

    def due(self, step: int, rows: BatchRows, parts: Sequence[Sequence[int]]) -> bool:
        """Whether a batch is to be tested before it runs: the first, one with something new, and some at random.

        Args:
            step: the optimizer steps done.
            rows: of the batch.
            parts: the places of their examples.
        """
        new = self._learns(rows, parts)
        at_random = np.random.default_rng([self.seed, step]).random() < CHANCE
        due = new or at_random or self._asked or not self._tested
        self._tested, self._asked = True, False
        return due

    def hear(self, step: int, loss: torch.Tensor, model: nn.Module) -> None:
        """Have the next batch tested where the first loss of a step is computed in a way that is new in this run."""
        if step == self._heard:
            return
        ways = {way_of(loss), hash(tuple(module.training for module in model.modules()))}
        self._asked |= bool(self._ways) and not ways <= self._ways
        self._ways, self._heard = self._ways | ways, step

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
            found = value.unique()
            yield name, set(found[: MOST_VALUES + 1].tolist())
