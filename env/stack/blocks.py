"""The blocks of an unmodified transformer, run from any block on, with runs joining the batch along the way.

Below its lowest adapter, a run computes the same as the frozen model. `Blocks.frozen` returns the hidden states
entering a block, once for all runs with the same inputs, and `Blocks.joined` lets each run join the batch at its block
with them. They require no grad, so the backward pass of a run ends at its block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ...common.arrays import IntArray
from ...common.errors import UnsupportedError
from ...lora.spec import ModuleSpec

FORWARD_TOKENS = 4096
"""Tokens of a forward pass without gradients."""

States = Mapping[int, torch.Tensor]
"""Hidden states entering a block, (rows, length, width), by block."""


class _Reached(Exception):
    """Raised on entering the last requested block."""


class Blocks:
    """The list of blocks containing all target modules of a model.

    Args:
        model: takes `input_ids`. Its blocks take hidden states (rows, length, width) first; their other arguments must
            work for any number of rows.
        targets: target modules of the model.

    Raises:
        UnsupportedError: there is no such list.
    """

    def __init__(self, model: nn.Module, targets: Sequence[ModuleSpec]) -> None:
        self._model = model
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        prefixes = [name for name in lists if all(t.name.startswith(f"{name}.{t.block}.") for t in targets)]
        if not prefixes:
            raise UnsupportedError(
                "Stacked runs require all target modules in one list of blocks, such as `model.layers.3.`; got "
                f"{targets[0].name!r} among them."
            )
        parent, _, self._name = prefixes[0].rpartition(".")
        self._parent = model.get_submodule(parent)
        self._all: nn.ModuleList = getattr(self._parent, self._name)
        self._numbers = np.array([target.block for target in targets])
        self._states: States = {}
        self._seen: dict[int, torch.Tensor] | None = None
        self._last = 0
        for block, module in enumerate(self._all):
            module.register_forward_pre_hook(self._hook(block))

    def _hook(self, block: int) -> Callable[..., tuple[Any, ...] | None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._seen is not None:
                self._seen[block] = args[0]
                if block == self._last:
                    raise _Reached
            if block not in self._states:
                return None
            new = self._states[block]
            return (new if block == min(self._states) else torch.cat([args[0], new]), *args[1:])

        return enter

    def entries(self, ranks: IntArray) -> list[int]:
        """Block of each run's lowest adapter, or the last block for runs without one.

        Args:
            ranks: (runs, modules).
        """
        last = len(self._all) - 1
        return list(np.where(ranks > 0, self._numbers, last).min(axis=1).tolist())

    @torch.no_grad()
    def frozen(self, tokens: torch.Tensor, blocks: Sequence[int]) -> States:
        """Hidden states of the frozen model entering some blocks.

        Args:
            tokens: int64 (rows, length).
            blocks: block numbers from 0, at least one.
        """
        parts = []
        for part in torch.split(tokens, max(1, FORWARD_TOKENS // tokens.shape[1])):
            self._seen, self._last = {}, max(blocks)
            try:
                self._model(input_ids=part)
            except _Reached:
                parts.append(self._seen)
            finally:
                self._seen = None
        return {block: torch.cat([seen[block] for seen in parts]) for block in blocks}

    @contextmanager
    def joined(self, states: States) -> Iterator[torch.Tensor]:
        """Let rows join the batch, those of each block after all earlier ones.

        Args:
            states: states entering each block; the model starts at the lowest one.

        Yields:
            Token ids (1, length) to call the model with; only their length matters.
        """
        first = min(states)
        self._states = states
        setattr(self._parent, self._name, self._all[first:])
        try:
            yield torch.zeros(1, states[first].shape[1], dtype=torch.int64, device=states[first].device)
        finally:
            self._states = {}
            setattr(self._parent, self._name, self._all)
