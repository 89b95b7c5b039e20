"""What happens before the first step: its share of a run's compute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel

from ..common.tables import make_table
from ..common.workers import isolated
from ..data.models import load_model
from ..errors import ConfigError
from ..finetune.before_training import run_costs
from ..finetune.pilot import RankPilot
from ..finetune.run import TrainingRun
from ..memory.budget import Budget
from .harness import Figures, machine_facts, with_progress
from .learner import LEARNING_RATE, Learner
from .models import LORA, Family, Size, random_loader, random_model

MINILM = "all-minilm-l6-v2"
BUDGET = "80%"


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        family: decides the LoRA settings.
        size: of the model (of a packaged one, only rows, length and vocabulary count), and of its batches.
        base: makes the model.
    """

    family: Family
    size: Size
    base: Callable[[Size], PreTrainedModel]


def _minilm(size: Size) -> PreTrainedModel:
    return load_model(MINILM, "classification", ("0", "1"), None)


def _llama(size: Size) -> PreTrainedModel:
    return random_model("llama", size, 0)


def _smol(size: Size) -> PreTrainedModel:
    return random_model("llama", size, 0, intermediate_size=1536, num_key_value_heads=3)


FULL = {
    MINILM: Case("bert", Size(vocabulary=30_000), _minilm),
    "llama-30x256": Case("llama", Size(layers=30, width=256), _llama),
    "smollm2-135m-random": Case("llama", Size(layers=30, width=576, vocabulary=49_152), _smol),
}
QUICK = {"llama-4x64": Case("llama", Size(layers=4, width=64, vocabulary=256), _llama)}


@dataclass(frozen=True)
class Options:
    """Measure what happens before the first step of a run under a policy, as a share of the run's compute.

    Calibration records four small steps; the probe takes small steps of two rows; then comes the first plan. Each is
    timed in CPU time of one thread, beside training steps of 16 x 64 random tokens under the first plan, within 80 % of
    the bytes of uniform rank 8. Models: MiniLM (packaged, 84 MB to download once), a random Llama of 30 layers x 256,
    and a random one of SmolLM2-135M's shape. Shares depend little on the machine. Takes about five minutes.

    Attributes:
        steps: of the run, at least 1.
        timed: training steps that are timed, after one to warm up; their median counts.
        quick: under a minute: a small Llama, too small for its shares to mean much.
        json: also write the figures to this file, as flat JSON with names like "llama-30x256.probe_share".
    """

    steps: int = 100
    timed: int = 5
    quick: bool = False
    json: Path | None = None


def measure(case: Case, options: Options) -> Figures:
    """CPU seconds of calibration, of probe and first plan, and of a training step; and shares of a whole run."""
    learner = Learner(case.base(case.size), LoraConfig(**LORA[case.family]))
    loader = random_loader(case.family, case.size, 0)
    run = TrainingRun.of_loader(
        learner.model, learner.optimizer, loader, total_steps=options.steps, learning_rate=LEARNING_RATE
    )
    pilot = RankPilot("default", BUDGET)
    batches = list(loader)
    learner.step(batches[0])
    calibration = _cpu_seconds(partial(run_costs, run, learner.targets, Budget.parse(BUDGET), signals=True))
    everything = _cpu_seconds(partial(pilot.begin, run))
    learner.step(batches[0])
    turns = range(1, options.timed + 1)
    step = float(np.median([_cpu_seconds(partial(learner.step, batches[turn % len(batches)])) for turn in turns]))
    whole = options.steps * step
    return {
        "step_s": step,
        "calibration_s": calibration,
        "probe_s": everything - calibration,
        "calibration_share": calibration / whole,
        "probe_share": (everything - calibration) / whole,
        "share": everything / whole,
    }


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def benchmark(options: Options, console: Console) -> Figures:
    """Measure all models, print the table, and return all figures.

    Raises:
        ConfigError: an option is out of range.
    """
    if min(options.steps, options.timed) < 1:
        raise ConfigError(f"--steps and --timed are at least 1; got {options.steps} and {options.timed}.")
    figures: Figures = {**machine_facts(torch.device("cpu")), "quick": options.quick, "steps": options.steps}
    cases, rows = QUICK if options.quick else FULL, []
    for name in with_progress(list(cases), "models"):
        with isolated():
            result = measure(cases[name], options)
        figures |= {f"{name}.{key}": value for key, value in result.items()}
        seconds = [f"{result[f'{part}_s']:.2f} s" for part in ("step", "calibration", "probe")]
        shares = [f"{result[part]:.1%}" for part in ("calibration_share", "probe_share", "share")]
        rows.append([name, *seconds, *shares])
    columns = ("model", "a step", "calibration", "probe and plan", "calibration", "probe and plan", "both")
    console.print(make_table(f"CPU time, and shares of {options.steps} steps", columns, rows))
    return figures
