"""Looks at every training batch before the model does, and reports one that the memory was not planned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..memory.batch_shape import BatchShape
from ..memory.recording import Batch


class BatchWatch:
    """Calls a function before the forward pass of a batch that is larger than all batches before it.

    Attributes:
        shape: the largest number of rows and the largest length so far.
    """

    def __init__(self) -> None:
        self.shape = BatchShape(0, 0)
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, model: nn.Module, shape: BatchShape, larger: Callable[[Batch, BatchShape], None]) -> None:
        """Watch a model. Forward passes in evaluation mode do not count.

        Args:
            model: the model, which is called with keyword arguments.
            shape: the largest shape that is planned for.
            larger: called with the larger batch and the new largest shape; it may run the model itself.
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
        shape = self.shape.joined(BatchShape.of(batch))
        if shape != self.shape:
            self.shape = shape  # first, since the callback may run the model on this batch
            self._larger(batch, self.shape)
