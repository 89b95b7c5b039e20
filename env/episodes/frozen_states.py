"""Hidden states of a task's batches below the lowest adapters of its runs, which all of its runs share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...lora.stacked.blocks import FORWARD_TOKENS, Blocks, States


class FrozenStates:
    """The states of the batches of some steps, computed for many steps at a time.

    Args:
        blocks: of the model.
        batches: token ids of steps that follow one another, int64 (steps, rows, length).
        wanted: the blocks.
        first: number of the first step.
    """

    def __init__(self, blocks: Blocks, batches: torch.Tensor, wanted: Sequence[int], first: int = 0) -> None:
        self._blocks, self._batches, self._wanted, self._first = blocks, batches, sorted(set(wanted)), first
        self._start, self._end = 0, 0
        self._states: States = {}

    def at(self, step: int) -> States:
        """Those of one step, (rows, length, width) by block."""
        place = step - self._first
        if not self._start <= place < self._end:
            part = self._batches[place : place + max(1, FORWARD_TOKENS // self._batches[0].numel())]
            states = self._blocks.frozen(part.flatten(0, 1), self._wanted)
            self._states = {block: torch.unflatten(each, 0, part.shape[:2]) for block, each in states.items()}
            self._start, self._end = place, place + len(part)
        return {block: each[place - self._start] for block, each in self._states.items()}


def joining(entries: Sequence[int], states: Sequence[torch.Tensor]) -> States:
    """The states with which runs join a batch.

    Args:
        entries: the block at which each run joins, in rising order.
        states: of each run, (rows, length, width).
    """
    parts: dict[int, list[torch.Tensor]] = {}
    for block, own in zip(entries, states, strict=True):
        parts.setdefault(block, []).append(own)
    return {block: torch.cat(each) for block, each in parts.items()}
