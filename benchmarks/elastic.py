"""`python -m benchmarks elastic`: another process takes memory in the middle of runs, and gives it back.

Run and process share a room that is a fifth more than what a step takes. The budget is a function that tells what the
other process leaves of it, read from the system before each step. Each trial is held against the same run undisturbed.
In every second one no layer may run again, so that ranks have to fall.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rankpilot.common.text import format_bytes
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.plan_keeper import GOOD_STEPS
from rich.console import Console
from rich.progress import track

from .harness import Figures, machine_facts
from .texts import TextTask, adapted_model, factor_at, held_out_loss, new_loader, training_run

STEPS, RATE = 70, 8e-3

ROOM = 1.2
"""What there is, over what a step takes."""

TAKEN = 0.3
"""What the other process takes of it."""

OTHER = """
import mmap, sys
print("here", flush=True)
for line in iter(sys.stdin.readline, ""):
    taken = mmap.mmap(-1, int(line) + 1)
    for page in range(0, int(line), 4096):
        taken[page] = 1
    print("taken", flush=True)
"""
"""A process that takes as many bytes as each line of its input says."""

ON_CUDA = """
import sys, torch
taken = torch.zeros(1, device="cuda")
print("here", flush=True)
for line in iter(sys.stdin.readline, ""):
    taken = None
    torch.cuda.empty_cache()
    taken = torch.empty(int(line) + 1, dtype=torch.uint8, device="cuda")
    print("taken", flush=True)
"""
"""A process that takes as many bytes of the GPU as each line of its input says."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Another process takes 30 % of the memory in mid-run and gives it back: does the run go on, and at what loss?

    Attributes:
        trials: runs with another text, and other moments.
        quick: one trial, told as it goes.
        json: also write figures to this file.
    """

    trials: int = 20
    quick: bool = False
    json: Path | None = None


class Other:
    """Another process, and what it holds beside what it needs to live."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._line()
        self._memory = psutil.Process(process.pid)
        self._before = self._memory.memory_info().rss

    def _line(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def take(self, size: int) -> None:
        """Hold so many bytes."""
        print(size, file=self._process.stdin)
        self._line()

    def held(self) -> int:
        """The bytes that it holds by the system's account."""
        return int(max(0, self._memory.memory_info().rss - self._before))


@contextmanager
def other_process(code: str = OTHER) -> Iterator[Other]:
    """Another process, which runs this code until the end of the block."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        yield Other(process)
        assert process.stdin is not None
        process.stdin.close()


def trial(number: int, other: Other | None, tell: Callable[[str], None]) -> dict[str, float]:
    """One run; without another process nothing disturbs it.

    Args:
        number: decides text, model and moments.
        other: takes memory, and gives it back.
        tell: gets a line for each thing that happens.
    """
    generator = np.random.default_rng([44, number])
    text = ("french", "russian", "code", "tales")[number % 4]
    task = TextTask("llama-8x32", text, STEPS, 16)
    model = adapted_model(task, number)
    run = training_run(task, model, RATE, number)
    checkpointing = False if number % 2 else "auto"
    pilot = RankPilot(
        budget="100%",
        seed=number,
        gradient_checkpointing=checkpointing,
        measure_every=1,
        tell=tell,
    )
    pilot.begin(run)
    room = int(ROOM * pilot.predictions[0][1])
    at, back = int(generator.integers(8, 20)), int(generator.integers(28, 40))
    if other:
        pilot.set_budget(lambda: room - other.held())
    sizes, steps, above, returned = [], 0, 0, math.inf
    for step, batch in enumerate(new_loader(task, number)):
        if other and step in (at, back):
            taken = int(TAKEN * room) if step == at else 0
            other.take(taken)
            tell(
                f"another process {f'takes {format_bytes(taken)}' if taken else 'gives it back'} before step {step + 1}"
            )
        for group in run.optimizer.param_groups:
            group["lr"] = RATE * factor_at(step, STEPS)
        pilot.before_step(batch)
        loss = model(**batch).loss
        loss.backward()
        pilot.before_optimizer_step(loss.detach())
        run.optimizer.step()
        run.optimizer.zero_grad()
        pilot.after_step()
        steps += 1
        above += pilot.peaks[-1][1] > pilot.limit
        assert pilot.applier is not None
        sizes.append((int(pilot.figures().get("checkpointed_layers", 0)), int(pilot.applier.ranks.sum())))
        if step >= back and sizes[-1] == sizes[0]:
            returned = min(returned, step - back + 1)
    pilot.finish()
    found = held_out_loss(model, task)
    layers, ranks = zip(*sizes, strict=True)
    lost = 1 - min(ranks) / ranks[0]
    return {"loss": found, "steps": steps, "above": above, "layers": max(layers), "lost": lost, "returned": returned}


def benchmark(options: Options, console: Console) -> Figures:
    """Run the trials."""
    numbers = range(1 if options.quick else options.trials)
    disturbed, alone = [], []

    def tell(line: str) -> None:
        if options.quick:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    with other_process() as other:
        for number in track(numbers, "trials", console=console, transient=True):
            disturbed.append(trial(number, other, tell))
            alone.append(trial(number, None, lambda line: None))
    figures: dict[str, Any] = {
        "trials": len(disturbed),
        "went on": sum(one["steps"] == STEPS for one in disturbed),
        "steps above the budget": sum(one["above"] for one in disturbed),
        "back after steps, worst": max(one["returned"] for one in disturbed),
        "good steps asked for": GOOD_STEPS,
    }
    changes = [100 * math.log(one["loss"] / two["loss"]) for one, two in zip(disturbed, alone, strict=True)]
    for kind, first in (("layers run again", 0), ("ranks fall", 1)):
        if found := changes[first::2]:
            figures |= {f"{kind}, loss, mean %": float(np.mean(found)), f"{kind}, loss, worst %": max(found)}
    figures["most layers run again"] = max(one["layers"] for one in disturbed)
    figures["most rank lost for a while, %"] = 100 * max(one["lost"] for one in disturbed)
    for name, value in figures.items():
        console.print(f"{name}: {value:.3g}", markup=False)
    return {**machine_facts(torch.device("cpu")), **figures}
