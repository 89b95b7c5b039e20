"""What adapters begin with by their user's choice: EVA's directions are kept, and what is not is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .peft_config import pattern_of_user
from .resize import is_trained
from .targets import TargetModule, unwrap

_BY_IMPORTANCE = "eva"
"""PEFT's name of starts whose rows of A are sorted, the most important one first (EVA, arXiv 2410.07170)."""

_DEFAULT = (True, False)

PATTERN = (
    "The rank_pattern of the LoraConfig is where nothing starts, since the policy decides all ranks. "
    "`bounds` pins the rank of a module."
)


@contextmanager
def start_kept(
    model: torch.nn.Module, targets: Sequence[TargetModule], fresh: bool, note: Callable[[str], None]
) -> Iterator[None]:
    """Let adapters that have not trained keep what EVA chose for them, whatever ranks they get inside.

    A module has as many of its rows of A as its new rank allows, and random ones beyond; the function stays. Other
    starts than PEFT's default give way to it, and a `rank_pattern` to the first plan, which is told.

    Args:
        model: holds the adapters.
        targets: the target modules.
        fresh: keep nothing, since adapters are to begin anew.
        note: tells a line.
    """
    start = unwrap(model).peft_config[targets[0].adapter].init_lora_weights
    begins = fresh or not any(map(is_trained, targets))
    if begins and pattern_of_user(model, targets):
        note(PATTERN)
    if start in _DEFAULT or not begins:
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
