"""`python -m benchmarks control`: who corrects a learning rate best while a run goes, on families that nobody learned.

Rules, and appliers that PPO and DQN train from the best rule on (`--learners ppo dqn`). All control the same runs of
the proxies of the test split, whose texts and bases are in no training. What counts is the held-out loss beside that of
the same run left alone. For real runs at wrong rates see `python -m benchmarks no-sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rankpilot.common.files import read_json, write_json
from rankpilot.common.text import make_table
from rankpilot.decide.rate_control import RATE_CONTROLS, RateControl
from rankpilot.env.run_control import ControlledRuns, ControlTask, control_tasks
from rankpilot.errors import ConfigError
from rankpilot.training.results import Estimate, estimate
from rich.console import Console
from rich.progress import Progress, track

from .harness import Figures, machine_facts
from .learned_control import ControlConfig, LearnedRateControl, Learner, train_rate_control

BASES = ("gpt2-4x64", "llama-8x64")
"""Bases of the test split: a family that no control was trained on, and a deeper model."""

QUICK = "gpt2-4x32"
"""A base of the test split whose weights are in a checkout."""

TOGETHER = 13
"""Runs that are trained together."""

GROUPS = {"far too low": (-3.0, -2.0), "right": (-0.5, 0.5), "far too high": (2.0, 3.0)}
"""Offsets of the rate, in powers of 2: from, to."""


MOST = 2.0
"""The log of a loss over that left alone counts as this at most, as in rewards: of runs that diverge."""

RULE = "alignment"
"""The rule with which learners are compared, and from which they learn."""

Changes = Mapping[tuple[str, str, float], float]
"""Log losses beside the same run left alone, in per cent, by text, base and offset of the rate."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare appliers of the learning rate on proxies that nobody learned.

    Attributes:
        learners: also train a control by each of these, "ppo" and "dqn".
        seeds: appliers of each learner.
        rounds: of the training of each; a round of 16 runs takes about 10 CPU seconds.
        length: optimizer steps of the runs that are compared.
        output: folder of trained appliers; those that it holds are not trained again.
        quick: under two minutes: one base, one text, no learner.
        json: also write figures to this file.
    """

    learners: tuple[Learner, ...] = ()
    seeds: int = 3
    rounds: int = 60
    length: int = 100
    output: Path = Path("runs/control")
    quick: bool = False
    json: Path | None = None


def trained(options: Options, learner: Learner, seed: int, console: Console) -> LearnedRateControl:
    """A control of the folder, trained first where it is not there."""
    path = options.output / f"{learner}-{seed}.json"
    if not path.is_file():
        config = ControlConfig(learner, rounds=options.rounds, seed=seed, lengths=(60, 100))
        with Progress(console=console) as bar:
            rounds = bar.add_task(f"training {learner}, seed {seed}", total=options.rounds)
            control = train_rate_control(config, lambda *_: bar.advance(rounds))
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(path, control.to_json())
    return LearnedRateControl.from_json(read_json(path))


def held_out(base: str, tasks: Sequence[ControlTask], control: RateControl) -> list[float]:
    """The held-out losses of runs under a control, in nats."""
    runs, losses = ControlledRuns(base, TOGETHER), list[float]()
    for start in range(0, len(tasks), TOGETHER):
        part = dict(enumerate(tasks[start : start + TOGETHER]))
        runs.begin(part)
        while not runs.over:
            runs.step(dict(zip(part, control.act(runs.observe()), strict=True)))
        losses += runs.losses().values()
    return losses


def benchmark(options: Options, console: Console) -> Figures:
    """Print how each control does, by how wrong the rate was.

    Raises:
        ConfigError: bad options.
    """
    if options.seeds < 1 or options.rounds < 1:
        raise ConfigError(f"--seeds and --rounds are at least 1; got {options.seeds} and {options.rounds}.")
    appliers: dict[str, RateControl] = {name: each for name, each in RATE_CONTROLS.items() if name != "leave alone"}
    if not options.quick:
        appliers |= {
            f"{learner}, seed {seed}": trained(options, learner, seed, console)
            for learner in options.learners
            for seed in range(options.seeds)
        }
    bases, most = ((QUICK,), TOGETHER) if options.quick else (BASES, None)
    tasks = {base: control_tasks(base, "test", (options.length,))[:most] for base in bases}
    alone = {base: held_out(base, each, RATE_CONTROLS["leave alone"]) for base, each in tasks.items()}
    figures: Figures = {}
    table, found = [], dict[str, Changes]()
    for name, control in track(appliers.items(), "appliers", console=console):
        changes = found[name] = {
            (each.task.corpus, base, each.offset): 100 * min(math.log(loss / left), MOST)
            for base, of_base in tasks.items()
            for each, loss, left in zip(of_base, held_out(base, of_base, control), alone[base], strict=True)
        }
        cells = _cells(changes)
        table.append((name, *(f"{cell:+.1f}, worst {worst:+.1f}" for cell, worst in cells.values())))
        for group, (cell, worst) in cells.items():
            figures |= {f"{name}, {group}": cell.value, f"{name}, {group}, worst": worst}
    console.print(make_table("Log loss beside the same run left alone, %", ("", *GROUPS), table))
    for learner in options.learners:
        own = [changes for name, changes in found.items() if name.startswith(f"{learner}, ")]
        beside = {key: float(np.mean([each[key] for each in own])) - change for key, change in found[RULE].items()}
        row = [f"{cell:+.1f}" for cell, _ in _cells(beside).values()]
        console.print(f"{learner}, mean of {len(own)} seeds, beside {RULE}, %: {', '.join(row)}.", markup=False)
    return {**machine_facts(torch.device("cpu")), **figures}


def _cells(changes: Changes) -> dict[str, tuple[Estimate, float]]:
    """By group of `GROUPS` the mean change with its interval over texts and bases, and the worst change."""
    found = {}
    for group, (low, high) in GROUPS.items():
        own = {key: change for key, change in changes.items() if low <= key[2] <= high}
        if own:
            names = [f"{text} {base}" for text, base, _ in own]
            found[group] = estimate(list(own.values()), names), max(own.values())
    return found
