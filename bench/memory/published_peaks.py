"""Published peaks of real fine-tunes on GPUs, beside predictions from the models' configurations alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...memory.batch_shape import BatchShape
from ...memory.cost import moment_costs
from ...memory.find_configuration import find_configuration
from ...memory.from_config import ConfiguredStep, LoadedAs, from_config
from ...memory.step_config import StepConfig

FOLDER = Path(__file__).with_name("published")
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
    predicted = _total(step, BatchShape(row.rows, row.length), row.rank)
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
        checkpointing=True,
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
        return _total(steps[index], BatchShape(4, length), rows[index]["r"])

    length = min(LENGTHS, key=lambda length: abs(predicted(0, length) - rows[0]["reserved_mib"]))
    return [Compared(row["name"], predicted(i, length), row["reserved_mib"]) for i, row in enumerate(rows)]


@cache
def peft_step(targets: tuple[str, ...], dora: bool) -> ConfiguredStep:
    """The training step of a run of PEFT's benchmark."""
    step = StepConfig(batch_size=4, max_length=LENGTHS.stop, target_modules=",".join(targets))
    loaded = LoadedAs(padded=True, keeps_output=True, adapter={"use_dora": True} if dora else {})
    return from_config("llama-3.2-3b", step, loaded)


def _total(step: ConfiguredStep, shape: BatchShape, rank: int) -> float:
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
