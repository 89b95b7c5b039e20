"""Measure the peak of real training steps, from the events that a training loop offers."""

from __future__ import annotations

import torch
from torch import nn

from .memory import SavedTensors, state_bytes


class PeakMeter:
    """Bytes at the peak of chosen training steps: tensors saved for backward, weights, gradients, optimiser state.

    Call `begin` before a step's first forward pass, `next_micro_batch` between accumulated ones, and `end` after the
    optimiser has stepped (its state exists only then).

    Args:
        every_steps: how often a step is measured; `due` also answers yes after `request`.

    Attributes:
        history: (step, bytes) of each measured step.
    """

    def __init__(self, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self.history: list[tuple[int, int]] = []
        self._requested = True
        self._saved: SavedTensors | None = None
        self._largest = 0

    def request(self) -> None:
        """Measure the next step whatever its number."""
        self._requested = True

    def due(self, step: int) -> bool:
        """Whether `step` should be measured."""
        return self._requested or step % self.every_steps == 0

    def begin(self, model: nn.Module) -> None:
        """Start to count what autograd saves."""
        self.close()
        self._largest = 0
        self._saved = SavedTensors(model).__enter__()

    def next_micro_batch(self) -> None:
        """The backward pass of a micro-batch is over and has freed what was saved for it."""
        if self._saved:
            self._largest = max(self._largest, self._saved.total)
            self._saved.sizes.clear()

    def close(self) -> None:
        """Stop counting."""
        if self._saved:
            self.next_micro_batch()
            self._saved.__exit__(None, None, None)
            self._saved = None

    def end(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: int = 0) -> int | None:
        """Close the step.

        Args:
            step: its number.
            model: the PEFT model.
            optimizer: after its step.
            extra: further bytes held during the step, such as signal buffers.

        Returns:
            Bytes at the peak; None if the step was not being measured.
        """
        if self._saved is None:
            return None
        self.close()
        self._requested = False
        peak = self._largest + state_bytes(model, optimizer) + extra
        self.history.append((step, peak))
        return peak
