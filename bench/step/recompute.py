"""What a step takes when as few layers as a budget needs run again, beside running all of them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console

from ...common.tables import make_table
from ...common.units import format_bytes
from ...common.workers import isolated
from ...data.models import load_model
from ...errors import ConfigError
from ...finetune.recomputation import Recomputation
from ...lora.targets import unwrap
from ...memory.model import fewest_recomputed
from ...memory.tiled_loss import use_tiled_loss
from ..harness import Figures, clock_for, interleave, machine_facts, paired_ratios
from ..learner import Learner
from ..models import LORA, Size, random_loader, random_model

SMOLLM2 = "smollm2-135m-instruct"
BUDGETS = (0.85, 0.7, 0.55, 0.4)
"""Shares of what the step takes where no layer runs again and the loss has no tiles."""

KEYS = ("limit_bytes", "peak_bytes", "layers", "step_ratio", "equal")


@dataclass(frozen=True)
class Options:
    """Time a step of SmolLM2-135M (packaged) in which as few layers run again as a budget needs.

    The adapters have rank 8 on all linear modules everywhere, and the loss has tiles. Beside it stands the same step
    with all layers checkpointed, as transformers switches it on, and transformers' own loss. Both take turns on 4 x 256
    random tokens; loss and gradients of both are compared bit by bit. CPU time of one thread on a CPU. Takes about
    eight minutes.

    Attributes:
        rounds: how often each step is timed, at least 1.
        quick: under a minute: a small random Llama.
        json: also write the figures to this file, as flat JSON with names like "budget_70.step_ratio".
    """

    rounds: int = 3
    quick: bool = False
    json: Path | None = None


class _Steps:
    """The same model in steps that differ in the layers which run again."""

    def __init__(self, quick: bool) -> None:
        size = Size(layers=6, width=128, vocabulary=1024) if quick else Size(vocabulary=49_000, rows=4, length=256)
        base = random_model("llama", size, 0) if quick else load_model(SMOLLM2, "causal-lm", (), None)
        base.config.use_cache = False
        self.learner = Learner(base, LoraConfig(**LORA["llama"]))
        self.batch = next(iter(random_loader("llama", size, 0, batches=1)))
        self.ranks = np.array([target.rank for target in self.learner.targets], dtype=np.int64)
        self.without = self.learner.calibrate(self.batch).peak(self.ranks)
        self.recomputation = Recomputation(self.learner.model)
        self.memory = self.learner.calibrate(self.batch)
        self._base: Any = unwrap(self.learner.model).get_base_model()

    def everything(self) -> None:
        """All layers run again, inputs require gradients and the loss has no tiles, as transformers sets all three."""
        self.recomputation.all()
        self._base.enable_input_require_grads()
        vars(self._base).pop("_loss_function", None)

    def chosen(self, layers: tuple[str, ...]) -> None:
        """These layers run again, and the loss has tiles."""
        self._base.disable_input_require_grads()
        use_tiled_loss(self._base)
        self.recomputation.take(layers)

    def gradients(self) -> list[torch.Tensor]:
        """The loss and all gradients."""
        loss = self.learner.model(**self.batch).loss
        loss.backward()
        found = [loss.detach(), *(p.grad for p in self.learner.parameters if p.grad is not None)]
        self.learner.optimizer.zero_grad(set_to_none=True)
        return found


def measure(options: Options) -> Figures:
    """Bytes, layers and ratios of step times, for each budget."""
    steps = _Steps(options.quick)
    learner, batch = steps.learner, steps.batch
    figures: Figures = {}
    plans = {share: fewest_recomputed(steps.memory, steps.ranks, share * steps.without) for share in BUDGETS}
    steps.everything()
    learner.step(batch)  # the optimiser makes its state
    reference = steps.gradients()
    for share, layers in plans.items():
        steps.chosen(layers)
        name = f"budget_{round(100 * share)}"
        equal = all(map(torch.equal, steps.gradients(), reference))
        found: Figures = {"layers": len(layers), "equal": equal, "limit_bytes": share * steps.without}
        figures |= {f"{name}.{key}": value for key, value in found.items()}
        figures[f"{name}.peak_bytes"] = learner.measured_step(batch)
        steps.everything()
        reference = steps.gradients()  # the measured step has moved the weights

    def timed(switch: Callable[[], None]) -> Callable[[int], None]:
        def work(turn: int) -> None:
            switch()
            learner.step(batch)

        return work

    work = {f"budget_{round(100 * share)}": timed(partial(steps.chosen, layers)) for share, layers in plans.items()}
    device = batch["input_ids"].device
    seconds = interleave({"all": timed(steps.everything), **work}, options.rounds, device, clock=clock_for(device))
    for name in work:
        figures[f"{name}.step_ratio"] = float(np.median(paired_ratios(seconds[name], seconds["all"], 1)))
    return figures | {"all_s": float(np.median(seconds["all"])), "layers": len(steps.memory.segments)}


def benchmark(options: Options, console: Console) -> Figures:
    """Measure, print the table, and return all figures.

    Raises:
        ConfigError: `rounds` is below 1.
    """
    if options.rounds < 1:
        raise ConfigError(f"--rounds is at least 1; got {options.rounds}.")
    with isolated():
        figures = measure(options)
    rows = []
    for share in BUDGETS:
        of = {key: figures[f"budget_{round(100 * share)}.{key}"] for key in KEYS}
        rows.append(
            [
                f"{share:.0%}",
                format_bytes(float(of["limit_bytes"])),
                format_bytes(float(of["peak_bytes"]), up=True),
                f"{of['layers']} of {figures['layers']}",
                f"{of['step_ratio']:.2f}",
                "equal" if of["equal"] else "DIFFERENT",
            ]
        )
    columns = ("budget", "bytes", "measured peak", "layers that run again", "step time / all run again", "gradients")
    console.print(make_table(f"Recomputing as few layers as fit; all: {figures['all_s']:.2f} s a step", columns, rows))
    return {**machine_facts(torch.device("cpu")), "quick": options.quick, **figures}
