"""`python -m benchmarks peft-experiment`: a plan for PEFT's own comparison, and what its row should show on an L40S.

The comparison (method_comparison/MetaMathQA) fine-tunes Llama-3.2-3B. Plans are one rank on one kind of modules of the
top layers, without exact savers and without gradient checkpointing, so that a plain `LoraConfig` says all. Bytes and
seconds come from the model's configuration; what was fitted is named on the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft import LoraConfig
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.common.files import read_object, write_json, write_text
from rankpilot.common.text import make_table
from rankpilot.cost.cards import REACHED_SHARE, find_device_spec
from rankpilot.cost.forecast.card_use import card_use
from rankpilot.cost.forecast.configured_step import ConfiguredStep
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_time import LAUNCH_SECONDS, Rates
from rankpilot.decide.plan.worth import Modules, packaged_worth
from rich.console import Console

from .harness import Figures
from .published import peft_step

CARD, ROWS, LAYERS = "L40S", 4, 28
KINDS = {
    "q and v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
    "all linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
RANKS = (16, 32, 64)
MOST_GIB, MOST_SECONDS = 16.0, 800.0

KNOWN_GIB, KNOWN_SECONDS = 20.76, 942.0
"""The row of LoRA with rank 32 on q and v, of which seconds are shares."""

PACES = ((1.0, REACHED_SHARE), (0.8, 0.5), (0.5, 0.7))
"""Shares of the card's rates of products and of bytes: the slowest share of the known row counts."""

STORED = Path(__file__).parent / "results" / "published.json"


@dataclass(frozen=True)
class Options:
    """Write an experiment for PEFT's comparison that takes at most 16 GiB and 800 s, and what its row should show.

    Attributes:
        output: the folder of the experiment.
        json: also write the figures to this file.
    """

    output: Path = Path("experiments/lora/llama-3.2-3B-rankpilot-16GiB")
    json: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A plan and what it takes.

    Attributes:
        kind: a key of `KINDS`.
        layers: that have adapters, from the top.
        rank: of all of them.
        gib: reserved at the most.
        seconds: of the whole run.
        loss: expected log loss beside rank 8 on all modules, and its standard deviation, in per cent.
    """

    kind: str
    layers: int
    rank: int
    gib: float
    seconds: float
    loss: tuple[float, float]

    @property
    def config(self) -> LoraConfig:
        """Its adapters, scaled as PEFT's best row of LoRA is (rsLoRA)."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=64,
            use_rslora=True,
            target_modules=list(KINDS[self.kind]),
            layers_to_transform=list(range(LAYERS - self.layers, LAYERS)),
            task_type="CAUSAL_LM",
        )


def plans(length: int) -> Iterator[Plan]:
    """All plans.

    Args:
        length: tokens of the longest batch; the mean one is taken to be half as long.
    """
    step, short = (peft_step(KINDS["all linear"], False, each, counted=True) for each in (length, length // 2))
    device, loaded = find_device_spec(CARD), step.model.frozen
    ends = np.array([target.name.rpartition(".")[2] for target in step.targets])
    blocks = np.array([target.block for target in step.targets])
    modules = Modules(np.isin(ends, KINDS["MLP"]), blocks / (LAYERS - 1), width=3072)
    for kind, names in KINDS.items():
        for layers in range(6, LAYERS + 1):
            for rank in RANKS:
                ranks = np.where(np.isin(ends, names) & (blocks >= LAYERS - layers), rank, 0)
                use = card_use(step.memory, ranks, loaded, device, shape=BatchShape(ROWS, length))
                seconds = KNOWN_SECONDS * float(_shares(short, ranks, ends).max())
                yield Plan(kind, layers, rank, use.reserved_bytes / 2**30, seconds, _loss(modules, ranks))


def _shares(step: ConfiguredStep, ranks: IntArray, ends: np.ndarray) -> FloatArray:
    """The time of a step as shares of that of the known row, by each of `PACES`."""
    rates, work = find_device_spec(CARD).rates, step.work
    assert rates is not None
    assert work is not None
    known = np.where(np.isin(ends, KINDS["q and v"]), 32, 0)
    times = [
        work.time(Rates(products * rates.flops_per_s["bf16"], memory * rates.bytes_per_s, 0.0, LAUNCH_SECONDS))
        for products, memory in PACES
    ]
    return np.array([time.seconds(ranks) / time.seconds(known) for time in times])


def _loss(modules: Modules, ranks: IntArray) -> tuple[float, float]:
    worth, features = packaged_worth(), modules.features(ranks[None])
    return 100 * float(worth.parts(features).sum()), 100 * float(worth.spread(features)[0])


def chosen(found: list[Plan]) -> Plan:
    """The plan with the least expected loss among those that keep both limits."""
    return min((p for p in found if p.gib <= MOST_GIB and p.seconds <= MOST_SECONDS), key=lambda plan: plan.loss[0])


def write_experiment(folder: Path, plan: Plan, length: int) -> None:
    """Write what the comparison reads, and the page of what its row should show."""
    plan.config.save_pretrained(str(folder))
    write_json(folder / "training_params.json", {"optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}})
    write_text(folder / "README.md", page(plan, length))


def page(plan: Plan, length: int) -> str:
    """What the row should show, and what would refute it."""
    what = f"rank {plan.rank} on {plan.kind} of the top {plan.layers} of {LAYERS} layers, rsLoRA, alpha 64"
    loss, spread = plan.loss
    return f"""# An experiment for PEFT's comparison

Llama-3.2-3B on MetaMathQA: {what}.
A plain `LoraConfig`: no gradient checkpointing, nothing of rankpilot at run time. `python -m benchmarks
peft-experiment` makes this folder; copy it into `method_comparison/MetaMathQA/experiments/lora/` and run
`python run.py -v experiments/lora/NAME` there.

| on an L40S | this experiment, predicted | LoRA, rank 32 on q and v, published |
|---|---:|---:|
| `accelerator_memory_max` | {plan.gib:.2f} GiB | {KNOWN_GIB} GiB |
| `train_time` | {plan.seconds:.0f} s | {KNOWN_SECONDS:.0f} s |

* Bytes follow from the configuration and the longest batch. Its length is not published: {length} tokens were fitted
  on the row of LoRA with rank 32. Four other rows are then met within 1 % (`python -m benchmarks published`).
  **Refuted** if a run on the same data reserves more than {1.03 * plan.gib:.2f} GiB.
* Seconds are a share of the published row, by counted work at three paces of the card of which the slowest counts; the
  mean batch is taken to be half as long as the longest. **Refuted** if the run takes more than
  {1.1 * plan.seconds / KNOWN_SECONDS:.2f} of the time of LoRA with rank 32 on the same machine.
* Of the plans of at most {MOST_GIB:g} GiB and {MOST_SECONDS:g} s it has the least expected loss: {loss:+.1f} % beside
  rank 8 on all modules, standard deviation {spread:.1f} %. That was learned on models far smaller than this one, so no
  accuracy is promised.
"""


def benchmark(options: Options, console: Console) -> Figures:
    """Weigh all plans, and write the experiment."""
    length = int(read_object(STORED)["peft_reserved.fitted_tokens"])
    found = list(plans(length))
    best = chosen(found)
    lines = [
        (p.kind, str(p.layers), str(p.rank), f"{p.gib:.2f}", f"{p.seconds:.0f}", f"{p.loss[0]:+.1f} ({p.loss[1]:.1f})")
        for p in sorted(found, key=lambda plan: plan.loss[0])
        if p.gib <= MOST_GIB and p.seconds <= MOST_SECONDS
    ]
    columns = ("modules", "layers", "rank", "GiB", "s", "expected loss, %")
    console.print(make_table("Plans within both limits, the best ten", columns, lines[:10]))
    write_experiment(options.output, best, length)
    console.print(f"written: {options.output}", highlight=False)
    return {"gib": best.gib, "seconds": best.seconds, "rank": best.rank, "layers": best.layers, "modules": best.kind}
