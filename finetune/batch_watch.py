"""Looks at every training batch before the model sees it, for one that is larger than the memory was planned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..memory.batch_shape import BatchShape
from ..memory.recording import Batch


class BatchWatch:
    """Calls back before the first forward pass of a batch that is larger than any before.

    Attributes:
        shape: the largest rows and length so far.
    """

    def __init__(self) -> None:
        self.shape = BatchShape(0, 0)
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, model: nn.Module, shape: BatchShape, larger: Callable[[Batch, BatchShape], None]) -> None:
        """Watch a model; forward passes in evaluation mode do not count.

        Args:
            model: called with keyword arguments.
            shape: the batch that is known already.
            larger: told of the batch and of the new largest shape; may run the model itself.
        """
        self.detach()
        self.shape = shape
        self._larger = larger
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def detach(self) -> None:
        """Stop watching."""
        if self._handle:
            self._handle.remove()
            self._handle = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        if not module.training:
            return
        batch = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
        shape = BatchShape.of(batch)
        if not self.shape.covers(shape):
            self.shape = self.shape.joined(shape)  # first, since the callback may run the model on this batch
            self._larger(batch, self.shape)
