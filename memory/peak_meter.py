"""Measure the peak of real training steps, from the events that a training loop offers."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from .live_storages import LivePeak
from .model_states import state_bytes


class PeakMeter:
    """Bytes at the peak of chosen training steps, the frozen model excluded.

    On CUDA the allocator's own record is read. Elsewhere every tensor that the step creates is followed, which
    slows that one step by some percent; a model under torch.compile runs it uncompiled.

    Call `begin` before a step's first forward pass, `stepping` before the optimiser steps and `end` after it has. State
    that the optimiser makes in this step (all of it in the first one) counts as if it had been there all along, as it
    will be in the next step.

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
        self._open = ExitStack()
        self._held = 0
        self._state = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._passes = 0
        self._device = torch.device("cpu")
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
        self._state = state_bytes(model, optimizer, gradients=False)
        self._held = self._state + extra
        self._optimizer, self._passes = optimizer, 0
        self._device = next(model.parameters()).device
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated = torch.cuda.memory_allocated(self._device)
        else:
            # torch.compile would give the code up for good if it met a dispatch mode.
            self._open.enter_context(torch.compiler.set_stance("force_eager"))
            self._live = self._open.enter_context(LivePeak())

    def stepping(self) -> None:
        """The passes are over, the optimiser is about to step."""
        self._passes = self._rise() or 0

    def end(self, step: int, model: nn.Module) -> int | None:
        """Close the step.

        Args:
            step: its number.
            model: the PEFT model.

        Returns:
            Bytes at the peak; None if the step was not being measured.
        """
        rise = self._rise()
        if rise is None:
            return None
        made = state_bytes(model, self._optimizer, gradients=False) - self._state
        peak = self._held + max(rise, self._passes + max(made, 0))
        self.close()
        self._requested = False
        self.history.append((step, peak))
        return peak

    def _rise(self) -> int | None:
        """How far live bytes have risen in this step; None if it is not being measured."""
        if self._live is not None:
            return self._live.peak
        if self._allocated is not None:
            return torch.cuda.max_memory_allocated(self._device) - self._allocated
        return None

    def close(self) -> None:
        """Stop following, without a result."""
        self._open.close()
        self._live = self._allocated = None
