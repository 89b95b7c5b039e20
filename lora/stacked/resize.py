"""Changes of rank in stacked adapters: what `lora.ranks.set_ranks` does to one model, for several runs at once.

The same maps, the same fresh directions and the same rules for Adam's state, on slices of the stacked buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from ...common.arrays import IntArray
from ..factors import BEFORE_THE_RUN, fresh_directions, growth_generator, shrink_maps
from ..optimizer_state import StateMap
from .adapters import StackedAdapters


@dataclass(frozen=True, eq=False)
class Move:
    """New ranks of one run.

    Attributes:
        row: the run.
        ranks: int64 (modules,).
        seed: with `step` and the module's name, decides fresh directions.
        step: optimiser steps done.
    """

    row: int
    ranks: IntArray
    seed: int
    step: int


@torch.no_grad()
def reset_runs(adapters: StackedAdapters, seeds: Mapping[int, int]) -> None:
    """Give these runs fresh adapters of rank 1 everywhere, as `lora.ranks.reset_adapters` does.

    Args:
        adapters: all runs.
        seeds: by run.
    """
    rows = list(seeds)
    for buffer in (adapters.weights, adapters.first, adapters.second):
        buffer[rows] = 0
    adapters.ranks[rows], adapters.ages[rows] = 1, 0
    adapters.make_room(adapters.ranks)
    adapters.forget_segments()
    pairs = adapters.pairs(adapters.weights)
    for row, seed in seeds.items():
        for (a, _), target in zip(pairs, adapters.targets, strict=True):
            a[row, :1], _ = fresh_directions(target, 1, growth_generator(seed, BEFORE_THE_RUN, target.name))


@torch.no_grad()
def set_stacked_ranks(adapters: StackedAdapters, moves: Sequence[Move]) -> None:
    """Give several runs new ranks.

    Args:
        adapters: all runs.
        moves: one for each run that changes.
    """
    before = adapters.ranks.copy()
    after = before.copy()
    for move in moves:
        after[move.row] = move.ranks
    adapters.make_room(np.maximum(before, after))
    change = _Change(adapters)
    shrinking = []
    for move in moves:
        for module in np.flatnonzero(before[move.row] != after[move.row]).tolist():
            old, new = int(before[move.row, module]), int(after[move.row, module])
            if new == 0:
                change.drop(move.row, module, old)
            elif new < old:
                shrinking.append((old, new, module, move))
            else:
                change.grow(move, module, old, new)
    shrinking.sort(key=lambda item: item[:2])
    for (old, new), alike in groupby(shrinking, key=lambda item: item[:2]):
        change.shrink([(module, move) for _, _, module, move in alike], old, new)
    adapters.ranks[:] = after
    adapters.make_room(after)
    adapters.forget_segments()


class _Change:
    """Changes in the buffers; ranks are counted by the caller."""

    def __init__(self, adapters: StackedAdapters) -> None:
        self._adapters = adapters
        buffers = (adapters.weights, adapters.first, adapters.second)
        self._weights, self._first, self._second = (adapters.pairs(buffer) for buffer in buffers)

    def drop(self, row: int, module: int, rank: int) -> None:
        """To rank 0, and forget the state."""
        for pairs in (self._weights, self._first, self._second):
            for side in pairs[module]:
                side[row, :rank] = 0

    def grow(self, move: Move, module: int, old: int, new: int) -> None:
        """Add directions: A random, B zero; the second moment of B starts at the mean of the old directions."""
        row, target = move.row, self._adapters.targets[module]
        rows, _ = fresh_directions(target, new - old, growth_generator(move.seed, move.step, target.name))
        self._weights[module][0][row, old:new] = rows
        if old:
            second = self._second[module][1][row]
            second[old:new] = second[:old].mean(dim=0)
        else:
            self._adapters.ages[row, module] = 0

    def shrink(self, moves: Sequence[tuple[int, Move]], old: int, new: int) -> None:
        """To the best approximation of rank `new`; every pair has rank `old`."""
        pairs = [[side[move.row, :old].double() for side in self._weights[module]] for module, move in moves]
        maps = shrink_maps([a for a, _ in pairs], [b.mT for _, b in pairs], new)
        for index, ((module, move), (a, b)) in enumerate(zip(moves, pairs, strict=True)):
            p, q, live = maps.p[index], maps.q[index], maps.live[index]
            factors = [q @ a, p.mT @ b]
            fresh = None if bool(live.all()) else ~live
            if fresh is not None:
                target = self._adapters.targets[module]
                generator = growth_generator(move.seed, move.step, target.name)
                factors[0][fresh] = fresh_directions(target, int(fresh.sum()), generator)[0].to(factors[0])
                factors[1][fresh] = 0
            changes = (StateMap(0, new, p.mT, fresh, "zero"), StateMap(0, new, q, fresh, "mean"))
            for side, (factor, change) in enumerate(zip(factors, changes, strict=True)):
                self._put(self._weights[module][side][move.row], old, factor)
                for moments, second in ((self._first, False), (self._second, True)):
                    moment = moments[module][side][move.row]
                    self._put(moment, old, change.apply(moment[:old], second=second))

    @staticmethod
    def _put(place: torch.Tensor, old: int, value: torch.Tensor) -> None:
        place[: len(value)] = value
        place[len(value) : old] = 0
