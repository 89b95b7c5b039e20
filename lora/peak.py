"""Measure the peak of real training steps, from the events that a training loop offers."""

from __future__ import annotations

import torch
from torch import nn

from .held_state import state_bytes
from .live import LivePeak


class PeakMeter:
    """Bytes at the peak of chosen training steps, the frozen model excluded.

    On CUDA the allocator's own record is read. Elsewhere every tensor that the step creates is followed, which
    slows that one step by some percent; a model under torch.compile runs it uncompiled.

    Call `begin` before a step's first forward pass and `end` after the optimiser has stepped.

    Args:
        every_steps: how often a step is measured; besides, the first one and each one after `request`.

    Attributes:
        history: (step, bytes) of each measured step.
    """

    def __init__(self, every_steps: int = 100) -> None:
        self.every_steps = every_steps
        self.history: list[tuple[int, int]] = []
        self._requested = True
        self._live: LivePeak | None = None
        self._held = 0
        self._allocated: int | None = None

    def request(self) -> None:
        """Measure the next step."""
        self._requested = True

    def due(self, step: int) -> bool:
        """Whether `step` is to be measured."""
        return self._requested or step % self.every_steps == 0

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: int = 0) -> None:
        """Start to follow what the step creates.

        Args:
            model: the PEFT model.
            optimizer: its state is held already.
            extra: further bytes that are, such as signal buffers.
        """
        self.close()
        self._held = state_bytes(model, optimizer, gradients=False) + extra
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        else:
            self._live = LivePeak().__enter__()

    def end(self, step: int, model: nn.Module) -> int | None:
        """Close the step.

        Args:
            step: its number.
            model: the PEFT model.

        Returns:
            Bytes at the peak; None if the step was not being measured.
        """
        if self._live is not None:
            rise = self._live.peak
        elif self._allocated is not None:
            rise = torch.cuda.max_memory_allocated(next(model.parameters()).device) - self._allocated
        else:
            return None
        self.close()
        self._requested = False
        peak = self._held + rise
        self.history.append((step, peak))
        return peak

    def close(self) -> None:
        """Stop following, without a result."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
        self._live = self._allocated = None
