"""`python -m benchmarks published-time`: seconds of steps that others measured, by counted work and few constants.

What a step computes is counted from the model's configuration, operator by operator. A card has three constants: the
shares of its published rates that products and bytes reach, and what the host takes to launch an operator. A step takes
the longer of all work and all launches. Weights in GPTQ's four bits have two constants more: how many are unpacked in a
second, and how many operators unpack those of one product. All are fitted on half of the rows of a card, and judged on
the other half.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rankpilot.common.arrays import FloatArray
from rankpilot.common.text import make_table
from rankpilot.cost.cards import device_table
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.forecast.published import find_configuration
from rankpilot.cost.step_config import StepConfig
from rankpilot.cost.step_time import Rates
from rich.console import Console
from scipy.optimize import minimize
from scipy.stats import spearmanr
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2

from .harness import Figures, with_progress
from .published import FOLDER, libraries_of_2024

CARD = "A100 80GB"

KINDS = ("none", "four bits")

ACCUMULATED = 8
"""Batches of one row whose gradients make a step of Qwen's."""

QWEN: dict[str, dict[str, int]] = {
    "Qwen-1.8B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504},
    "Qwen-7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "Qwen-14B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13696},
}
"""Sizes of Qwen's first models, which are Qwen2's with as many heads of keys as of queries."""

START = np.log([0.9, 0.45, 20.0, 50.0, 5.0])
"""Where the search of the constants begins: shares of the rates of products and bytes, microseconds of a launch, 1e9
weights unpacked in a second, operators that unpack those of a product."""

UNPACKED = 2
"""How often a step unpacks GPTQ's weights: in the forward pass, and where a layer runs again."""


@dataclass(frozen=True)
class Options:
    """Predict published seconds of LoRA steps on an A100, without a GPU: Qwen's README, and fms-acceleration.

    Five constants are fitted on every second row, and judged on the others: seconds of held rows, and shares of two
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
        quantization: none, nf4 or gptq.
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
            kind = {"LoRA": "none", "Q-LoRA": "gptq"}.get(row["method"])
            if kind and row["model"] in QWEN:
                rows.append(TimeRow(row["model"], kind, 1, int(row["seq"]), ACCUMULATED, float(row["s_per_it"])))
    with (FOLDER / "a100_peaks.csv").open() as file:
        for row in csv.DictReader(file):
            if row["gpus"] != "1":
                continue
            count, length = int(row["batch"]), int(row["seq"])
            seconds = count * length / float(row["tokens_per_s"])
            rows.append(TimeRow("Mistral-7B", row["quant"] or "none", count, length, 1, seconds))
    return rows


FEW = 2
"""All layers are alike, so that two and three of them tell what any number takes."""


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Let RMSNorm and rotary embeddings be one operator each, as Qwen's code does with flash-attention's kernels."""

    def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos = cos.unsqueeze(unsqueeze_dim)
        return query * cos, key * cos

    def norm(self: Any, hidden_states: Tensor) -> Any:
        return hidden_states * self.weight

    with (
        patch.object(modeling_qwen2.Qwen2RMSNorm, "forward", norm),
        patch.object(modeling_qwen2, "apply_rotary_pos_emb", rotary),
    ):
        yield


@cache
def step_of(row: TimeRow, layers: int) -> ConfiguredStep:
    """The counted step of a row with so many layers: bf16, flash attention, all layers run again.

    GPTQ's weights count as if they were unpacked already.
    """
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
        quantization="nf4" if row.quantization == "nf4" else "none",
        gradient_checkpointing=True,
        exact_savers=False,
        bf16=True,
    )
    with libraries_of_2024(), fused_kernels():
        return from_config(config, step, LoadedAs(dtype=torch.bfloat16, adapter={"r": rank}), counted=True)


def predicted(row: TimeRow, constants: FloatArray) -> float:
    """The seconds of a row.

    Args:
        row: as published.
        constants: the reached shares of the rates of products and of bytes, microseconds of a launch, 1e9 weights
            unpacked in a second, and operators that unpack those of a product, (5,).
    """
    rates = device_table()[CARD].rates
    assert rates is not None
    products, moved, launch, unpacked, operators = constants.tolist()
    device = Rates(products * rates.flops_per_s["bf16"], moved * rates.bytes_per_s)
    host = Rates(math.inf, math.inf, operator_seconds=1e-6 * launch)
    rank, layers = (64, QWEN[row.name]["num_hidden_layers"]) if row.name in QWEN else (16, 32)

    def seconds(count: int) -> FloatArray:
        """Of all work and of all launches, (2,)."""
        step = step_of(row, count)
        assert step.work is not None
        ranks = np.full(len(step.targets), rank)
        found = np.array([step.work.time(each).seconds(ranks) for each in (device, host)])
        if row.quantization == "gptq":
            weights = sum(target.d_in * target.d_out for target in step.targets)
            unpacking = weights / (1e9 * unpacked), len(ranks) * operators * host.operator_seconds
            found += UNPACKED * np.array(unpacking)
        return found

    few = seconds(FEW)
    return float(row.batches * (few + (layers - FEW) * (seconds(FEW + 1) - few)).max())


def fit(rows: Sequence[TimeRow]) -> FloatArray:
    """The constants with the least mean square of relative errors, (5,); no rate is above the published one."""
    measured = np.array([row.seconds for row in rows])

    def misfit(logs: FloatArray) -> float:
        times = np.array([predicted(row, _constants(logs)) for row in rows])
        return float(np.square(np.log(times / measured)).mean())

    first = START + np.vstack([np.zeros(len(START)), 0.15 * np.eye(len(START))])
    options = {"maxiter": 200, "initial_simplex": first}
    return _constants(minimize(misfit, START, method="Nelder-Mead", options=options).x)


def _constants(logs: FloatArray) -> FloatArray:
    found = np.exp(logs)
    return np.append(np.minimum(found[:2], 1.0), found[2:])


def benchmark(options: Options, console: Console) -> Figures:
    """Fit on half, judge on the other half, by how weights are stored."""
    rows = {kind: [row for row in time_rows() if (row.quantization == "none") == (kind == "none")] for kind in KINDS}
    for row in with_progress([row for found in rows.values() for row in found], "steps"):
        predicted(row, np.exp(START))
    constants = fit([row for found in rows.values() for row in found[::2]])
    names = ("products", "bytes", "launch_us", "unpacked_1e9", "unpacking_operators")
    figures: Figures = dict(zip(names, constants.tolist(), strict=True))
    console.print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), highlight=False)
    for kind, found in rows.items():
        times = np.array([predicted(row, constants) for row in found])
        measured = np.array([row.seconds for row in found])
        lines = [
            (f"{row.name} {row.rows} x {row.length}", "held" if number % 2 else "fitted", f"{one:.2f}", f"{two:.2f}")
            for number, (row, one, two) in enumerate(zip(found, times, measured, strict=True))
        ]
        console.print(make_table(f"Seconds of a step on an A100, {kind}", ("run", "", "predicted", "measured"), lines))
        for name, value in judged(times[1::2], measured[1::2]).items():
            console.print(f"{kind} {name}: {value:.3f}", highlight=False)
            figures[f"{kind}.{name}"] = value
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
        "rank_correlation": float(spearmanr(times, measured).statistic),
        "median_share_error": float(np.median(shares)),
        "order_right": float(np.mean(right)),
    }
