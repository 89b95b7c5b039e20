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

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from inspect import getclosurevars

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule

from ..lora.input_copies import run_activations_again, share_input_copies
from ..lora.routed_rows import route_rows
from ..lora.spec import REFERENCE_RANK, highest_ranks
from ..lora.targets import TargetModule
from .cost import ByteCost
from .later_logits import defer_logits, use_tiled_loss
from .loss_tiles import use_own_tiles
from .model import MemoryModel
from .recording import BatchShape
from .saver_prices import ACTIVATIONS, CACHE, COPIES, ROUTED, TILES, Priced, Saved, price_savers


def _compiled(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module._compiled_call_impl or isinstance(module, OptimizedModule)]


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, runs compiled."""
    return bool(_compiled(model))


def graphs_per_plan(model: nn.Module) -> int:
    """Graphs that one set of ranks takes in the fullest cache: 0 if nothing is compiled, 1 if the whole model is."""
    return max(Counter(type(getattr(one, "_orig_mod", one)) for one in _compiled(model)).values(), default=0)


def takes_any_shape(model: nn.Module) -> bool:
    """Whether torch makes a compiled model's graphs anew for sizes that change; else each shape has a graph."""

    def fixed(module: nn.Module) -> bool:
        call = module._compiled_call_impl
        context = getclosurevars(call).nonlocals.get("self") if call else module.dynamo_ctx
        graphs = (getattr(context, "compiler_config", None) or {}).get("triton.cudagraphs")
        return bool(graphs) or getattr(context, "_dynamic", False) is False

    return torch._dynamo.config.automatic_dynamic_shapes and not any(map(fixed, _compiled(model)))


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
        highest, names = highest_ranks(targets), self.names

        @cache
        def measured(taken: tuple[str, ...]) -> MemoryModel:
            self.take(taken)
            return measure()

        if not each:
            plain, together = measured(()), measured(names)
            saved = Saved.of("plain LoRA", plain, highest), Saved.of(", ".join(names), together, highest)
            if saved[1].is_less(saved[0]):
                return Priced(together, plain, saved, names)
        priced = price_savers(measured, names, highest)
        self.take(priced.names)
        return priced

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
        plain = np.minimum(REFERENCE_RANK, highest_ranks(targets))
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
        found = Saved.of(ACTIVATIONS, memory, highest_ranks(targets))
        if found.is_less(priced.saved[-1]):
            return replace(priced, memory=memory, saved=(*priced.saved, found), names=self.names)
        self.take(names)
        return None
