"""`rankpilot bench policy`: the shipped policy beside rules, its parts and the oracle, on proxy tasks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from ...agents.evaluation.config import EvaluateConfig
from ...agents.evaluation.evaluate import ROWS, evaluate
from ...agents.evaluation.results import read_rows
from ...agents.learned.policy_file import policy_folder, read_card
from ...common.files import write_text
from ...errors import ConfigError
from ..harness import Figures, machine_facts
from .page import figures_of, page
from .rows import PolicyRows, pack, unpack

Split = Literal["test", "validation"]

RIVALS = ("actor:", "constant:")
"""Parts of the policy that take part, before its folder."""

RULES = ("signal-mean", "top-down", "top-down-mlp", "oracle")

HIDDEN = ("signals", "costs", "place", "progress")
"""Groups of features of which the policy is deprived, on the validation split."""


@dataclass(frozen=True)
class Options:
    """Compare a policy with rules, with its parts, and with the oracle of planted changes, on the test split.

    What the policy loses without each group of features is measured on the validation split. All runs are paired: same
    task, seed, batches and budget. Runs go into the output folder as they end, so that an interrupted comparison goes
    on there. Takes about half an hour on two cores.

    Attributes:
        policy: folder of the policy, or the name of one that ships with rankpilot.
        output: folder of the rows.
        seeds: repetitions of each test task, at least 1; each has other data and adapters.
        tasks: at most so many tasks of each split, spread evenly over the suites; all by default.
        workers: processes; 0 for one on each core.
        pack: also write the rows into this file.
        rows: measure nothing, and read this packed file.
        page: also write the page (docs/policy.md) to this file.
        quick: about a minute: six tasks of each split.
        json: also write the figures to this file, as flat JSON.
    """

    policy: str = "default"
    output: Path = Path("runs/bench/policy")
    seeds: int = 2
    tasks: int | None = None
    workers: int = 0
    pack: Path | None = None
    rows: Path | None = None
    page: Path | None = None
    quick: bool = False
    json: Path | None = None


def benchmark(options: Options, console: Console) -> Figures:
    """Measure or read, and tell.

    Raises:
        ConfigError: bad options.
        PolicyFileError, UnknownNameError: no such policy.
    """
    if options.rows and options.pack:
        raise ConfigError("--rows reads packed rows and --pack writes them: give one of them.")
    measured = unpack(options.rows) if options.rows else measure(options)
    text = page(measured)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.pack:
        size = pack(measured, options.pack)
        console.print(f"Packed into {options.pack}: {size:,} bytes.", markup=False, soft_wrap=True)
    if options.page:
        write_text(options.page, text)
    return {**machine_facts(torch.device("cpu")), **figures_of(measured)}


def measure(options: Options) -> PolicyRows:
    """Run what is missing of both comparisons."""
    name, tasks = options.policy, 6 if options.quick else options.tasks
    parts = tuple(f"{part}{name}" for part in RIVALS)
    hidden = tuple(f"without-{group}:{name}" for group in HIDDEN)
    configs: dict[Split, EvaluateConfig] = {
        "test": EvaluateConfig(
            (name, *parts, *RULES), split="test", tasks=tasks, seeds=options.seeds, workers=options.workers
        ),
        "validation": EvaluateConfig((name, *hidden), split="validation", tasks=tasks, workers=options.workers),
    }
    rows, progress = {}, Console(file=sys.stderr)
    for split, config in configs.items():
        folder = options.output / split
        progress.print(f"{split} split: {len(config.names)} competitors", markup=False)
        evaluate(config, folder, resume=True)
        rows[str(split)] = tuple(read_rows(folder / ROWS))
    return PolicyRows(read_card(policy_folder(name)), rows)
