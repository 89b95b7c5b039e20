"""How fast the environment is: env steps per CPU second of PPO on stacked episodes, beside processes with PEFT models.

`python -m rankpilot.bench.training.env_speed --help` tells what is measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ...env.proxies.bases import BASES_FOLDER, find_base
from ...memory.budget import format_bytes
from ..harness import Figures, machine_facts, make_table, run_command
from .env_speed_parts import (
    Contender,
    Load,
    Result,
    find_compiler,
    memory_of,
    phases_of,
    race,
    stacked_envs,
    subproc_envs,
)

TARGETS = {"stacked": 4.0, "compiled": 6.0}
"""How many times as many env steps per CPU second as SubprocVecEnv."""

LONG = 100
"""Train steps of an episode of the suites, decisions included: 25 an env step."""

NO_COMPILER = "skipped: no C++ compiler is at hand, which torch.compile needs"


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        load: what each environment trains.
        rounds: of the race at the top.
        long_rounds: of the same race with episodes of LONG train steps, as the suites have; 0 leaves it out.
        runs: stacked episodes in it.
        compiled: whether the compiled model races too.
        bases: of the sweep; the first one is the base of race, phases and memory.
        sweep_runs: numbers of stacked episodes in the sweep; none leaves the sweep out.
        sweep_rounds: of each of its races.
        memory_runs: numbers of stacked episodes whose memory is read.
        workers: processes of SubprocVecEnv.
    """

    load: Load = field(default_factory=Load)
    rounds: int = 7
    long_rounds: int = 4
    runs: int = 16
    compiled: bool = True
    bases: tuple[str, ...] = ("llama-4x64", "llama-4x32", "bert-4x64", "gpt2-4x64", "llama-8x64")
    sweep_runs: tuple[int, ...] = (1, 4, 8, 16, 32)
    sweep_rounds: int = 2
    memory_runs: tuple[int, ...] = (1, 4, 8, 16, 32)
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


FULL = Extent()
QUICK = Extent(rounds=3, long_rounds=2, compiled=False, sweep_runs=(), memory_runs=())


@dataclass(frozen=True)
class EnvSpeed:
    """Measure the environment's speed: stacked episodes beside a process for each PEFT model, PPO included.

    Stable-Baselines3's PPO trains the project's policy, with updates, on three vector environments in one run, one
    iteration of each in turn, in changing order: SubprocVecEnv with one PEFT environment and one thread in each of as
    many processes as there are cores, StackedVecEnv with 16 episodes in this process, and the same with a compiled
    model. An iteration is 64 env steps for each. All decide four times an episode, with five train steps of 4 rows x
    16 tokens between, and evaluate 32 held-out rows at its end. Probes and the start of processes are off the clock;
    there are no uniform runs.

    Time is CPU time, of this process and of its children, and so depends little on what else runs; wall time stands
    beside it. A ratio is the median over pairs of the same round, with a 95 % interval (bootstrap). A compiled
    iteration in which something was compiled is made again, and its time is told apart. Targets: 4 times
    SubprocVecEnv's env steps per CPU second, and 6 times if compiled. The race is run twice: with five train steps an
    env step, where decisions weigh most, and with 25, as in the suites that policies train on.

    Then: where stacked episodes spend CPU time; the same over bases and numbers of episodes, with the growth that fits;
    and their memory, each number in a process of its own, which has to grow linearly from the frozen weights.

    The full run takes about 20 minutes on two cores.

    Attributes:
        quick: under a minute: few rounds of the first two environments, and the phases.
        json: also write the figures to this file, as flat JSON with names like
            "llama-4x64/n16/stacked/steps_per_cpu_s".
    """

    quick: bool = False
    json: Path | None = None


# Figures --------------------------------------------------------------------------------------------------------------


def race_figures(base: str, runs: int, results: Mapping[str, Result], *, prefix: str = "") -> Figures:
    """One race by flat name; "subproc" is what the others are set beside."""
    figures: Figures = {}
    for name, result in results.items():
        key = f"{prefix}{base}/n{runs}/{name}"
        figures[f"{key}/steps_per_cpu_s"] = result.rate
        figures[f"{key}/steps_per_wall_s"] = result.wall_rate
        if name == "compiled":
            figures[f"{key}/compile_cpu_s"] = result.compile_seconds
            figures[f"{key}/unsettled_rounds"] = result.unsettled
        if name != "subproc":
            ratio = result.over(results["subproc"])
            figures[f"{key}_over_subproc"] = ratio.value
            figures[f"{key}_over_subproc_low"], figures[f"{key}_over_subproc_high"] = ratio.low, ratio.high
    return figures


def phase_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """The share of each phase in all CPU time."""
    whole = sum(seconds.values()) or 1.0
    return {name: part / whole for name, part in seconds.items()}


def growth(rates: Mapping[tuple[str, int], float], *, stacked: bool) -> dict[str, float]:
    """How CPU time grows with each of layers, width and episodes when that doubles, in a common fit.

    Args:
        rates: env steps per CPU second by base and number of episodes; only Llamas take part.
        stacked: the time of a step of all episodes, and not of one.

    Returns:
        Factors by "layers", "width" and "n", those that vary, and "largest_deviation" of a time from its fit.
    """
    rows = []
    for (name, runs), rate in rates.items():
        base = find_base(name)
        if base.family == "llama":
            cost = (runs if stacked else 1) / rate
            rows.append(np.log2([base.depth, base.config["hidden_size"], runs, cost]))
    if len(rows) < 2:
        return {}
    table = np.array(rows)
    varying = {name: table[:, i] for i, name in enumerate(("layers", "width", "n")) if np.ptp(table[:, i])}
    design = np.column_stack([np.ones(len(table)), *varying.values()])
    fit, *_ = np.linalg.lstsq(design, table[:, 3], rcond=None)
    found = {name: float(2**slope) for name, slope in zip(varying, fit[1:], strict=True)}
    return found | {"largest_deviation": float(2 ** np.abs(design @ fit - table[:, 3]).max() - 1)}


def linear_fit(values: Mapping[int, int]) -> dict[str, float]:
    """Bytes over the number of episodes as a line: "start", "each", and the "largest_deviation" from it, relative."""
    counts, seen = np.array(list(values), dtype=float), np.array(list(values.values()), dtype=float)
    design = np.column_stack([np.ones_like(counts), counts])
    (start, each), *_ = np.linalg.lstsq(design, seen, rcond=None)
    deviation = np.abs(start + each * counts - seen) / seen
    return {"start": float(start), "each": float(each), "largest_deviation": float(deviation.max())}


# Tables ---------------------------------------------------------------------------------------------------------------


def race_table(base: str, extent: Extent, results: Mapping[str, Result]) -> Table:
    """The race at the top for people."""
    labels = {
        "subproc": f"SubprocVecEnv, {extent.workers} processes",
        "stacked": f"StackedVecEnv, {extent.runs} episodes",
        "compiled": "the same, compiled",
    }
    rows = []
    for name, result in results.items():
        ratio, target = "1", ""
        if name != "subproc":
            estimate = result.over(results["subproc"])
            ratio = f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
            word = "kept" if estimate.low >= TARGETS[name] else "missed" if estimate.high < TARGETS[name] else "open"
            target = f">= {TARGETS[name]:g}: {word}"
        step = f"{1e3 / result.rate:.1f} ms"
        rows.append((labels[name], f"{result.rate:.2f}", step, f"{result.wall_rate:.2f}", ratio, target))
    load = extent.load
    title = (
        f"{base}, {load.rows} x {load.length} tokens, {load.steps // 4} train steps an env step, PPO included; "
        f"median of {extent.rounds} rounds"
    )
    columns = ("", "env steps/CPU s", "CPU of one", "env steps/wall s", "over SubprocVecEnv", "target")
    return make_table(title, columns, rows)


def phase_table(shares: Mapping[str, float]) -> Table:
    """Where the CPU time goes."""
    rows = [(name, f"{share:.1%}") for name, share in shares.items()]
    return make_table("CPU time of stacked episodes", ("phase", "share"), rows)


def sweep_table(results: Mapping[str, Mapping[str, Result]]) -> Table:
    """Each base and number of episodes beside SubprocVecEnv."""
    rows = []
    for base, found in results.items():
        for name, result in found.items():
            if name != "subproc":
                peft, ratio = found["subproc"], result.over(found["subproc"])
                rows.append((base, name[1:], f"{result.rate:.2f}", f"{peft.rate:.2f}", f"{ratio.value:.2f}"))
    columns = ("base", "episodes", "stacked, env steps/CPU s", "SubprocVecEnv", "ratio")
    return make_table("Over bases and numbers of episodes", columns, rows)


def memory_table(seen: Mapping[int, Mapping[str, int]]) -> Table:
    """Memory over the number of episodes."""
    keys = ("buffer_bytes", "resident_bytes", "base_bytes")
    rows = [
        (str(runs), *(format_bytes(found[key]) if key in found else "unknown" for key in keys))
        for runs, found in seen.items()
    ]
    return make_table("Memory of stacked episodes", ("episodes", "buffers", "resident", "frozen weights"), rows)


# Parts ----------------------------------------------------------------------------------------------------------------


def race_part(extent: Extent, console: Console, bar: Progress) -> Figures:
    """The races at the top, with short and long episodes, and the phases of stacked ones."""
    figures = _race(extent, console, bar)
    if extent.long_rounds:
        longer = replace(extent, load=replace(extent.load, steps=LONG), rounds=extent.long_rounds)
        figures |= {f"long/{name}": value for name, value in _race(longer, console, bar).items()}
    return figures


def _race(extent: Extent, console: Console, bar: Progress) -> Figures:
    base, load, key = extent.bases[0], extent.load, f"{extent.bases[0]}/n{extent.runs}"
    contenders = {
        "subproc": Contender(subproc_envs(load, base, extent.workers), load.transitions),
        "stacked": Contender(stacked_envs(load, base, extent.runs), load.transitions),
    }
    skipped: Figures = {}
    if extent.compiled and find_compiler():
        envs = stacked_envs(load, base, extent.runs, compiled=True)
        contenders["compiled"] = Contender(envs, load.transitions)
    elif extent.compiled:
        skipped = {f"{key}/compiled/skipped": NO_COMPILER}
    shown = bar.add_task(f"{base}, rounds", total=extent.rounds)
    try:
        results = race(contenders, extent.rounds, lambda turn: bar.advance(shown))
    finally:
        contenders["subproc"].envs.close()
    shares = phase_shares(phases_of(contenders["stacked"], max(1, extent.rounds // 2)))
    console.print(race_table(base, extent, results))
    for line in [str(reason) for reason in skipped.values()] + _compiled_line(results, extent.rounds):
        console.print(f"Compiled: {line}.", highlight=False)
    console.print(phase_table(shares))
    phases: Figures = {f"{key}/phases/{name}": share for name, share in shares.items()}
    return race_figures(base, extent.runs, results) | skipped | phases


def _compiled_line(results: Mapping[str, Result], rounds: int) -> list[str]:
    """What is to be told about compilation."""
    if "compiled" not in results:
        return []
    made = results["compiled"]
    isolated = f"{made.compile_seconds:.0f} CPU s for iterations that compiled, not counted"
    if not made.unsettled:
        return [isolated]
    return [f"{isolated}; {made.unsettled} of {rounds} rounds compiled on, and hold the time of it"]


def sweep_part(extent: Extent, console: Console, bar: Progress) -> Figures:
    """Races over bases and numbers of episodes, and the growth that fits."""
    if not extent.sweep_runs:
        return {}
    found: dict[str, dict[str, Result]] = {}
    figures: Figures = {}
    missing = [base for base in extent.bases if not (BASES_FOLDER / base / "model.safetensors").is_file()]
    shown = bar.add_task("bases, rounds", total=(len(extent.bases) - len(missing)) * extent.sweep_rounds)
    for base in [base for base in extent.bases if base not in missing]:
        found[base] = _sweep(extent, base, bar, shown)
        peft = {"subproc": found[base]["subproc"]}
        for runs in extent.sweep_runs:
            figures |= race_figures(base, runs, peft | {"stacked": found[base][f"n{runs}"]}, prefix="sweep/")
    console.print(sweep_table(found))
    if missing:
        console.print(f"Bases without weights here, left out: {', '.join(missing)}.", highlight=False)
    stacked = {(base, n): found[base][f"n{n}"].rate for base in found for n in extent.sweep_runs}
    peft_rates = {(base, 1): found[base]["subproc"].rate for base in found}
    for name, factors in (("stacked", growth(stacked, stacked=True)), ("subproc", growth(peft_rates, stacked=False))):
        figures |= {f"growth/{name}/{key}": value for key, value in factors.items()}
        text = ", ".join(f"{key} x {value:.2f}" for key, value in factors.items() if key != "largest_deviation")
        if text:
            off = factors["largest_deviation"]
            console.print(f"CPU time of {name}, for twice: {text} (off by {off:.0%} at most).", highlight=False)
    return figures


def _sweep(extent: Extent, base: str, bar: Progress, shown: TaskID) -> dict[str, Result]:
    """One base: SubprocVecEnv and each number of stacked episodes."""
    load = extent.load
    contenders = {"subproc": Contender(subproc_envs(load, base, extent.workers), load.transitions)}
    try:
        for runs in extent.sweep_runs:
            contenders[f"n{runs}"] = Contender(stacked_envs(load, base, runs), load.transitions)
        return race(contenders, extent.sweep_rounds, lambda turn: bar.advance(shown))
    finally:
        contenders["subproc"].envs.close()


def memory_part(extent: Extent, console: Console, bar: Progress) -> Figures:
    """Memory over the number of episodes, and the lines that fit."""
    if not extent.memory_runs:
        return {}
    base, seen = extent.bases[0], {}
    figures: Figures = {}
    for runs in bar.track(extent.memory_runs, description="memory, processes"):
        seen[runs] = memory_of(extent.load, base, runs)
        figures |= {f"memory/n{runs}/{key}": value for key, value in seen[runs].items()}
    console.print(memory_table(seen))
    for key in ("buffer_bytes", "resident_bytes"):
        if all(key in found for found in seen.values()):
            fit = linear_fit({runs: found[key] for runs, found in seen.items()})
            figures |= {f"memory/{key}/{name}": value for name, value in fit.items()}
            line = f"{format_bytes(int(fit['start']))} + {format_bytes(int(fit['each']))} an episode"
            console.print(f"{key}: {line}, off by {fit['largest_deviation']:.1%} at most.", highlight=False)
    return figures


def benchmark(options: EnvSpeed, extent: Extent, console: Console) -> Figures:
    """Run all parts, print their tables, and return all figures."""
    figures: Figures = {**machine_facts(torch.device("cpu")), "quick": options.quick, "workers": extent.workers}
    figures |= {"threads": 1, **asdict(extent.load)}
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for part in (race_part, sweep_part, memory_part):
            figures |= part(extent, console, bar)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(EnvSpeed, args=arguments, prog="python -m rankpilot.bench.training.env_speed")
    return run_command(partial(benchmark, options, QUICK if options.quick else FULL), options.json)


if __name__ == "__main__":
    sys.exit(main())
