"""Exact savers: lower memory with identical losses and gradients.

* No KV cache: a model asked for a loss would fill one that is never read.
* Copies of inputs: adapters with the same input share its cast copy (`cost/savers/input_copies.py`).
* Routed rows: adapters of fused experts run on each expert's rows (`lora/routed_rows.py`).
* Tiled loss: neither the full logits (`cost/savers/later_logits.py`) nor large tiles of TRL's loss
  (`cost/savers/tiled_loss.py`) are materialised.
* Selective checkpointing: consumers of activations recompute them from their inputs (`cost/savers/input_copies.py`).

The first four cost no time. The last one costs a few per cent, so it is reserved for budgets that do not fit otherwise.
Checkpointed layers (`cost/model.py`) are exact too, but cost more time per byte: they come last, and a plan uses as few
as it needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import cache
from inspect import getclosurevars

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from ...common.arrays import IntArray
from ...lora.routed_rows import route_rows
from ..cost import ByteCost
from ..model import MemoryModel
from ..recording import BatchShape
from .input_copies import run_activations_again, share_input_copies
from .later_logits import defer_logits, use_tiled_loss
from .prices import ACTIVATIONS, CACHE, COPIES, ROUTED, TILES, Measure, Priced, price_savers, price_within
from .tiled_loss import use_own_tiles


def _compiled(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module._compiled_call_impl or isinstance(module, OptimizedModule)]


def is_compiled(model: nn.Module) -> bool:
    """True if a model or a part of it is compiled."""
    return bool(_compiled(model))


def graphs_per_plan(model: nn.Module) -> int:
    """Return the graphs per set of ranks in the fullest compile cache: 0 without compilation, 1 for a whole model."""
    return max(Counter(type(getattr(one, "_orig_mod", one)) for one in _compiled(model)).values(), default=0)


def takes_any_shape(model: nn.Module) -> bool:
    """True if a compiled model's graphs support dynamic shapes; otherwise each shape needs a graph."""

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
"""Functions that enable each saver and return a function to disable it, in the order plans adopt them."""

_SWITCHES = SAVERS | {ACTIVATIONS: run_activations_again}
"""The same, including the saver that costs time."""


class ExactSavers:
    """Enables exact savers on a model.

    Args:
        model: the PEFT model.
        names: savers to enable; by default those that cost no time.
        compiled: whether the model is compiled. It then only gets the first saver: the compiler already merges equal
            copies, and its graph cannot contain lazily created tensors.

    Attributes:
        names: names of the enabled savers.
    """

    names: tuple[str, ...]

    def __init__(self, model: nn.Module, names: Collection[str] = tuple(SAVERS), *, compiled: bool = False) -> None:
        self._model, self._compiled = model, compiled
        self._undo: dict[str, Callable[[], None]] = {}
        self.take([name for name in names if name == CACHE or not compiled])

    def put_back(self) -> None:
        """Disable all savers."""
        while self._undo:
            self._undo.popitem()[1]()

    def take(self, names: Collection[str]) -> None:
        """Enable exactly these savers."""
        self.put_back()
        self.names = tuple(name for name in _SWITCHES if name in names)
        self._undo = {name: _SWITCHES[name](self._model) for name in self.names}

    def price(self, measure: Callable[[], MemoryModel], reference: IntArray, *, each: bool = True) -> Priced:
        """Measure the effect of the savers, and disable those that lower no peak on this model and batch.

        Args:
            measure: returns the byte model of the step in its current state.
            reference: the ranks to price them with, int64 (modules,).
            each: see `price_savers`.
        """
        priced = price_savers(cache(self._measured(measure)), self.names, reference, each=each)
        self.take(priced.names)
        return priced

    def within(
        self,
        limit: float,
        priced: Priced,
        measure: Callable[[], MemoryModel],
        reference: IntArray,
        least: Callable[[ByteCost], float],
        shape: BatchShape | None = None,
    ) -> Priced:
        """Enable activation checkpointing if the reference exceeds a limit and gets smaller with it.

        See `price_within`, and `price` for `measure`.
        """
        if self._compiled:
            return priced
        found = price_within(limit, priced, self._measured(measure), reference, least, shape)
        self.take(found.names)
        return found

    def _measured(self, measure: Callable[[], MemoryModel]) -> Measure:
        def measured(names: tuple[str, ...]) -> MemoryModel:
            self.take(names)
            return measure()

        return measured
