"""The runs of stacked adapters: one run with the interface of a PEFT model's adapters, and changes of their ranks.

The ranks of several runs change at once. Each run gets the same result as one model under `set_ranks` of
`lora/resize.py`: the same maps, the same fresh directions, the same rules for Adam's state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from ...common.arrays import FloatArray, IntArray
from ...lora.adapters import Meter, pair_signals
from ...lora.optimizer_state import StateMap
from ...lora.resize import BEFORE_THE_RUN, fresh_directions, growth_generator, shrink_maps
from ...lora.spec import REFERENCE_RANK
from .adapters import StackedAdapters


@dataclass(frozen=True, eq=False)
class Move:
    """New ranks of one run.

    Attributes:
        row: row of the run.
        ranks: int64 (modules,).
        seed: seeds the fresh directions, together with `step` and the module's name.
        step: optimizer steps done.
    """

    row: int
    ranks: IntArray
    seed: int
    step: int


@torch.no_grad()
def reset_runs(adapters: StackedAdapters, seeds: Mapping[int, int], *, scaled_as: int = 1) -> None:
    """Give runs fresh rank-1 adapters on every module, as `lora.resize.reset_adapters` does; `seeds` is by run.

    Their scaling is that of rank `scaled_as`: `REFERENCE_RANK` for a probe.
    """
    rows = list(seeds)
    adapters.scalings[rows] = [target.scaling_at(scaled_as) for target in adapters.targets]
    for buffer in (adapters.weights, adapters.first, adapters.second):
        buffer[rows] = 0
    adapters.ranks[rows], adapters.ages[rows] = 1, 0
    adapters.make_room(adapters.ranks)
    adapters.forget_slices()
    pairs = adapters.pairs(adapters.weights)
    for row, seed in seeds.items():
        for (a, _), target in zip(pairs, adapters.targets, strict=True):
            a[row, :1], _ = fresh_directions(target, 1, growth_generator(seed, BEFORE_THE_RUN, target.name))


@torch.no_grad()
def set_stacked_ranks(adapters: StackedAdapters, moves: Sequence[Move]) -> None:
    """Set new ranks in several runs, one move per changed run."""
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
    for (old, new), group in groupby(shrinking, key=lambda item: item[:2]):
        change.shrink([(module, move) for _, _, module, move in group], old, new)
    for row, module in zip(*np.nonzero(before != after), strict=True):
        change.scale(int(row), int(module), int(after[row, module]))
    adapters.ranks[:] = after
    adapters.make_room(after)
    adapters.forget_slices()


class _Change:
    """Changes factors and moments in the buffers; the caller updates `StackedAdapters.ranks`."""

    def __init__(self, adapters: StackedAdapters) -> None:
        self._adapters = adapters
        buffers = (adapters.weights, adapters.first, adapters.second)
        self._weights, self._first, self._second = (adapters.pairs(buffer) for buffer in buffers)

    def drop(self, row: int, module: int, rank: int) -> None:
        """Zero the factors and moments of one pair; `rank` is the old rank."""
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
        """Lower these pairs from rank `old` to their best approximations of rank `new`."""
        targets, scalings = self._adapters.targets, self._adapters.scalings
        pairs = [[side[move.row, :old].double() for side in self._weights[module]] for module, move in moves]
        shares = [scalings[move.row, module] / targets[module].scaling_at(REFERENCE_RANK) for module, move in moves]
        scaled = [b.mT * share for (_, b), share in zip(pairs, shares, strict=True)]
        maps = shrink_maps([a for a, _ in pairs], scaled, new)
        for (module, move), (a, b), p, q, used in zip(moves, pairs, *maps, strict=True):
            factors = [q @ a, p.mT @ b]
            fresh = None if bool(used.all()) else ~used
            if fresh is not None:
                target = self._adapters.targets[module]
                generator = growth_generator(move.seed, move.step, target.name)
                factors[0][fresh] = fresh_directions(target, int(fresh.sum()), generator)[0].to(factors[0])
                factors[1][fresh] = 0
            changes = (StateMap(0, new, p.mT, fresh, "zero"), StateMap(0, new, q, fresh, "mean"))
            for side, (factor, change) in enumerate(zip(factors, changes, strict=True)):
                self._replace(self._weights[module][side][move.row], old, factor)
                for moments, second in ((self._first, False), (self._second, True)):
                    moment = moments[module][side][move.row]
                    self._replace(moment, old, change.apply(moment[:old], second=second))

    def scale(self, row: int, module: int, rank: int) -> None:
        """Set the scaling of a pair to that of its new rank, after its factors changed; the function is preserved."""
        scalings = self._adapters.scalings
        after = self._adapters.targets[module].scaling_at(rank)
        factor = float(after / scalings[row, module])
        scalings[row, module] = after
        self._weights[module][1][row] /= factor
        self._first[module][1][row] *= factor
        self._second[module][1][row] *= factor**2

    @staticmethod
    def _replace(view: torch.Tensor, old: int, value: torch.Tensor) -> None:
        """Write the new components over the first `old` components of a view, and zero the rest."""
        view[: len(value)] = value
        view[len(value) : old] = 0


class StackedMeter(Meter):
    """Meter for the signals of one run, a row of the adapters; `base_norms` as in `pair_signals`."""

    def __init__(self, adapters: StackedAdapters, row: int, base_norms: torch.Tensor) -> None:
        self._adapters, self._row, self._base_norms = adapters, row, base_norms
        super().__init__(len(adapters.targets))

    def restart(self) -> None:
        """See `Meter`."""
        self._count = 0
        self._squares = np.zeros(len(self._adapters.targets))
        self._adapters.sums[self._row] = 0

    @torch.no_grad()
    def _update(self) -> IntArray:
        adapters, row = self._adapters, self._row
        adapted = np.flatnonzero(adapters.ranks[row])
        if len(adapted):
            factors, sums = [], []
            weights, totals = adapters.pairs(adapters.weights), adapters.pairs(adapters.sums)
            for index in adapted:
                rank = int(adapters.ranks[row, index])
                a, b = weights[index]
                factors.append((a[row, :rank], b[row, :rank].mT))
                sums.append(totals[index][1][row, :rank].mT)
            references = [adapters.targets[index].scaling_at(REFERENCE_RANK) for index in adapted]
            scalings = list(zip(adapters.scalings[row, adapted].tolist(), references, strict=True))
            squares = torch.from_numpy(self._squares[adapted]).to(adapters.device)
            signals = pair_signals(factors, scalings, sums, squares, self._count, self._base_norms[adapted])
            self.values[adapted] = signals.double().cpu().numpy()
        return adapted


def accumulate_all(meters: Sequence[StackedMeter], squares: FloatArray) -> None:
    """Accumulate the gradients of one step from the adapters' buffer, skipping runs with non-finite gradients.

    Args:
        meters: meters of several runs of the same adapters.
        squares: squared norm of the gradient of each B in each run, (len(meters), modules).
    """
    finite = [(meter, row) for meter, row in zip(meters, squares, strict=True) if np.isfinite(row).all()]
    for meter, row in finite:
        meter._squares += row
        meter._count += 1
    if finite:
        meters[0]._adapters.add_to_sums([meter._row for meter, _ in finite])


class StackedRun:
    """Adapters of one run, a row of the stack; `base_norms` as in `pair_signals`.

    Attributes:
        meter: measures the run's signals.
        targets: target modules: names, shapes, scaling.
        move: a decided rank change not yet made by `set_stacked_ranks`; None if there is none.
    """

    def __init__(self, adapters: StackedAdapters, row: int, base_norms: torch.Tensor) -> None:
        self.row = row
        self.meter: StackedMeter = StackedMeter(adapters, row, base_norms)
        self.move: Move | None = None
        self.targets = adapters.targets
        self._adapters = adapters

    @property
    def ranks(self) -> IntArray:
        """Ranks after `move`, int64 (modules,)."""
        return self.move.ranks if self.move else self._adapters.ranks[self.row].copy()

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """Set `move`; the caller applies it with `set_stacked_ranks`, for many runs at once."""
        self.move = Move(self.row, ranks, seed, step)
        self.meter.restart()

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Names of modules with NaN or infinity in their factors or moments."""
        adapters = self._adapters
        buffers = (adapters.weights, adapters.first, adapters.second)
        if all(bool(torch.isfinite(buffer[self.row].sum())) for buffer in buffers):
            return []
        pairs = zip(*(adapters.pairs(buffer) for buffer in buffers), strict=True)
        finite = [all(bool(torch.isfinite(side[self.row]).all()) for pair in sides for side in pair) for sides in pairs]
        return [target.name for target, is_finite in zip(adapters.targets, finite, strict=True) if not is_finite]
