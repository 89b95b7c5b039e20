"""`python -m benchmarks published`: predictions from configurations, beside peaks that others measured on GPUs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankpilot.common.text import make_table
from rankpilot.cost.breakdown import frozen_sizes
from rankpilot.cost.cost import moment_costs
from rankpilot.cost.from_config import ConfiguredStep, LoadedAs, from_config
from rankpilot.cost.outlook import CardUse, card_use
from rankpilot.cost.published import find_configuration, find_device_spec
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from rich.console import Console

from .harness import Figures, with_progress

FOLDER = Path(__file__).with_name("published_peaks")
MIB = 2**20

SHORT_NAMES = {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b"}
"""Models whose ids are not those of the table."""

LENGTHS = range(500, 901)
"""Among which the unpublished length of PEFT's longest batch is fitted."""


@dataclass(frozen=True)
class T4Row:
    """One step on a T4; bytes in MiB.

    Attributes:
        model: a Hugging Face id.
        attention: eager or sdpa.
        quantization: none or nf4.
        rows: of the batch.
        length: tokens of each.
        rank: of the adapters on q, k, v and o.
        measured: the peak of what was allocated.
        resident: what was allocated before the step.
        reserved: the most that torch's allocator held.
    """

    model: str
    attention: str
    quantization: str
    rows: int
    length: int
    rank: int
    measured: float
    resident: float
    reserved: float

    @property
    def name(self) -> str:
        """Model and setting, for people."""
        return f"{self.model.rpartition('/')[2]} {self.attention} {self.quantization} {self.rows} x {self.length}"


@dataclass(frozen=True)
class Compared:
    """A predicted and a published peak, in MiB.

    Attributes:
        name: of the run.
        predicted: the frozen model, the step and cuBLAS.
        measured: as published.
        left: what loading left allocated beside the weights, which no configuration tells; 0 if it is not published.
    """

    name: str
    predicted: float
    measured: float
    left: float = 0.0

    @property
    def error(self) -> float:
        """Relative; above 0 where the prediction is too high."""
        return self.predicted / self.measured - 1

    @property
    def error_with_left(self) -> float:
        """The error once what loading left is counted."""
        return (self.predicted + max(self.left, 0.0)) / self.measured - 1


def t4_rows() -> list[T4Row]:
    """All published steps on a T4; steps of one model and setting follow each other."""
    with (FOLDER / "t4_peaks.csv").open() as file:
        rows = [
            T4Row(
                model=row["model"],
                attention=row["attention"],
                quantization=row["quantization"],
                rows=int(row["rows"]),
                length=int(row["length"]),
                rank=int(row["rank"]),
                measured=float(row["measured_mib"]),
                resident=float(row["resident_mib"]),
                reserved=float(row["reserved_mib"]),
            )
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: (row.model, row.attention, row.quantization))


def compare_t4(row: T4Row) -> Compared:
    """Predict a step on a T4."""
    step = t4_step(row.model, row.attention, row.quantization)
    predicted = total_mib(step, BatchShape(row.rows, row.length), row.rank)
    weights = float(step.memory.states.weights.sum()) * row.rank
    return Compared(row.name, predicted, row.measured, row.resident - (step.frozen_bytes + weights) / MIB)


@cache
def t4_step(model: str, attention: str, quantization: Any) -> ConfiguredStep:
    """The training step of a setting."""
    config = find_configuration(SHORT_NAMES.get(model, model))
    config._attn_implementation = attention
    step = StepConfig(
        batch_size=4,
        max_length=2048,
        target_modules="q_proj,k_proj,v_proj,o_proj",
        quantization=quantization,
        gradient_checkpointing=True,
        exact_savers=False,
    )
    return from_config(
        config,
        step,
        LoadedAs(
            dtype=torch.float16,
            attention="efficient",
            double_quantization=False,
            input_gradients=True,
            keeps_output=True,
        ),
    )


def compare_peft() -> list[Compared]:
    """Predict the runs of PEFT's benchmark; the length of their longest batch is fitted on the first."""
    rows = json.loads((FOLDER / "peft_llama32_3b.json").read_text())["rows"]
    steps = [peft_step(tuple(row["target_modules"]), row.get("use_dora", False)) for row in rows]

    def predicted(index: int, length: int) -> float:
        return total_mib(steps[index], BatchShape(4, length), rows[index]["r"])

    length = min(LENGTHS, key=lambda length: abs(predicted(0, length) - rows[0]["reserved_mib"]))
    return [Compared(row["name"], predicted(i, length), row["reserved_mib"]) for i, row in enumerate(rows)]


@cache
def peft_step(targets: tuple[str, ...], dora: bool) -> ConfiguredStep:
    """The training step of a run of PEFT's benchmark."""
    step = StepConfig(batch_size=4, max_length=LENGTHS.stop, target_modules=",".join(targets), exact_savers=False)
    loaded = LoadedAs(padded=True, keeps_output=True, adapter={"use_dora": True} if dora else {})
    return from_config("llama-3.2-3b", step, loaded)


def total_mib(step: ConfiguredStep, shape: BatchShape, rank: int) -> float:
    """MiB on the card with one rank on all target modules."""
    ranks = np.full(len(step.targets), rank)
    peak = float(moment_costs(step.memory.cost(shape), ranks).max())
    return (peak + step.frozen_bytes + step.workspace_bytes) / MIB


def summary(errors: Iterable[float]) -> tuple[float, float, float]:
    """Mean size, largest size and lowest value of errors, in per cent."""
    values = 100 * np.array(list(errors))
    return float(np.abs(values).mean()), float(np.abs(values).max()), float(values.min())


def quick_rows(rows: Sequence[T4Row]) -> list[T4Row]:
    """The first step of each setting of the smallest models."""
    small = [row for row in rows if "135M" in row.model or "TinyLlama" in row.model]
    return list({(row.model, row.attention, row.quantization): row for row in small[::-1]}.values())


CARD_MIB = 14_000
"""The part of a T4's memory for which verdicts are compared."""

SMALLER_CARDS_MIB = range(2048, CARD_MIB, 1024)
"""Smaller cards, on which some of the steps do not fit."""


@dataclass(frozen=True)
class Reserved:
    """A predicted and a published step on a T4.

    Attributes:
        row: as published.
        use: of the card, as predicted.
    """

    row: T4Row
    use: CardUse

    @property
    def compared(self) -> Compared:
        """Reserved bytes, without the context."""
        return Compared(self.row.name, self.use.reserved_bytes / MIB, self.row.reserved)

    @property
    def kind(self) -> str:
        """The setting on which the error depends, such as "sdpa none"."""
        return f"{self.row.attention} {self.row.quantization}"

    def verdict_is_right(self, card_mib: float) -> bool:
        """Whether the verdict for a card of this size is the one that the published figures give."""
        device = replace(self.use.device, memory_bytes=int(card_mib * MIB))
        measured = replace(
            self.use,
            device=device,
            step_bytes=int(self.row.measured * MIB) - self.use.base_bytes,
            reserve_bytes=int((self.row.reserved - self.row.measured) * MIB),
            margin_bytes=0,
        )
        return replace(self.use, device=device).verdict == measured.verdict


def reserve_on_t4(row: T4Row) -> Reserved:
    """Predict what a step on a T4 takes; torch's AdamW with its defaults copies all adapters for a while."""
    step = t4_step(row.model, row.attention, row.quantization)
    states = replace(step.memory.states, scratch=step.memory.states.weights)
    memory = replace(step.memory, states=states)
    ranks = np.full(len(step.targets), row.rank)
    shape = BatchShape(row.rows, row.length)
    return Reserved(row, card_use(memory, ranks, _loaded(step), find_device_spec("T4"), shape=shape))


def right_verdicts(rows: Sequence[Reserved]) -> tuple[int, int]:
    """Right verdicts, and all verdicts, over `SMALLER_CARDS_MIB`."""
    right = [row.verdict_is_right(size) for row in rows for size in SMALLER_CARDS_MIB]
    return sum(right), len(right)


def reserve_of_peft() -> list[Compared]:
    """Predict the runs of PEFT's benchmark; the length of their longest batch is fitted on the first."""
    rows = json.loads((FOLDER / "peft_llama32_3b.json").read_text())["rows"]

    def predicted(row: dict[str, Any], length: int) -> float:
        step = peft_step(tuple(row["target_modules"]), row.get("use_dora", False))
        ranks = np.full(len(step.targets), row["r"])
        use = card_use(step.memory, ranks, _loaded(step), find_device_spec("L40S"), shape=BatchShape(4, length))
        return use.reserved_bytes / MIB

    length = min(LENGTHS, key=lambda length: abs(predicted(rows[0], length) - rows[0]["reserved_mib"]))
    return [Compared(row["name"], predicted(row, length), row["reserved_mib"]) for row in rows]


@cache
def _loaded(step: ConfiguredStep) -> tuple[int, ...]:
    return tuple(frozen_sizes(step.model))


TIMED = ("llama-3.1-8b", "llama-3.1-70b")

_TIMED_CODE = """
import json, resource, sys, time
from rankpilot.cost.from_config import from_config
from rankpilot.cost.step_config import StepConfig
step = StepConfig(batch_size=4, max_length=2048, gradient_checkpointing=True)
before = time.process_time()
from_config(sys.argv[1], step).memory.cost()
print(json.dumps([time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


@dataclass(frozen=True)
class Options:
    """Predict published peaks of LoRA fine-tunes from configurations alone, without a GPU.

    The peaks are of 43 steps on a Tesla T4 (fitcheck-llm, MIT licence) and of PEFT's benchmark of Llama-3.2-3B on an
    L40S, where the length of the longest batch is fitted on the first run. Two more models are timed: CPU seconds and
    resident memory of a fresh process.

    Attributes:
        quick: under a minute: a few small models.
        json: also write the figures to this file, as flat JSON with names like "t4.mean_percent".
    """

    quick: bool = False
    json: Path | None = None


def benchmark(options: Options, console: Console) -> Figures:
    """Predict, print the tables, and return all figures."""
    rows = quick_rows(t4_rows()) if options.quick else t4_rows()
    on_t4 = [compare_t4(row) for row in with_progress(rows, "steps on a T4")]
    figures = _report("t4", "Steps on a T4, MiB allocated", on_t4, console)
    _, _, under = summary(run.error_with_left for run in on_t4)
    console.print(f"With what loading left, none is under by more than {max(-under, 0):.2f} %.", highlight=False)
    figures["t4.under_with_left_percent"] = under
    figures |= _report_reserve([reserve_on_t4(row) for row in rows], console)
    if not options.quick:
        figures |= _report("peft", "PEFT's Llama-3.2-3B on an L40S, MiB allocated", compare_peft(), console)
        figures |= _report("peft_reserved", "The same, MiB reserved", reserve_of_peft(), console)
    for model in TIMED[:1] if options.quick else TIMED:
        seconds, gib = timed(model)
        console.print(f"{model}: {seconds:.1f} s of CPU, {gib:.2f} GiB resident", highlight=False)
        figures |= {f"time.{model}.cpu_s": seconds, f"time.{model}.resident_gib": gib}
    return figures


def _report(key: str, title: str, runs: list[Compared], console: Console) -> Figures:
    lines = [(run.name, f"{run.predicted:.0f}", f"{run.measured:.0f}", f"{100 * run.error:+.2f}") for run in runs]
    console.print(make_table(title, ("run", "predicted", "measured", "error, %"), lines))
    mean, worst, under = summary(run.error for run in runs)
    console.print(f"mean {mean:.2f} %, worst {worst:.2f} %, lowest {under:+.2f} %", highlight=False)
    return {f"{key}.mean_percent": mean, f"{key}.worst_percent": worst, f"{key}.under_percent": under}


def _report_reserve(runs: list[Reserved], console: Console) -> Figures:
    """What the allocator reserves, by kind of attention and weights, and verdicts."""
    figures: Figures = {}
    for kind in sorted({run.kind for run in runs}):
        of_kind = [run.compared for run in runs if run.kind == kind]
        figures |= _report(f"t4_reserved.{kind.replace(' ', '_')}", f"MiB reserved: {kind}", of_kind, console)
    right = sum(run.verdict_is_right(CARD_MIB) for run in runs)
    on_smaller, of = right_verdicts(runs)
    console.print(
        f"verdicts for {CARD_MIB:,} MiB: {right} of {len(runs)} right; for smaller cards {on_smaller} of {of}",
        highlight=False,
    )
    return figures | {"t4_verdicts.wrong": len(runs) - right, "t4_verdicts.smaller_right_share": on_smaller / of}


def timed(model: str) -> tuple[float, float]:
    """CPU seconds of a prediction in a fresh process, without the imports, and GiB that it holds at most."""
    command = [sys.executable, "-c", _TIMED_CODE, model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gib = json.loads(done.stdout.splitlines()[-1])
    return seconds, gib
