"""Exact savers: the same losses and gradients in fewer bytes.

* No cache of keys and values: a model that is asked for a loss fills one that nobody reads.
* Copies of inputs: adapters that read one input share its copy in their precision (`lora/input_copies.py`).
* Routed rows: adapters of fused experts run on the rows of each expert (`lora/routed_rows.py`).
* Loss in tiles: the logits of a batch are never there as a whole (`cost/later_logits.py`), nor are large tiles of TRL's
  own loss (`cost/loss_tiles.py`).
* Selective checkpointing: readers of activations hold what they are made of (`lora/input_copies.py`).

The first four take no more time. The last one takes some per cent, so it is for budgets that do not fit without.
Checkpointed layers (`cost/model.py`) are exact too, but take more time for each byte, so they come last, and a plan
has as few of them as it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from torch._dynamo import OptimizedModule

from ..common.arrays import IntArray
from ..common.checks import finite
from ..common.text import format_bytes
from ..lora.input_copies import run_activations_again, share_input_copies
from ..lora.routed_rows import route_rows
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule
from .cost import ByteCost
from .later_logits import defer_logits, use_tiled_loss
from .loss_tiles import use_own_tiles
from .model import MemoryModel
from .recording import BatchShape

CACHE, COPIES, TILES = "no cache of keys and values", "shared copies of inputs", "tiled loss"
ROUTED = "routed rows"
ACTIVATIONS = "selective checkpointing"


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, runs compiled."""
    return any(module._compiled_call_impl or isinstance(module, OptimizedModule) for module in model.modules())


def _tiled(model: nn.Module) -> Callable[[], None]:
    undo = use_tiled_loss(model), defer_logits(model), use_own_tiles(model)

    def put_back() -> None:
        for each in undo:
            each()

    return put_back


def _without_cache(model: nn.Module) -> Callable[[], None]:
    configs = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    filling = {id(config): config for config in configs if getattr(config, "use_cache", False) is True}
    for config in filling.values():
        config.use_cache = False

    def put_back() -> None:
        for config in filling.values():
            config.use_cache = True

    return put_back


SAVERS: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    CACHE: _without_cache,
    ROUTED: route_rows,
    COPIES: share_input_copies,
    TILES: _tiled,
}
"""By name, what switches a saver on; it returns what switches it off. In the order in which a plan takes them."""

_SWITCHES = SAVERS | {ACTIVATIONS: run_activations_again}
"""The same, with the one that takes time."""


MOST_MORE = 1.01
"""By what factor bytes of a step whose layers are all checkpointed may rise, where a saver lowers those of one in which
none is."""


@dataclass(frozen=True)
class Saved:
    """What a step of plain LoRA, rank 8 on all modules, takes with one exact saver more than the one before.

    Attributes:
        name: of the saver, or of several that were switched on together; "plain LoRA" for the first, which has none.
        step_bytes: at the peak, where no layer is checkpointed.
        again_bytes: the same where all do; None where none can.
    """

    name: str
    step_bytes: float
    again_bytes: float | None = None

    @classmethod
    def of(cls, name: str, memory: MemoryModel, max_ranks: IntArray) -> Saved:
        """What the step of a byte model takes; `max_ranks` are the highest of each module, int64 (modules,)."""
        ranks = np.minimum(REFERENCE_RANK, max_ranks)
        again = memory.peak(ranks) if memory.segments else None
        return cls(name, memory.with_checkpointed(()).peak(ranks), again)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Saved:
        """What `asdict` made a dictionary of; ValueError, LookupError or TypeError if it is another one."""
        name, again = state["name"], state["again_bytes"]
        if not isinstance(name, str):
            raise TypeError(f"the name of a saver is {name!r}")
        return cls(name, finite(state["step_bytes"]), None if again is None else finite(again))

    def is_less(self, other: Saved) -> bool:
        """Whether a step takes less than another one: where no layer is checkpointed, or at least where all are."""
        again, others = self.again_bytes or 0.0, other.again_bytes or 0.0
        if self.step_bytes == other.step_bytes:
            return again < others
        return self.step_bytes < other.step_bytes and again <= MOST_MORE * others


def plain_text(saved: Sequence[Saved]) -> str:
    """What a step of plain LoRA takes, also with all layers checkpointed, and with exact savers, in words."""
    peaks = [
        format_bytes(each.step_bytes)
        + ("" if each.again_bytes is None else f", or {format_bytes(each.again_bytes)} with all layers checkpointed")
        for each in (saved[0], saved[-1])
    ]
    with_savers = f" With exact savers it takes {peaks[1]}, at the same losses." if len(saved) > 1 else ""
    return f"A step of plain LoRA takes {peaks[0]}.{with_savers}"


@dataclass(frozen=True, eq=False)
class Priced:
    """A step with exact savers.

    Attributes:
        memory: its byte model.
        plain: that of the step without them.
        saved: what a step of plain LoRA takes without, and with each more.
    """

    memory: MemoryModel
    plain: MemoryModel
    saved: tuple[Saved, ...]


class ExactSavers:
    """The exact savers of a model, on from now on.

    Args:
        model: the PEFT model.
        names: of those that are wanted; those that take no time by default.
        compiled: whether it runs compiled. Then it has the first of them alone: the compiler finds equal copies by
            itself, and its graph knows no tensors that are made later.

    Attributes:
        names: of those that are on.
    """

    names: tuple[str, ...]

    def __init__(self, model: nn.Module, names: Collection[str] = tuple(SAVERS), *, compiled: bool = False) -> None:
        self._model, self._compiled = model, compiled
        self._undo: dict[str, Callable[[], None]] = {}
        self.take([name for name in names if name == CACHE or not compiled])

    def put_back(self) -> None:
        """Switch all off."""
        while self._undo:
            self._undo.popitem()[1]()

    def take(self, names: Collection[str]) -> None:
        """Have these on, and no others."""
        self.put_back()
        self.names = tuple(name for name in _SWITCHES if name in names)
        self._undo = {name: _SWITCHES[name](self._model) for name in self.names}

    def price(
        self, measure: Callable[[], MemoryModel], targets: Sequence[TargetModule], *, each: bool = True
    ) -> Priced:
        """Find out what they bring; those that lower no peak on this model and batch are off from now on.

        Args:
            measure: finds the byte model of the step as it is.
            targets: the target modules of the model.
            each: whether each is priced by itself; else all together, which takes two measurements, if that is less.
        """
        highest, names = np.array([target.max_rank for target in targets]), self.names
        self.put_back()
        memory = plain = measure()
        saved = [Saved.of("plain LoRA", plain, highest)]
        if not each:
            self.take(names)
            together = measure()
            found = Saved.of(", ".join(names), together, highest)
            if found.is_less(saved[0]):
                return Priced(together, plain, (saved[0], found))
            self.put_back()
        for name in names:
            undo = SAVERS[name](self._model)
            with_it = measure()
            found = Saved.of(name, with_it, highest)
            if found.is_less(saved[-1]):
                self._undo[name], memory = undo, with_it
                saved.append(found)
            else:
                undo()
        self.names = tuple(self._undo)
        return Priced(memory, plain, tuple(saved))

    def within(
        self,
        limit: float,
        priced: Priced,
        measure: Callable[[], MemoryModel],
        targets: Sequence[TargetModule],
        least: Callable[[ByteCost], float],
        shape: BatchShape | None = None,
    ) -> Priced:
        """Checkpoint activations from now on where plain LoRA does not fit a limit, if it takes less with them.

        Plans of few modules may take more with them, so that some plan must fit with them.

        Args:
            limit: bytes that a step may take.
            priced: with the savers that are on.
            measure: see `price`.
            targets: the target modules of the model.
            least: what the least possible plan takes under a cost, in bytes.
            shape: of the batch; by default the one that the memory was measured with.
        """
        plain = np.minimum(REFERENCE_RANK, [target.max_rank for target in targets])
        if priced.memory.with_checkpointed(()).peak(plain, shape) <= limit or self._compiled:
            return priced
        names, found = self.names, self.with_activations(priced, measure, targets)
        if found and min(least(found.memory.cost()), least(found.memory.with_checkpointed(()).cost())) <= limit:
            return found
        self.take(names)
        return priced

    def with_activations(
        self, priced: Priced, measure: Callable[[], MemoryModel], targets: Sequence[TargetModule]
    ) -> Priced | None:
        """Checkpoint activations from now on; None, with the savers of before, where plain LoRA takes no less."""
        names = self.names
        self.take([*names, ACTIVATIONS])
        memory = measure()
        found = Saved.of(ACTIVATIONS, memory, np.array([target.max_rank for target in targets]))
        if found.is_less(priced.saved[-1]):
            return replace(priced, memory=memory, saved=(*priced.saved, found))
        self.take(names)
        return None
