"""The streamed base of a run: when weights go to main memory, and how many layers stay on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..common.arrays import IntArray
from ..common.errors import BudgetError, ConfigError, ProcessError, UnknownNameError, UnsupportedError
from ..common.processes import Processes
from ..common.text import format_bytes
from ..cost.budget import Budget, free_bytes
from ..cost.cards import find_device_spec
from ..cost.model import MemoryModel, fewest_checkpointed
from ..cost.record.calibration import PlanCosts
from ..cost.record.model_states import frozen_bytes
from ..cost.record.work import part_seconds_of
from ..cost.savers import streamed_base
from ..cost.savers.streamed_base import (
    StreamedBase,
    check_main_memory,
    stream_base,
    streamable_layers,
    streaming_of,
    unstreamable,
)
from ..cost.streaming import BUS_SHARE, BaseLayers, kept_layers, spread
from .options import PilotOptions, PlanOptions
from .step.put_back import gradients_put_back
from .step.run import TrainingRun

SAMPLE = 64
"""Numbers of each streamed weight that processes compare."""


def stream_what_is_too_large(model: nn.Module, device: torch.device, options: PlanOptions) -> None:
    """Stream the base of a model in main memory that its device does not hold, or its budget: it cannot move there.

    The run keeps as many layers on the device as its budget holds.

    Raises:
        UnsupportedError: main memory is short.
    """
    budget, there, processes = options.budget_read, next(model.parameters()).device.type, Processes.of_this_run()
    if options.stream == "off" or device.type not in streamed_base.DEVICES or there != "cpu" or unstreamable(model):
        return
    free = float(free_bytes(device))
    room = min(free, budget.value) if budget.kind == "total" else free
    if any(processes.of_each(frozen_bytes(model) > room)):
        layers = [*streamable_layers(model).values()]
        _with_main_memory(processes, model, layers, lambda: stream_base(model, device))


def _with_main_memory(
    processes: Processes, model: nn.Module, layers: Sequence[nn.Module], work: Callable[[], StreamedBase]
) -> StreamedBase:
    """Stream layers in each process, or in none: all of a machine look for room before any takes some."""
    processes.on_each(lambda: check_main_memory(model, layers, processes.on_this_machine))
    return processes.on_each(work)


class RunStreaming:
    """Streams the base of one run as its options and its budget ask.

    Args:
        run: the run.
        options: its options; see `PilotOptions.stream`.
    """

    def __init__(self, run: TrainingRun, options: PilotOptions) -> None:
        self._run, self._asked = run, options.stream
        self._own: StreamedBase | None = None

    @property
    def now(self) -> StreamedBase | None:
        """The streaming of the run's model; None without one."""
        return streaming_of(self._run.model)

    @property
    def count(self) -> int:
        """Number of streamed layers."""
        return len(self.now.layers) if self.now else 0

    def begin(self, count: int | None = None) -> None:
        """Stream what was asked for, or as many layers as an earlier part of the run did.

        Raises:
            ConfigError: the model streams, and the options forbid it; or it has fewer layers than are to be streamed.
            UnsupportedError: it cannot be streamed.
            ProcessError: weights that streamed before differ between processes.
        """
        self._compare()
        asked = self._asked if count is None else count
        if self.now:
            if asked == "off":
                raise ConfigError('The base of this model streams (`stream_base`), and stream="off" was given.')
            if isinstance(asked, int):
                self.now.keep(self._checked(asked, self.count))
        elif isinstance(asked, int) and asked:
            self._start(asked)

    def costs(
        self, measured: Callable[[], PlanCosts], budget: Budget, plain: IntArray, *, checkpoints: bool
    ) -> PlanCosts:
        """Return the costs of plans, and stream the base where plain LoRA does not fit beside all of it.

        Args:
            measured: measures the costs, and the limit that the budget sets.
            budget: the budget of the run.
            plain: the ranks of plain LoRA, int64 (modules,).
            checkpoints: True if layers may be checkpointed, as all are in the costs.

        Raises:
            BudgetError: the budget does not hold the base, which cannot be streamed.
        """
        auto = self._asked == "auto" and budget.kind == "total"
        movable = auto and self._run.device.type in streamed_base.DEVICES and not self.now
        reason = unstreamable(self._run.model)
        try:
            found = measured()
            fits = found.memory is None or found.memory.peak(plain, found.alone) <= found.limit.value
        except BudgetError as error:
            if movable and reason:
                raise BudgetError(f"{error} The base cannot be streamed: {reason}.") from error
            if not movable:
                raise
            fits = False
        if movable and not fits and not reason:
            self._start(len(streamable_layers(self._run.model)))
            found = measured()
        if self.now and auto and found.memory:
            taken = self._keep(found, found.memory, plain, checkpoints=checkpoints)
            found = replace(found, limit=replace(found.limit, value=found.limit.value - taken))
        return found

    def _keep(self, costs: PlanCosts, memory: MemoryModel, plain: IntArray, *, checkpoints: bool) -> int:
        """Keep layers on the device, in the least time (`kept_layers`); return their bytes."""
        assert self.now is not None, "the base streams"
        away, size, count = self.now.away_bytes, max(layer.bytes for layer in self.now.layers), self.count
        limit, shape = costs.limit.value, costs.alone or memory.shape
        none = memory.with_checkpointed(()) if checkpoints else memory
        spare = limit - none.peak(plain, shape), limit - memory.peak(plain, shape)
        again = len(fewest_checkpointed(memory, plain, limit, shape)) if checkpoints else 0
        seconds, rate = _seconds(self._run.model, memory), _bus_rate(self._run.device)
        kept = kept_layers(BaseLayers(count, (size,)), spare, again, seconds, rate)
        self.now.keep(self._run.replicas.processes.on_first(lambda: count - kept))  # also on cards of several kinds
        return away - self.now.away_bytes

    def told(self) -> str:
        """Describe what streams, for people; empty if nothing does."""
        if not (streaming := self.now) or not streaming.layers:
            return ""
        size, freed = format_bytes(streaming.main_memory_bytes), streaming.freed_bytes
        fewer = "nothing freed, as there is no GPU" if freed < 0 else f"{format_bytes(freed)} fewer on the device"
        return f"The frozen weights of {self.count} layers stream from main memory ({size}): the same losses, {fewer}."

    def end(self) -> None:
        """End the streaming that the run began; one that it found goes on."""
        if self._own:
            self._own.put_back()
            self._own = None

    def _start(self, count: int) -> None:
        layers = [*streamable_layers(self._run.model).values()]
        self._checked(count, len(layers))
        chosen = [layers[index] for index in spread(count, len(layers))]
        before = [self._signature(), self._signature()]
        _with_main_memory(self._run.replicas.processes, self._run.model, chosen, lambda: self._take(chosen))
        if before[0] == before[1] != self._signature():  # some kernels never repeat a result
            self.end()
            raise UnsupportedError(
                "With its base streamed, the first rows have another loss or gradient: this model reads frozen weights "
                'outside of the layers that hold them. Pass stream="off".'
            )

    def _take(self, layers: Sequence[nn.Module]) -> StreamedBase:
        self._own = StreamedBase(self._run.model, layers, self._run.device)
        return self._own

    def _compare(self) -> None:
        """Raise ProcessError if weights that streamed before differ between processes: DDP has not sent them."""
        processes, digest = self._run.replicas.processes, hashlib.sha256()
        if processes.count == 1:
            return
        for layer in self.now.layers if self.now else ():
            for weight in layer.weights:
                sample = weight.tensor.detach().reshape(-1)[:SAMPLE].cpu().contiguous()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        if len({*processes.of_each((self.count, digest.digest()))}) > 1:
            raise ProcessError(
                "The frozen weights that stream differ between processes. Load the same base in each, and stream the "
                "same layers, before DistributedDataParallel wraps the model."
            )

    def _signature(self) -> tuple[float, ...]:
        """Return the loss of two rows, and the sum of each trained parameter's gradient."""
        run = self._run
        trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]

        def work() -> tuple[float, ...]:
            torch.manual_seed(0)
            with gradients_put_back(trained):
                loss = run.loss(next(iter(run.small_batches(1, min(2, run.rows), 0))))
                loss.backward()  # type: ignore[no-untyped-call]
                sums = (p.grad.double().sum() for p in trained if p.grad is not None)
                return tuple(map(float, (loss.detach(), *sums)))

        return run.measured(work)

    @staticmethod
    def _checked(count: int, layers: int) -> int:
        if count > layers:
            raise ConfigError(f"stream={count}: this model has {layers} layers to stream.")
        return count


def _seconds(model: nn.Module, memory: MemoryModel) -> float:
    """Return the estimated seconds of the measured step, without checkpointing."""
    seconds = part_seconds_of(model, int(memory.recording.created.max()) + 1, 1)
    return float(seconds(np.array([memory.shape.rows]), np.array([memory.shape.length]), 0)[0])


def _bus_rate(device: torch.device) -> float:
    """Return the bytes per second that copies to a device reach."""
    try:
        card = find_device_spec(torch.cuda.get_device_name(device) if device.type == "cuda" else "1GiB")
    except UnknownNameError:
        card = find_device_spec("1GiB")
    return BUS_SHARE * card.bus_bytes_per_s
