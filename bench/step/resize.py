"""How long a change of ranks takes: whole plans over up to a thousand modules of a 7B-like shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import nn

from ...common.devices import find_device
from ...lora.factors import write_in_place
from ...lora.resize import set_ranks
from ...lora.targets import TargetModule, find_target_modules
from ..harness import Figures, interleave, machine_facts, make_table, run_command

RANK = 16
SHAPES = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)) | {
    "gate_proj": (4096, 11008),
    "up_proj": (4096, 11008),
    "down_proj": (11008, 4096),
}
"""Inputs and outputs of the linear modules in a layer of Llama 2 7B."""

PLANS: dict[str, Callable[[int], int]] = {
    "half 16 to 8, half 16 to 24": lambda index: 8 if index % 2 else 24,
    "all 16 to 8": lambda index: 8,
    "all 16 to 24": lambda index: 24,
}
KEYS = dict(zip(PLANS, ("half", "shrink", "grow"), strict=True))
QUICK, FULL = (4, 8, 16), (36, 72, 143)
"""Layers."""


@dataclass(frozen=True)
class Resize:
    """Time whole plans of rank changes on adapters of a 7B-like shape, with AdamW's state.

    Layers have the seven linear modules of Llama 2 7B, at rank 16. The frozen weights have no memory here: a change
    of rank never reads them. Each plan is timed from the same start, in turns; the figure is the median.

    Attributes:
        quick: under a minute: a tenth of the modules.
        json: also write the figures to this file, as flat JSON with names like "modules_1001.seconds".
        device: auto is CUDA where there is one.
    """

    quick: bool = False
    json: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


def adapters(layers: int, device: torch.device) -> tuple[list[TargetModule], torch.optim.Optimizer]:
    """Filled rank-16 pairs on all modules of so many layers, and an AdamW that has taken a step."""
    base = nn.Module()
    base.layers = nn.ModuleList()
    for _ in range(layers):
        base.layers.append(nn.ModuleDict({n: nn.Linear(*shape, device="meta") for n, shape in SHAPES.items()}))
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=list(SHAPES)))
    for target in find_target_modules(model):
        for module in (target.layer.lora_A, target.layer.lora_B):
            module[target.adapter].to_empty(device=device)
    targets = find_target_modules(model)
    parameters = [weight for target in targets for weight in (target.weight_a, target.weight_b)]
    optimizer = torch.optim.AdamW(parameters)
    reset_runs(targets, optimizer)
    return targets, optimizer


def reset_runs(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer) -> None:
    """Random factors and state at the first rank."""
    optimizer.state.clear()
    for target in targets:
        for weight, shape in ((target.weight_a, (RANK, target.d_in)), (target.weight_b, (target.d_out, RANK))):
            write_in_place(weight, torch.rand(shape, device=weight.device) - 0.5)
            weight.grad = torch.rand_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_plans(layers: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each plan over the adapters of so many layers."""
    targets, optimizer = adapters(layers, device)

    def run(plan: Mapping[str, int], turn: int) -> None:
        set_ranks(targets, plan, optimizer, step=turn)

    medians = {}
    for title, rank_of in PLANS.items():
        plan = {target.name: rank_of(index) for index, target in enumerate(targets)}
        reset_runs(targets, optimizer)
        again = partial(_again, targets, optimizer)
        seconds = interleave({title: partial(run, plan)}, rounds, device, after_round=again)[title]
        medians[title] = float(np.median(seconds))
    return medians


def _again(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer, turn: int) -> None:
    reset_runs(targets, optimizer)


def benchmark(options: Resize, console: Console) -> Figures:
    """Time every plan at three sizes, print the table, and return all figures."""
    device = find_device(options.device)
    figures: Figures = {**machine_facts(device), "quick": options.quick}
    sizes, rounds = (QUICK if options.quick else FULL), 3
    rows = []
    for layers in track(sizes, "plans", console=Console(stderr=True), transient=True):
        count = layers * len(SHAPES)
        medians = time_plans(layers, rounds, device)
        rows.append((str(count), *(f"{s:.2f} s ({1e3 * s / count:.2f} ms a module)" for s in medians.values())))
        figures |= {f"modules_{count}.{KEYS[title]}_seconds": seconds for title, seconds in medians.items()}
    console.print(make_table("One plan, all of it: weights, AdamW's state, bookkeeping", ("modules", *PLANS), rows))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Resize, args=arguments, prog="rankpilot bench resize")
    return run_command(partial(benchmark, options), options.json)
