"""`python -m benchmarks streaming`: a streamed base on a CPU: equal losses, what hooks cost, what stays in memory.

Main memory stands for the card here, and a file for main memory: the streamed weights lie in one, mapped. Files can be
dropped from memory and read again, so what a process must hold is its anonymous memory.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.text import format_bytes
from rankpilot.cost.savers import streamed_base
from rankpilot.cost.savers.streamed_base import StreamedBase, streamable_layers
from rankpilot.data.models import resolve_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from .harness import Figures, clock_for, estimate_figures, interleave, machine_facts, usual_ratio

CPU, MODEL = torch.device("cpu"), "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Stream the base of SmolLM2-135M on this CPU: losses, time of a step, and memory that the process must hold.

    Attributes:
        rounds: timed steps of each kind.
        length: tokens of the two rows of a batch.
        quick: a few short steps.
        json: also write figures to this file.
    """

    rounds: int = 12
    length: int = 256
    quick: bool = False
    json: Path | None = None


def new_model() -> Any:
    """The model with adapters, the same ones at each call."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32)
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()  # loaded weights are mapped from their file
    return get_peft_model(base, LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear")).train()


def step(model: Any, length: int, number: int) -> float:
    """One step on random tokens; returns the loss, plus the sum of all gradients."""
    ids = torch.randint(0, 40_000, (2, length), generator=torch.Generator().manual_seed(number))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    told = float(loss.detach())
    for parameter in model.parameters():
        if parameter.grad is not None:
            told += float(parameter.grad.double().sum())
            parameter.grad = None
    return told


def anonymous_bytes() -> int:
    """Bytes that this process holds and no file backs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def map_to_file(streaming: StreamedBase, folder: Path) -> None:
    """Put the weights that are streamed into a file."""
    for number, weight in enumerate(weight for layer in streaming.layers for weight in layer.weights):
        there, path = weight._there, folder / f"{number}.bin"
        mapped = torch.from_file(str(path), shared=True, size=there.numel(), dtype=there.dtype).view(there.shape)
        mapped.copy_(there)
        weight.tensor.data = weight._there = mapped


def benchmark(options: Options, console: Console) -> Figures:
    """Compare streamed steps with resident ones, in losses, CPU time and memory."""
    rounds, length = (3, 64) if options.quick else (options.rounds, options.length)
    models = {"resident": new_model(), "hooks": new_model(), "streamed": new_model()}
    with patch.object(streamed_base, "LEAST_BYTES", 2**60):  # no weight is as large: hooks alone
        StreamedBase(models["hooks"], [*streamable_layers(models["hooks"]).values()], CPU)
    before = anonymous_bytes()
    streaming = StreamedBase(models["streamed"], [*streamable_layers(models["streamed"]).values()], CPU)
    with TemporaryDirectory() as folder:
        map_to_file(streaming, Path(folder))
        freed, layers = before - anonymous_bytes(), streaming.main_memory_bytes
        losses: dict[str, list[float]] = {name: [] for name in models}

        def work(name: str) -> Any:
            return lambda number: losses[name].append(step(models[name], length, number))

        seconds = interleave({name: work(name) for name in models}, rounds, CPU, clock=clock_for(CPU))
        streaming.put_back()
    ratios = {name: usual_ratio(seconds[name][1:], seconds["resident"][1:]) for name in ("hooks", "streamed")}
    equal = losses["resident"] == losses["hooks"] == losses["streamed"]
    console.print(f"Losses and gradients of {rounds} steps are {'equal bit for bit' if equal else 'NOT EQUAL'}.")
    hooks, whole = (ratios[name].value for name in ("hooks", "streamed"))
    console.print(f"CPU time of a step over a resident base's: hooks alone {hooks:.3f}, streamed {whole:.3f}.")
    console.print(f"Memory freed at rest: {format_bytes(freed)} of the layers' {format_bytes(layers)}.")
    found: Figures = {"equal": equal, "freed_bytes": freed, "layer_bytes": layers, **machine_facts(CPU)}
    for name, ratio in ratios.items():
        found |= estimate_figures(name, ratio)
    return found
