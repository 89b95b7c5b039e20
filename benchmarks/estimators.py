"""`python -m benchmarks estimators`: what other estimators of memory tell of the steps that were measured on a T4.

All of them are asked about the same published steps (`published_peaks/t4_peaks.csv`), which are fitcheck's own
measurements. Tensors alone are compared: an estimate's allowance for the allocator and the CUDA context is left out.
None of the packages is needed by this project: give their places, and the answers are stored.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rankpilot.common.files import read_json, write_text
from rankpilot.common.text import make_table
from rankpilot.cost.forecast.published import find_configuration
from rich.console import Console

from .harness import Figures
from .published import SHORT_NAMES, T4Row, compare_t4, t4_rows

ROWS = Path(__file__).parent / "results" / "estimators.json"
"""The answers for each step in MiB, with what was measured."""

MIB = 2**20
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]

NAMES = {
    "rankpilot": "rankpilot memory, whose kernels of that card were found with these steps",
    "fitcheck": "fitcheck 0.3.1, on the card that it was calibrated on",
    "unsloth": "Unsloth Studio, for its own kernels",
    "accelerate": "accelerate estimate-memory, weights only",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold estimators of memory against peaks on a T4.

    Attributes:
        fitcheck: a folder with the package fitcheck-llm; without it stored answers are told.
        unsloth: the file studio/backend/utils/hardware/vram_estimation.py of Unsloth.
        json: also write figures to this file.
    """

    fitcheck: Path | None = None
    unsloth: Path | None = None
    json: Path | None = None


def frozen_mib(row: T4Row) -> float:
    """The weights in the dtype or bits in which they are kept, as `accelerate estimate-memory` counts them."""
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(find_configuration(SHORT_NAMES.get(row.model, row.model)))
    return float(calculate_maximum_sizes(model.float())[0]) / (8 if row.quantization == "nf4" else 2) / MIB


def fitcheck_mib(package: ModuleType, row: T4Row) -> float:
    """All parts of fitcheck's estimate but its overhead."""
    parser, estimator = sys.modules["fitcheck.config_parser"], sys.modules["fitcheck.estimator"]
    config = find_configuration(SHORT_NAMES.get(row.model, row.model))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config.to_dict(), file, default=str)
        file.flush()
        vars(parser)["hf_hub_download"] = lambda **kwargs: file.name
        vars(parser)["_reported_param_count"] = lambda *arguments: None
        model = package.fetch_model_config(row.model)
    training = package.TrainingConfig(
        precision="fp16",
        quantization=row.quantization,
        batch_size=row.rows,
        seq_len=row.length,
        lora_rank=row.rank,
        lora_targets=TARGETS,
        grad_checkpoint=True,
        flash_attn=row.attention != "eager",
    )
    parts = estimator._compute_components(model, training, "t4")
    return float(parts.total_mib - parts.overhead_mib)


def unsloth_mib(module: ModuleType, row: T4Row) -> float:
    """All parts of Unsloth Studio's estimate but its allowance for CUDA."""
    arch = module.extract_arch_config(find_configuration(SHORT_NAMES.get(row.model, row.model)))
    config = module.TrainingVramConfig(
        training_method="qlora" if row.quantization == "nf4" else "lora",
        batch_size=row.rows,
        max_seq_length=row.length,
        lora_rank=row.rank,
        target_modules=TARGETS,
        gradient_checkpointing="true",
        optimizer="adamw_torch",
        load_in_4bit=row.quantization == "nf4",
        attention_implementation=row.attention,
    )
    found = module.estimate_training_vram(arch, config)
    return float(found.total - found.cuda_overhead) / MIB


def asked(options: Options) -> dict[str, Callable[[T4Row], float]]:
    """The estimators that are at hand."""
    found: dict[str, Callable[[T4Row], float]] = {
        "rankpilot": lambda row: compare_t4(row).predicted,
        "accelerate": frozen_mib,
    }
    if options.fitcheck:
        sys.path.append(str(options.fitcheck))
        package = importlib.import_module("fitcheck")
        found["fitcheck"] = lambda row: fitcheck_mib(package, row)
    if options.unsloth:
        spec = importlib.util.spec_from_file_location("vram_estimation", options.unsloth)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found["unsloth"] = lambda row: unsloth_mib(module, row)
    return found


def stored() -> list[dict[str, Any]]:
    """The answers for each step, in MiB."""
    rows = read_json(ROWS)
    assert isinstance(rows, list)
    return rows


def errors(rows: list[dict[str, Any]], name: str) -> Any:
    """Errors of one estimator in per cent, (rows,); below 0 where it tells too little."""
    return np.array([100 * (row[name] / row["measured"] - 1) for row in rows])


def table_rows() -> list[tuple[str, ...]]:
    """Each estimator with its mean and worst errors, and how many steps it tells more than 5 % too little."""
    found = stored()
    lines: list[tuple[str, ...]] = []
    for name, words in NAMES.items():
        of = errors(found, name)
        mean, low, high = float(np.abs(of).mean()), max(-of.min(), 0.0), max(of.max(), 0.0)
        lines.append((words, f"{mean:.1f} %", f"{low:.1f} %", f"{high:.1f} %", f"{(of < -5).sum()} of {len(of)}"))
    return lines


def benchmark(options: Options, console: Console) -> Figures:
    """Ask those that are at hand, store what they say, and print the errors."""
    if options.fitcheck and options.unsloth:
        estimators = asked(options)
        rows = [
            {"name": row.name, "measured": round(row.measured, 1)}
            | {name: round(estimate(row), 1) for name, estimate in estimators.items()}
            for row in t4_rows()
        ]
        write_text(ROWS, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        console.print(f"accelerate {version('accelerate')}", markup=False)
    heads = ("estimator", "mean error", "too low, at most", "too high, at most", "more than 5 % too low")
    console.print(make_table("Tensors of 43 steps on a T4", heads, table_rows()))
    return {f"{name} mean": float(np.abs(errors(stored(), name)).mean()) for name in NAMES}
