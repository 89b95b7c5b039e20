"""The peak of one step as the operating system, or CUDA's allocator, reports it; each plan runs in a new process.

An allocator keeps the memory of a larger step, which would hide the peak of a smaller one after it. On Linux each plan
runs twice: as it is, and with `MALLOC_MMAP_THRESHOLD_` set, so that glibc gives freed tensors back to the system. By
default glibc raises that threshold while the process runs (mallopt(3)), and keeps holes between tensors of the heap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from rankpilot.common.errors import RankPilotError
from rankpilot.cost.batch_shape import Batch
from rankpilot.cost.record.model_states import state_bytes
from rankpilot.cost.record.peak_meter import resident_peak, restart_resident_peak

from .models import LORA, Family, Learner, Size, random_loader, random_model

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def large_learner(family: Family, size: Size, device: torch.device, seed: int) -> tuple[Learner, Batch]:
    """A random model with adapters and a batch, the same ones for the same arguments."""
    learner = Learner(random_model(family, size, seed).to(device), LoraConfig(**LORA[family]), seed=seed)
    batch = next(iter(random_loader(family, size, seed, batches=1)))
    return learner, {name: tensor.to(device) for name, tensor in batch.items()}


def observe(family: Family, size: Size, ranks: Sequence[int], device: torch.device, seed: int) -> dict[str, int]:
    """Run one step of a plan in a fresh process and look at it from outside.

    Returns:
        Bytes at the peak beside the loaded model: on a CPU "resident" and "resident_given_back" (see above), on CUDA
        "allocated" and "reserved".

    Raises:
        RankPilotError: the process failed.
    """
    given = {"family": family, "size": vars(size), "ranks": list(ranks), "device": str(device), "seed": seed}
    if device.type == "cuda":
        return _in_process(given, {})
    with ThreadPoolExecutor(2) as pool:
        usual, giving_back = pool.map(partial(_in_process, given), ({}, GIVING_BACK))
    return usual | {"resident_given_back": giving_back["resident"]}


def _in_process(given: dict[str, Any], environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.resident", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise RankPilotError(f"The process that measures one step failed: {done.stderr.strip().splitlines()[-1:]}")
    seen: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return seen


def _measure(given: dict[str, Any]) -> dict[str, int]:
    """The child's work: a small step for the optimiser's state and the libraries, then the step itself."""
    device = torch.device(given["device"])
    learner, batch = large_learner(given["family"], Size(**given["size"]), device, given["seed"])
    learner.set_ranks(given["ranks"])
    learner.step({name: tensor[:2] for name, tensor in batch.items()})
    held = state_bytes(learner.model, learner.optimizer, gradients=False)
    rises = _cuda_rises if device.type == "cuda" else _resident_rise
    return {name: held + rise for name, rise in rises(learner, batch).items()}


def _cuda_rises(learner: Learner, batch: Batch) -> dict[str, int]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    learner.step(batch)
    torch.cuda.synchronize()
    return {
        "allocated": torch.cuda.max_memory_allocated() - allocated,
        "reserved": torch.cuda.max_memory_reserved() - reserved,
    }


def _resident_rise(learner: Learner, batch: Batch) -> dict[str, int]:
    before = restart_resident_peak()
    if before is None:
        raise RankPilotError("This system keeps no record of the peak that can be started anew.")
    learner.step(batch)
    return {"resident": resident_peak() - before}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(json.loads(sys.argv[1]))) + "\n")
