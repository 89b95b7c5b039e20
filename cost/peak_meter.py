"""Measures the peak of real training steps: on a GPU by a loop's events, on a CPU by what Linux says is resident."""

from __future__ import annotations

import ctypes
import gc
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..common.text import format_bytes
from ..lora.optimizer_state import unwrap_optimizer
from .batch_shape import Batch, has_no_padding
from .live_storages import LivePeak
from .model_states import gradients_of, state_bytes

MARGIN = 0.03
"""The share of the prediction by which a measured peak may differ without a word."""


@dataclass(frozen=True)
class StepBatches:
    """The batches that `before_step` got for one optimizer step.

    Attributes:
        count: how many; 0 if none were passed.
        unpadded: whether all have a mask, and none masks anything.
    """

    count: int
    unpadded: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepBatches:
        """Of these batches."""
        return cls(len(batches), bool(batches) and all(map(has_no_padding, batches)))


def likely_cause(peak: int, predicted: float, batches: StepBatches, accumulation: int) -> str:
    """The prediction of a measured peak and the likely cause if they differ by more than the margin, else nothing.

    Args:
        peak: measured, in bytes.
        predicted: in bytes.
        batches: of the measured step.
        accumulation: the batches of a step, as the run was told.
    """
    if abs(peak - predicted) <= MARGIN * predicted:
        return ""
    if batches.count and batches.count != accumulation:
        took = f"{batches.count} batch" if batches.count == 1 else f"{batches.count} batches"
        cause = (
            f"the step took {took}, and the run was told accumulation={accumulation}. The last step of an epoch may "
            "have fewer; else tell the run how many make a step, and pass all of them to `before_step`."
        )
    elif peak < predicted and batches.unpadded:
        cause = (
            "no row of the step is padded, and the prediction leaves room for rows that are. A peak below the "
            "prediction is no danger."
        )
    else:
        cause = (
            f"the step computes {'more' if peak > predicted else 'less'} than the one that was measured "
            "before training, because the model, the loss or the kind of batch has changed since, or another library "
            "keeps tensors."
        )
    return f"where {format_bytes(predicted)} were predicted. Likely cause: {cause}"


class PeakMeter:
    """Measures the bytes at the peak of chosen training steps, without the frozen model.

    On CUDA the allocator's record is read. On other devices every tensor that the step creates is followed, which slows
    that one step by a few percent; a model under torch.compile then runs uncompiled.

    Call `begin` before a step's first forward pass, and `end` after the optimizer's step. What runs between the two
    last, such as a callback of the user's, does not count. What stays and was created in this step, as the optimizer's
    state in the first one, counts as present from the start, as it will be in the next step. Gradients of the step
    before count until they are cleared, wherever in the step that is.

    Args:
        every_steps: number of steps from one measurement to the next. The first step, and each one after `request`, is
            measured as well.

    Attributes:
        history: (step, bytes at the peak) of each measured step.
        requested: whether the next step is measured, whatever its number.
        highest: makes the peak of all processes of that of this one; all measure the same steps.
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
        # The highest rise of live bytes since `begin`, and that of the passes; None if no step is being measured, or
        # before the passes have ended.
        self._rise: Callable[[], int] | None = None
        self._rise_of_passes: int | None = None
        self._go_on_from: Callable[[int], None] = lambda rise: None

    @property
    def measuring(self) -> bool:
        """Whether a step is being measured."""
        return self._rise is not None

    def request(self) -> None:
        """Measure the next step."""
        self.requested = True

    def due(self, step: int) -> bool:
        """Whether `step` is to be measured."""
        return self.requested or step % self.every_steps == 0

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        extra: int = 0,
        buffers: Callable[[], int] = int,
    ) -> None:
        """Begin to measure a step.

        A measurement that another meter has begun and never ended, since its loop met an error, ends without a result.

        Args:
            model: the PEFT model.
            optimizer: whose state counts.
            extra: bytes of other tensors that exist already.
            buffers: tells the bytes of others that stay once they are there, such as those of signals.
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
            # Under a dispatch mode, torch.compile would stop compiling the code for good.
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
            live = self._contexts.enter_context(LivePeak())
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
        """Leave out what runs inside, in the middle of a step; what it leaves behind counts from then on."""
        rise = self._rise() if self._rise else None
        yield
        if rise is not None and self._rise:
            self._go_on_from(rise)

    def passed(self) -> None:
        """Note the end of the forward and backward passes, if work on gradients comes before the optimizer's step."""
        if self._rise and self._rise_of_passes is None:
            self._rise_of_passes = self._rise()

    def _stepped(self) -> None:
        """Note the end of the optimizer's step: later rises do not count."""
        rise = self._rise() if self._rise else 0
        self._rise = lambda: rise

    def end(self, step: int) -> int | None:
        """End the measured step, of this number, and return bytes at its peak; None if no step is being measured."""
        peak = self.end_other()
        if peak is not None:
            self.requested = False
            self.history.append((step, peak))
        return peak

    def end_other(self) -> int | None:
        """As `end`, for what is no training step, such as an evaluation: it stands in no history."""
        if self._rise is None:
            return None
        rise, new = self._rise(), self._lasting() - self._lasting_before
        peak = self._bytes_before + max(rise, (self._rise_of_passes or 0) + max(new, 0))
        self.close()
        return self.highest(peak)

    def close(self) -> None:
        """Stop measuring, without a result."""
        self._contexts.close()
        self._rise, self._lasting = None, int


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


_OWN_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def restart_resident_peak() -> int | None:
    """Free unused memory, reset the record of the peak, and return bytes resident now; None if it cannot be reset."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def resident_peak() -> int:
    """The highest number of bytes resident since `restart_resident_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", _OWN_STATUS.read_text())
    assert match, f"{_OWN_STATUS} has no {field}"
    return 1024 * int(match[1])
