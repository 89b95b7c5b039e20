"""One run among stacked adapters, behind the same contract as a PEFT model's adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...common.arrays import FloatArray, IntArray
from ..signals import SIGNALS, pair_signals
from ..targets import TargetModule
from .adapters import StackedAdapters
from .resize import Move


class StackedMeter:
    """The signals of one run; see `SignalMeter`.

    Args:
        adapters: all runs.
        row: which one.
        base_norms: norm of each frozen weight, fp64 (modules,).

    Attributes:
        values: the latest signals, float64 (modules, len(SIGNALS)).
        age: decisions since each module's values were fresh, int64 (modules,).
    """

    def __init__(self, adapters: StackedAdapters, row: int, base_norms: torch.Tensor) -> None:
        modules = len(adapters.targets)
        self.values: FloatArray = np.full((modules, len(SIGNALS)), np.nan)
        self.age: IntArray = np.zeros(modules, dtype=np.int64)
        self._adapters, self._row, self._base_norms = adapters, row, base_norms
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._count = 0
        self._squares = np.zeros(len(self._adapters.targets))
        self._adapters.sums[self._row] = 0

    def accumulate(self, squares: FloatArray) -> None:
        """Take in the gradients of one step, which the adapters hold; non-finite ones are left out.

        Args:
            squares: squared norm of the gradients of each B, (modules,).
        """
        accumulate_all([self], squares[None])

    @torch.no_grad()
    def read(self) -> FloatArray:
        """Close the interval: update `values` and `age`."""
        adapters, row = self._adapters, self._row
        live = adapters.ranks[row] > 0
        if self._count and live.any():
            factors, sums = [], []
            weights, totals = adapters.pairs(adapters.weights), adapters.pairs(adapters.sums)
            for index in np.flatnonzero(live):
                rank = int(adapters.ranks[row, index])
                a, b = weights[index]
                factors.append((a[row, :rank], b[row, :rank].mT))
                sums.append(totals[index][1][row, :rank].mT)
            scalings = [target.scaling for target, on in zip(adapters.targets, live, strict=True) if on]
            squares = torch.from_numpy(self._squares[live]).to(adapters.device)
            signals = pair_signals(factors, scalings, sums, squares, self._count, self._base_norms[live])
            self.values[live] = signals.double().cpu().numpy()
        self.age = np.where(live & (self._count > 0), 0, self.age + 1)
        self.restart()
        return self.values


def accumulate_all(meters: Sequence[StackedMeter], squares: FloatArray) -> None:
    """`StackedMeter.accumulate` for several runs of the same adapters at once.

    Args:
        meters: of the runs.
        squares: (len(meters), modules).
    """
    sound = [(meter, own) for meter, own in zip(meters, squares, strict=True) if np.isfinite(own).all()]
    for meter, own in sound:
        meter._squares += own
        meter._count += 1
    if sound:
        meters[0]._adapters.add_to_sums([meter._row for meter, _ in sound])


class StackedRun:
    """The adapters of one run.

    Args:
        adapters: all runs.
        row: which one.
        base_norms: norm of each frozen weight, fp64 (modules,).

    Attributes:
        meter: reads its signals.
        move: a change of rank that has been decided and is still to be made, together with those of other runs.
    """

    def __init__(self, adapters: StackedAdapters, row: int, base_norms: torch.Tensor) -> None:
        self.row = row
        self.meter = StackedMeter(adapters, row, base_norms)
        self.move: Move | None = None
        self._adapters = adapters

    @property
    def targets(self) -> Sequence[TargetModule]:
        """Names, shapes and scaling of the target modules."""
        return self._adapters.targets

    @property
    def ranks(self) -> IntArray:
        """Ranks as decided, int64 (modules,)."""
        return self.move.ranks if self.move else self._adapters.ranks[self.row].copy()

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """Note a change, which `set_stacked_ranks` makes for many runs at once."""
        self.move = Move(self.row, ranks, seed, step)
        self.meter.restart()

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Names of modules that hold NaN or infinity."""
        adapters = self._adapters
        held = (adapters.weights, adapters.first, adapters.second)
        if all(bool(torch.isfinite(buffer[self.row].sum())) for buffer in held):
            return []
        pairs = zip(*(adapters.pairs(buffer) for buffer in held), strict=True)
        return [
            target.name
            for target, sides in zip(adapters.targets, pairs, strict=True)
            if not all(bool(torch.isfinite(side[self.row]).all()) for pair in sides for side in pair)
        ]
