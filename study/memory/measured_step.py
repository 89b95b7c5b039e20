"""Real training steps, measured: bytes of tensors, and what the process or the allocator took for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...memory import resident
from ...memory.model_states import state_bytes
from ...memory.peak_meter import PeakMeter
from .setup import StepSetup


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step. The frozen model does not count unless it is named. None: the system does not report it.

    Attributes:
        peak_bytes: bytes of live tensors on the CPU, bytes that the allocator had handed out on CUDA.
        resident_bytes: how far the process's resident memory rose above what it was without training state (CPU).
        process_bytes: the process's peak resident memory, the model and all libraries included (CPU).
        reserved_bytes: what the allocator had reserved, the model included (CUDA).
    """

    peak_bytes: int
    resident_bytes: int | None = None
    process_bytes: int | None = None
    reserved_bytes: int | None = None


def measure_step(setup: StepSetup) -> MeasuredStep:
    """Train one step, which makes the optimiser's state, then measure further steps. The adapters change."""
    _step(setup)
    state = state_bytes(setup.model, setup.run.optimizer, gradients=False)
    if setup.run.device.type == "cuda":
        torch.cuda.empty_cache()
    meter = PeakMeter()
    meter.begin(setup.model, setup.run.optimizer)
    _step(setup)
    reserved = torch.cuda.max_memory_reserved(setup.run.device) if setup.run.device.type == "cuda" else None
    peak = meter.end(1)
    assert peak is not None, "the step was measured"
    if reserved is not None:
        return MeasuredStep(peak, reserved_bytes=reserved)
    before = resident.restart_peak()
    if before is None:
        return MeasuredStep(peak)
    _step(setup)
    highest = resident.peak()
    return MeasuredStep(peak, highest - before + state, highest)


def _step(setup: StepSetup) -> None:
    for _ in range(setup.config.accumulation):
        (setup.run.loss(setup.batch) / setup.config.accumulation).backward()  # type: ignore[no-untyped-call]
    setup.run.optimizer.step()
    setup.run.optimizer.zero_grad(set_to_none=True)
