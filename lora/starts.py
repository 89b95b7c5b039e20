"""Directions that adapters begin with by their user's choice, kept where the first plan gives modules another rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .resize import is_trained
from .targets import TargetModule, unwrap

_BY_IMPORTANCE = "eva"
"""PEFT's name of starts whose rows of A are sorted, the most important one first (EVA, arXiv 2410.07170)."""

_DEFAULT = (True, False)


@contextmanager
def start_kept(
    model: torch.nn.Module, targets: Sequence[TargetModule], fresh: bool, note: Callable[[str], None]
) -> Iterator[None]:
    """Let adapters that have not trained keep what EVA chose for them, whatever ranks they get inside.

    A module has as many of its rows of A as its new rank allows, and random ones beyond; the function stays. Other
    starts than PEFT's default give way to it, which is told.

    Args:
        model: holds the adapters.
        targets: the target modules.
        fresh: keep nothing, since adapters are to begin anew.
        note: tells a line.
    """
    start = unwrap(model).peft_config[targets[0].adapter].init_lora_weights
    if start in _DEFAULT or (not fresh and any(map(is_trained, targets))):
        yield
        return
    if fresh or start != _BY_IMPORTANCE:
        yield
        note(f"This run begins with PEFT's default directions, in place of those of init_lora_weights={start!r}.")
        return
    rows = [target.weight_a.detach().clone() for target in targets]
    yield
    with torch.no_grad():
        for target, before in zip(targets, rows, strict=True):
            count = min(target.rank, len(before))
            target.weight_a[:count] = before[:count]
