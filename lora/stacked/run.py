"""One run of stacked adapters, with the interface of a PEFT model's adapters (`lora.adapters.Adapters`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...common.arrays import FloatArray, IntArray
from ..ladder import REFERENCE_RANK
from ..signals import Meter, pair_signals
from .adapters import StackedAdapters
from .resize import Move


class StackedMeter(Meter):
    """Measures the signals of one run, a row of the adapters; `base_norms` as in `pair_signals`."""

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
    """Add the gradients of one step, which are in the adapters' buffer; ignore the steps of runs that are not finite.

    Args:
        meters: the meters of several runs of the same adapters.
        squares: squared norm of the gradient of each B in each run, (len(meters), modules).
    """
    finite = [(meter, row) for meter, row in zip(meters, squares, strict=True) if np.isfinite(row).all()]
    for meter, row in finite:
        meter._squares += row
        meter._count += 1
    if finite:
        meters[0]._adapters.add_to_sums([meter._row for meter, _ in finite])


class StackedRun:
    """The adapters of one run, a row of all of them; `base_norms` as in `pair_signals`.

    Attributes:
        meter: measures its signals.
        targets: the target modules: names, shapes, scaling.
        move: a decided change of rank that `set_stacked_ranks` has not made yet; None if there is none.
    """

    def __init__(self, adapters: StackedAdapters, row: int, base_norms: torch.Tensor) -> None:
        self.row = row
        self.meter: StackedMeter = StackedMeter(adapters, row, base_norms)
        self.move: Move | None = None
        self.targets = adapters.targets
        self._adapters = adapters

    @property
    def ranks(self) -> IntArray:
        """The ranks after `move`, int64 (modules,)."""
        return self.move.ranks if self.move else self._adapters.ranks[self.row].copy()

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """Set `move`; the caller makes it with `set_stacked_ranks`, for many runs at once."""
        self.move = Move(self.row, ranks, seed, step)
        self.meter.restart()

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Names of modules whose factors or moments hold NaN or infinity."""
        adapters = self._adapters
        buffers = (adapters.weights, adapters.first, adapters.second)
        if all(bool(torch.isfinite(buffer[self.row].sum())) for buffer in buffers):
            return []
        pairs = zip(*(adapters.pairs(buffer) for buffer in buffers), strict=True)
        return [
            target.name
            for target, sides in zip(adapters.targets, pairs, strict=True)
            if not all(bool(torch.isfinite(side[self.row]).all()) for pair in sides for side in pair)
        ]
