"""The mean training loss between decisions, read from the model's own outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class LossMeter:
    """Sums the loss of each training forward pass, without waiting for the device.

    Attributes:
        total: sum of the losses, a float or a scalar tensor.
        count: how many; a micro-batch that returns its share of the step's loss counts as that share.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count = 0.0
        self._micro_batches = 1
        self._heard = True
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, model: nn.Module, micro_batches: int = 1) -> None:
        """Listen to a model; forward passes in evaluation mode do not count.

        Args:
            model: returns the mean loss of its batch, or, called with `num_items_in_batch`, a share of the step's.
            micro_batches: forward passes of one step.
        """
        self.detach()
        self._micro_batches = micro_batches
        self._handle = model.register_forward_hook(self._take, with_kwargs=True)

    def detach(self) -> None:
        """Stop listening."""
        if self._handle:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no notice of forward passes for a while: they are not of the run."""
        self._heard, before = False, self._heard
        try:
            yield
        finally:
            self._heard = before

    def restart(self) -> None:
        """Begin a new interval."""
        self.total, self.count = 0.0, 0.0

    def mean(self) -> float | None:
        """Mean loss of the interval; None if there was none."""
        return float(self.total) / self.count if self.count else None

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on within an interval, as JSON values."""
        return {"total": float(self.total), "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`."""
        self.total, self.count = state["total"], state["count"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take(self, module: nn.Module, inputs: Any, options: dict[str, Any], outputs: Any) -> None:
        loss = getattr(outputs, "loss", None)
        if self._heard and module.training and loss is not None:
            self.total = self.total + loss.detach().float().mean()
            self.count += 1 if options.get("num_items_in_batch") is None else 1 / self._micro_batches
