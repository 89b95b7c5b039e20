"""Measure the peak of real training steps: through the CUDA allocator, or on a CPU through resident memory on Linux."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ...common.text import format_bytes
from ...lora.optimizer_state import unwrap_optimizer
from ..batch_shape import Batch, has_no_padding
from .live_storages import LivePeak
from .model_states import gradients_of, state_bytes

MARGIN = 0.03
"""Relative difference between measured and predicted peak tolerated without an explanation."""


@dataclass(frozen=True)
class StepBatches:
    """The batches passed to `before_step` in one optimizer step.

    Attributes:
        count: number of batches; 0 if none were passed.
        unpadded: whether every batch has a mask that masks nothing.
    """

    count: int
    unpadded: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepBatches:
        """Summarise these batches."""
        return cls(len(batches), bool(batches) and all(map(has_no_padding, batches)))


def likely_cause(peak: int, predicted: float, batches: StepBatches, accumulation: int) -> str:
    """Return the prediction and likely cause if a measured peak differs by more than the margin, else nothing.

    Args:
        peak: measured bytes.
        predicted: predicted bytes.
        batches: batches of the measured step.
        accumulation: configured batches per step.
    """
    if abs(peak - predicted) <= MARGIN * predicted:
        return ""
    if batches.count and batches.count != accumulation:
        took = f"{batches.count} batch" if batches.count == 1 else f"{batches.count} batches"
        cause = (
            f"the step ran {took}, but accumulation={accumulation} was declared. The last step of an epoch "
            "may have fewer; otherwise declare the number of batches per step, and pass all of them to "
            "`before_step`."
        )
    elif peak < predicted and batches.unpadded:
        cause = (
            "no row of the step is padded, while the prediction allows for padding. A peak below the "
            "prediction is harmless."
        )
    else:
        cause = (
            f"the step computes {'more' if peak > predicted else 'less'} than the one measured before "
            "training, because the model, the loss or the kind of batch has changed, or another library "
            "keeps tensors."
        )
    return f"while {format_bytes(predicted)} were predicted. Likely cause: {cause}"


class PeakMeter:
    """Measures peak bytes of chosen training steps, excluding the frozen model.

    On CUDA this reads the allocator's statistics. On other devices it tracks every tensor created in the step, which
    slows that step by a few per cent; a model under torch.compile then runs uncompiled.

    Call `begin` before a step's first forward pass, and `end` after the optimizer step. Code between the optimizer step
    and `end`, such as a user callback, is excluded. Persistent tensors created in this step, such as optimizer state in
    the first one, count from its start, as in the next step. Gradients of the previous step count until they are
    cleared.

    Args:
        every_steps: number of steps between measurements. The first step, and each one after `request`, is also
            measured.

    Attributes:
        history: (step, peak bytes) of each measured step.
        requested: whether the next step is measured regardless of its number.
        highest: reduces this process's peak to that of all processes, which measure the same steps.
    """

    _latest: ClassVar[Callable[[], PeakMeter | None]] = lambda: None

    def __init__(self, every_steps: int = 100) -> None:
        self.every_steps = every_steps
        self.history: list[tuple[int, int]] = []
        self.requested: bool = True
        self.highest: Callable[[int], int] = int
        self._contexts = ExitStack()
        self._bytes_before = 0
        self._lasting_before = 0
        self._lasting: Callable[[], int] = int
        # The highest rise of live bytes since `begin`, and that of the passes; None outside a measured step, or before
        # the passes end.
        self._rise: Callable[[], int] | None = None
        self._rise_of_passes: int | None = None
        self._go_on_from: Callable[[int], None] = lambda rise: None
        self._live: LivePeak | None = None

    @property
    def measuring(self) -> bool:
        """True if a step is being measured."""
        return self._rise is not None

    def request(self) -> None:
        """Measure the next step."""
        self.requested = True

    def due(self, step: int) -> bool:
        """True if `step` is to be measured."""
        return self.requested or step % self.every_steps == 0

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        extra: int = 0,
        buffers: Callable[[], int] = int,
    ) -> None:
        """Start to measure a step.

        A measurement left open by another meter, whose loop failed, is discarded.

        Args:
            model: the PEFT model.
            optimizer: the optimizer with the state.
            extra: bytes of other existing tensors.
            buffers: returns the bytes of other persistent buffers, such as those of signals.
        """
        for meter in {self, PeakMeter._latest() or self}:
            meter.close()
        PeakMeter._latest = weakref.ref(self)
        gradients = gradients_of(model, optimizer)
        self._lasting = lambda: (
            state_bytes(model, optimizer, gradients=False) - _bytes(gradients_of(model, optimizer)) + buffers()
        )
        self._lasting_before = self._lasting()
        self._bytes_before = self._lasting_before + _bytes(gradients) + extra
        self._rise_of_passes = None
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
            found = [0]

            def go_on_from(rise: int) -> None:
                found[0] = rise
                torch.cuda.reset_peak_memory_stats(device)

            self._rise = lambda: max(found[0], torch.cuda.max_memory_allocated(device) - allocated)
            self._go_on_from = go_on_from
        else:
            # Under a dispatch mode, torch.compile would permanently stop compiling the code.
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
            live = self._live = self._contexts.enter_context(LivePeak())
            live.hold(gradients)
            self._rise = lambda: live.peak
            self._go_on_from = partial(setattr, live, "peak")
        if optimizer is not None:
            inner = unwrap_optimizer(optimizer)
            for hook in (
                inner.register_step_pre_hook(lambda *_: self.passed()),
                inner.register_step_post_hook(lambda *_: self._stepped()),
            ):
                self._contexts.callback(hook.remove)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude code inside the context from a step; whatever it leaves allocated counts afterwards."""
        rise = self._rise() if self._rise else None
        yield
        if rise is not None and self._rise:
            self._go_on_from(rise)

    @contextmanager
    def without_steps(self) -> Iterator[None]:
        """Exclude code inside the context from a step, with steps of the optimizer; on a CPU also what it leaves."""
        lasting, before, live = self._lasting, (self._rise, self._rise_of_passes), self._live
        rise, held = self._rise() if self._rise else None, live.bytes if live else 0
        self._rise = None
        yield
        if rise is not None and self._lasting is lasting:  # else it was closed after an error
            self._rise, self._rise_of_passes = before
            if live:
                live.bytes = held
            self._go_on_from(rise)

    def passed(self) -> None:
        """Mark the end of the forward and backward passes, if gradients are processed before the optimizer step."""
        if self._rise and self._rise_of_passes is None:
            self._rise_of_passes = self._rise()

    def _stepped(self) -> None:
        """Mark the end of the optimizer step: later rises do not count."""
        if self._rise:
            rise = self._rise()
            self._rise = lambda: rise

    def end(self, step: int) -> int | None:
        """Finish measuring a step with this number, and return its peak bytes; None if none is being measured."""
        peak = self.end_other()
        if peak is not None:
            self.requested = False
            self.history.append((step, peak))
        return peak

    def end_other(self) -> int | None:
        """Like `end`, for work outside training steps such as evaluation, which is not in the history."""
        if self._rise is None:
            return None
        rise, new = self._rise(), self._lasting() - self._lasting_before
        peak = self._bytes_before + max(rise, (self._rise_of_passes or 0) + max(new, 0))
        self.close()
        return self.highest(peak)

    def close(self) -> None:
        """Stop measuring, without a result."""
        self._contexts.close()
        self._rise, self._lasting, self._live = None, int, None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
