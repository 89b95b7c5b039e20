"""The factor s in delta W = s B A, and how it depends on the rank.

At a constant s a module learns faster the more rank it has: under Adam each of its r components takes steps of the same
size. At a constant alpha, s = alpha / r, the best learning rate hardly depends on the rank (docs/scaling.md). So alpha
stays when a rank changes, as PEFT's `rank_pattern` has it: s is alpha / r, and alpha / sqrt(r) under `use_rslora`
(Kalajdzievski, 2023, arXiv:2312.03732).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .ladder import REFERENCE_RANK
from .scaling_names import Scaling
from .targets import CONSTANT_SCALING, TargetModule


def choose_scaling(targets: Sequence[TargetModule], scaling: Scaling) -> None:
    """Say what stays when the ranks of these modules change. It changes nothing now."""
    for target in targets:
        names: set[str] = target.layer.__dict__.setdefault(CONSTANT_SCALING, set())
        (names.add if scaling == "constant" else names.discard)(target.adapter)


@contextmanager
def reference_scaling(targets: Sequence[TargetModule]) -> Iterator[None]:
    """Let modules have the scaling of `REFERENCE_RANK` meanwhile, whatever their rank; no rank may change.

    Probes compare modules, so all have one scaling there.
    """
    before = [target.scaling for target in targets]
    for target in targets:
        target.layer.scaling[target.adapter] = target.scaling_at(REFERENCE_RANK)
    try:
        yield
    finally:
        for target, scaling in zip(targets, before, strict=True):
            target.layer.scaling[target.adapter] = scaling
