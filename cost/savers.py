"""Exact savers: the same losses and gradients, bit for bit, in fewer bytes and no more time.

* No cache of keys and values: a model that is asked for a loss fills one that nobody reads.
* Copies of inputs: adapters that read one input share its copy in their precision (`lora/input_copies.py`).
* Loss in tiles: the logits of a batch are never there as a whole (`cost/later_logits.py`).

Layers that run again (`cost/model.py`) are exact too, but take time, so a plan has as few of them as it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import nn
from torch._dynamo import OptimizedModule

from ..common.arrays import IntArray
from ..lora.input_copies import share_input_copies
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule
from .later_logits import defer_logits, use_tiled_loss
from .model import MemoryModel

CACHE, COPIES, TILES = "no cache of keys and values", "shared copies of inputs", "loss in tiles"


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, runs compiled."""
    return any(module._compiled_call_impl or isinstance(module, OptimizedModule) for module in model.modules())


def _tiled(model: nn.Module, compiled: bool) -> Callable[[], None]:
    undo = use_tiled_loss(model), *([] if compiled else [defer_logits(model)])

    def put_back() -> None:
        for each in undo:
            each()

    return put_back


def _without_cache(model: nn.Module, compiled: bool) -> Callable[[], None]:
    configs = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    filling = {id(config): config for config in configs if getattr(config, "use_cache", False) is True}
    for config in filling.values():
        config.use_cache = False

    def put_back() -> None:
        for config in filling.values():
            config.use_cache = True

    return put_back


SAVERS: dict[str, Callable[[nn.Module, bool], Callable[[], None]]] = {
    CACHE: _without_cache,
    COPIES: lambda model, compiled: share_input_copies(model),
    TILES: _tiled,
}
"""By name, what switches a saver on; it returns what switches it off. In the order in which a plan takes them."""


Found = TypeVar("Found")


@dataclass(frozen=True)
class Saved:
    """What a step of plain LoRA, rank 8 on all modules, takes with one exact saver more than the one before.

    Attributes:
        name: of the saver; "plain LoRA" for the first, which has none.
        step_bytes: at the peak, where no layer runs again.
        again_bytes: the same where all do; None where none can.
    """

    name: str
    step_bytes: float
    again_bytes: float | None = None


def saved_by(steps: Mapping[str, MemoryModel], max_ranks: IntArray) -> tuple[Saved, ...]:
    """What a step takes with each saver more.

    Args:
        steps: byte models by name, as `ExactSavers.with_each` finds them.
        max_ranks: the highest rank of each module, int64 (modules,).
    """
    ranks = np.minimum(REFERENCE_RANK, max_ranks)
    return tuple(
        Saved(
            name or "plain LoRA",
            step.recomputing(()).peak(ranks),
            step.peak(ranks) if step.segments else None,
        )
        for name, step in steps.items()
    )


class ExactSavers:
    """The exact savers of a model, on from now on.

    Args:
        model: the PEFT model.
        names: of those that are wanted, of `SAVERS`.
        compiled: whether it runs compiled. Then its logits are there as a whole, since its graph knows no tensors that
            are made later.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = tuple(SAVERS), *, compiled: bool = False) -> None:
        self._model, self._compiled = model, compiled
        self.names: tuple[str, ...] = tuple(names)
        self._undo: list[Callable[[], None]] = []
        self._on(self.names)

    def put_back(self) -> None:
        """Switch all off."""
        while self._undo:
            self._undo.pop()()

    def with_each(self, find: Callable[[], Found]) -> dict[str, Found]:
        """What a function finds without any ("") and with one saver more each time, by its name; all are on at last."""
        self.put_back()
        try:
            found = {"": find()}
            for number, name in enumerate(self.names):
                self._on(self.names[number : number + 1])
                found[name] = find()
        except BaseException:
            self.put_back()
            self._on(self.names)
            raise
        return found

    def priced(
        self, measure: Callable[[], MemoryModel], targets: Sequence[TargetModule]
    ) -> tuple[MemoryModel, tuple[Saved, ...]]:
        """The byte model of a step with all savers, and what it takes with each more; nothing of that without any."""
        if not self.names:
            return measure(), ()
        steps = self.with_each(measure)
        return [*steps.values()][-1], saved_by(steps, np.array([target.max_rank for target in targets]))

    def _on(self, names: Sequence[str]) -> None:
        for name in names:
            self._undo.append(SAVERS[name](self._model, self._compiled))
