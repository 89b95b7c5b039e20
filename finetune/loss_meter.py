"""The mean training loss between decisions, read from the outputs of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class LossMeter:
    """Sums the losses of training forward passes, without waiting for the device.

    Attributes:
        total: the sum of the losses, a float or a scalar tensor.
        count: the number of losses; a micro-batch that returns a share of its step's loss counts as that share.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count = 0.0
        self._micro_batches = 1
        self._active = True
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, model: nn.Module, micro_batches: int = 1) -> None:
        """Read the losses of a model. Forward passes in evaluation mode do not count.

        Args:
            model: returns the mean loss of its batch, or, called with `num_items_in_batch`, a share of the step's loss.
            micro_batches: the number of forward passes of one step.
        """
        self.detach()
        self._micro_batches = micro_batches
        self._handle = model.register_forward_hook(self._take, with_kwargs=True)

    def detach(self) -> None:
        """Stop reading."""
        if self._handle:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore the forward passes inside this context: they are no part of the run."""
        self._active, before = False, self._active
        try:
            yield
        finally:
            self._active = before

    def restart(self) -> None:
        """Begin a new interval."""
        self.total, self.count = 0.0, 0.0

    def mean(self) -> float | None:
        """The mean loss of the interval; None if no loss was read."""
        return float(self.total) / self.count if self.count else None

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to continue within an interval, as JSON values."""
        return {"total": float(self.total), "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict`."""
        self.total, self.count = state["total"], state["count"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take(self, module: nn.Module, inputs: Any, options: dict[str, Any], outputs: Any) -> None:
        loss = getattr(outputs, "loss", None)
        if self._active and module.training and loss is not None:
            self.total = self.total + loss.detach().float().mean()
            self.count += 1 if options.get("num_items_in_batch") is None else 1 / self._micro_batches
