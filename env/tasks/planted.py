"""Teachers with planted changes, and what the best allocation of rank to them is.

A teacher is a base plus low-rank changes on a random subset of its modules. So the loss that an allocation can reach
is known without training: that of the base plus the best approximation of each change at the rank it is given
(Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ...lora.targets import TargetModule

DENSITY = (0.15, 0.5)
"""Share of the modules that a teacher changes, drawn between these."""

RANKS = (1, 8)
"""Rank of a change, drawn between these, both included."""

STRENGTH = 0.35
"""Norm of a change over the norm of the weight."""


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
