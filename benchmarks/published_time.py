"""`python -m benchmarks published-time`: seconds of steps that others measured, by counted work and three constants.

What a step computes is counted from the model's configuration, operator by operator. A card has three constants: the
shares of its published rates that large products and memory reach, and what an operator takes beside its work. They are
fitted on half of the rows of a card, and judged on the other half.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankpilot.common.arrays import FloatArray
from rankpilot.common.text import make_table
from rankpilot.cost.from_config import ConfiguredStep, LoadedAs, from_config
from rankpilot.cost.published import device_table, find_configuration
from rankpilot.cost.step_config import StepConfig
from rankpilot.cost.step_time import Rates
from rich.console import Console
from scipy.optimize import minimize
from transformers import Qwen2Config

from .harness import Figures, rank_correlation, with_progress
from .published import FOLDER, libraries_of_2024

CARD = "A100 80GB"

ACCUMULATED = 8
"""Batches of one row whose gradients make a step of Qwen's."""

QWEN: dict[str, dict[str, int]] = {
    "Qwen-1.8B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504},
    "Qwen-7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "Qwen-14B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13696},
}
"""Sizes of Qwen's first models, which are Qwen2's with as many heads of keys as of queries."""


@dataclass(frozen=True)
class Options:
    """Predict published seconds of LoRA steps on an A100, without a GPU: Qwen's README, and fms-acceleration.

    Three constants are fitted on every second row, and judged on the others: seconds of held rows, and shares of two
    rows.

    Attributes:
        json: also write the figures to this file.
    """

    json: Path | None = None


@dataclass(frozen=True)
class TimeRow:
    """A published step.

    Attributes:
        name: of model and setting.
        quantization: none or nf4; the rows in four bits are of GPTQ, which is priced as nf4.
        rows: of a batch.
        length: tokens of each.
        batches: of a step.
        seconds: of a step.
    """

    name: str
    quantization: str
    rows: int
    length: int
    batches: int
    seconds: float


def time_rows() -> list[TimeRow]:
    """LoRA on one card; what trains embeddings or all weights, and several cards, are left out."""
    rows = []
    with (FOLDER / "qwen_a100.csv").open() as file:
        for row in csv.DictReader(file):
            kind = {"LoRA": "none", "Q-LoRA": "nf4"}.get(row["method"])
            if kind and row["model"] in QWEN:
                rows.append(TimeRow(row["model"], kind, 1, int(row["seq"]), ACCUMULATED, float(row["s_per_it"])))
    with (FOLDER / "a100_peaks.csv").open() as file:
        for row in csv.DictReader(file):
            count, length = int(row["batch"]), int(row["seq"])
            seconds = count * length / float(row["tokens_per_s"])
            rows.append(TimeRow("Mistral-7B", row["quant"] or "none", count, length, 1, seconds))
    return rows


FEW = 2
"""All layers are alike, so that two and three of them tell what any number takes."""


@cache
def step_of(row: TimeRow, layers: int) -> ConfiguredStep:
    """The counted step of a row with so many layers: bf16, flash attention, all layers run again."""
    targets, rank = "all-linear", 64
    if row.name in QWEN:
        sizes = QWEN[row.name] | {"vocab_size": 151936, "num_hidden_layers": layers}
        config: Any = Qwen2Config(num_key_value_heads=sizes["num_attention_heads"], **sizes)
    else:
        config, targets, rank = find_configuration("mistral-7b-v0.1"), "q_proj,k_proj,v_proj,o_proj", 16
        config.sliding_window = None
        config.num_hidden_layers = layers
    step = StepConfig(
        batch_size=row.rows,
        max_length=row.length,
        target_modules=targets,
        quantization=row.quantization,  # type: ignore[arg-type]
        gradient_checkpointing=True,
        exact_savers=False,
        bf16=True,
    )
    with libraries_of_2024():
        return from_config(config, step, LoadedAs(dtype=torch.bfloat16, adapter={"r": rank}), counted=True)


def predicted(row: TimeRow, constants: FloatArray) -> float:
    """The seconds of a row.

    Args:
        row: as published.
        constants: the reached shares of the rates of products and of memory, and microseconds of an operator.
    """
    rates = device_table()[CARD].rates
    assert rates is not None
    products, memory, operator = constants.tolist()
    reached = Rates(products * rates.flops_per_s["bf16"], memory * rates.bytes_per_s, 1e-6 * operator)
    rank, layers = (64, QWEN[row.name]["num_hidden_layers"]) if row.name in QWEN else (16, 32)

    def seconds(count: int) -> float:
        step = step_of(row, count)
        assert step.work is not None
        return step.work.time(reached).seconds(np.full(len(step.targets), rank))

    few = seconds(FEW)
    return row.batches * (few + (layers - FEW) * (seconds(FEW + 1) - few))


def fit(rows: Sequence[TimeRow]) -> FloatArray:
    """The constants with the least mean square of relative errors."""
    measured = np.array([row.seconds for row in rows])

    def misfit(logs: FloatArray) -> float:
        times = np.array([predicted(row, np.exp(logs)) for row in rows])
        return float(np.square(np.log(times / measured)).mean())

    start = np.log([0.5, 0.5, 10.0])
    return np.asarray(np.exp(minimize(misfit, start, method="Nelder-Mead", options={"maxiter": 300}).x))


def benchmark(options: Options, console: Console) -> Figures:
    """Fit on half, judge on the other half, for each precision of the frozen weights."""
    figures: Figures = {}
    for kind in ("none", "nf4"):
        rows = [row for row in time_rows() if row.quantization == kind]
        for row in with_progress(rows, "steps"):
            predicted(row, np.ones(3))
        constants = fit(rows[::2])
        times = np.array([predicted(row, constants) for row in rows])
        measured = np.array([row.seconds for row in rows])
        lines = [
            (f"{row.name} {row.rows} x {row.length}", "held" if number % 2 else "fitted", f"{one:.2f}", f"{two:.2f}")
            for number, (row, one, two) in enumerate(zip(rows, times, measured, strict=True))
        ]
        console.print(make_table(f"Seconds of a step on an A100, {kind}", ("run", "", "predicted", "measured"), lines))
        found = judged(times[1::2], measured[1::2])
        found |= dict(zip(("products", "memory", "operator_us"), constants.tolist(), strict=True))
        for name, value in found.items():
            console.print(f"{kind} {name}: {value:.3f}", highlight=False)
        figures |= {f"{kind}.{name}": value for name, value in found.items()}
    return figures


def judged(times: FloatArray, measured: FloatArray) -> dict[str, float]:
    """Errors of seconds, (rows,), and of shares of any two rows; how often the order of two is right."""
    errors = np.abs(times / measured - 1)
    pairs = [(a, b) for a, b in combinations(range(len(times)), 2) if measured[a] != measured[b]]
    shares = [abs(times[a] / times[b] / (measured[a] / measured[b]) - 1) for a, b in pairs]
    right = [(times[a] < times[b]) == (measured[a] < measured[b]) for a, b in pairs]
    return {
        "held": float(len(times)),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "rank_correlation": rank_correlation(times, measured),
        "median_share_error": float(np.median(shares)),
        "order_right": float(np.mean(right)),
    }
