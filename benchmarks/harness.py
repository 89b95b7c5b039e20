"""What benchmarks share: interleaved timing, ratios with intervals, the command line."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import tyro
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import write_json
from rankpilot.common.statistics import Estimate, Statistic, estimate
from rankpilot.decide.plan.parts import Part
from rich.console import Console
from rich.progress import track

WIDTH = 132
"""Columns of output that goes into a file."""

Figures = dict[str, float | int | str | bool]
"""Results by flat name, such as "bert.adalora.step_ratio"."""


def turn_order(count: int, turn: int) -> tuple[int, ...]:
    """The order of the participants in one round of an interleaved run: a Williams square, rotated by one each round.

    Over `count` rounds each participant takes each place once, and (if `count` is even) follows each other one equally
    often. A mere rotation of 0, 1, 2, 3 would always put the same participant behind the one with the coldest cache.

    Args:
        count: participants, > 0.
        turn: number of the round, from 0.
    """
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    return tuple((number + turn) % count for number in zigzag)


def interleave(
    work: Mapping[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    *,
    after_round: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, FloatArray]:
    """Time several pieces of work in turn, so that whatever slows the machine down hits all of them alike.

    Args:
        work: by name; called with the number of the round.
        rounds: how often each is called.
        device: waited for before and after each call.
        after_round: called with the number of the round, off the clock.
        clock: gives the time in seconds; `time.process_time` counts CPU time, which depends less on what else runs.

    Returns:
        Seconds by name, float64 (rounds,).
    """
    names = list(work)
    seconds = {name: np.zeros(rounds) for name in names}
    # All participants live in one process. A full collection walks all of their models, and its time would count for
    # the participant that happens to start it: so the collector keeps away from what exists already.
    frozen_before = gc.get_freeze_count() > 0  # by whoever calls, who would not want all of it thawed
    gc.collect()
    gc.freeze()
    try:
        for turn in range(rounds):
            for index in turn_order(len(names), turn):
                name = names[index]
                wait_for(device)
                start = clock()
                work[name](turn)
                wait_for(device)
                seconds[name][turn] = clock() - start
            if after_round:
                after_round(turn)
    finally:
        if not frozen_before:
            gc.unfreeze()
    return seconds


def clock_for(device: torch.device) -> Callable[[], float]:
    """A clock in seconds: CPU time if the CPU does the work, which depends less on what else runs; else wall time."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired_ratios(seconds: FloatArray, base: FloatArray, period: int) -> FloatArray:
    """Each time over the base's time in the same round, one row for each cycle of `period` rounds.

    Args:
        seconds: (rounds,).
        base: (rounds,), > 0.
        period: rounds in a cycle.

    Returns:
        float64 (rounds / period, period).

    Raises:
        ConfigError: the rounds make no whole number of cycles.
    """
    if not len(seconds) or len(seconds) % period:
        raise ConfigError(f"{len(seconds)} rounds make no whole number of cycles of {period}.")
    return np.asarray((seconds / base).reshape(-1, period), dtype=np.float64)


def medians(values: FloatArray, counts: IntArray) -> FloatArray:
    """Median of each draw, (draws, ...), of values (runs, ...); of an even number the mean of the two in the middle."""
    order = np.argsort(values, axis=0)
    ordered = np.take_along_axis(values, order, axis=0)[None]
    ends = np.cumsum(counts[:, order], axis=1)
    total = ends[:, -1:]
    middle = [(ends > rank).argmax(axis=1)[:, None] for rank in ((total - 1) // 2, total // 2)]
    return np.asarray(np.mean([np.take_along_axis(ordered, place, axis=1)[:, 0] for place in middle], axis=0))


def usual_step(ratios: FloatArray, counts: IntArray) -> FloatArray:
    """The median over all steps of each draw, (draws,): what a step costs that has no special work in it.

    Args:
        ratios: (cycles, places).
        counts: how often each cycle is in each draw, (draws, cycles).
    """
    return medians(ratios.reshape(-1), np.repeat(counts, ratios.shape[1], axis=1))


def whole_cycle(ratios: FloatArray, counts: IntArray) -> FloatArray:
    """What a cycle costs in each draw, (draws,): the mean over the places in it of the median over the cycles.

    So work that falls on one place in ten counts with a tenth of its cost, as a run pays it, and a spike of the machine
    in a minority of the cycles does not count. The ratio of whole cycles' times would be lost as soon as there is a
    spike in most of them.

    Args:
        ratios: (cycles, places).
        counts: how often each cycle is in each draw, (draws, cycles).
    """
    return np.asarray(medians(ratios, counts).mean(axis=1), dtype=np.float64)


def estimate_cycles(ratios: FloatArray, statistic: Statistic) -> Estimate:
    """A statistic with its 95 % interval; the bootstrap draws whole cycles, since neighbours in time are alike.

    Args:
        ratios: (cycles, places).
        statistic: `usual_step` or `whole_cycle`.
    """
    return estimate(ratios, range(len(ratios)), statistic)


def usual_ratio(seconds: FloatArray, base: FloatArray) -> Estimate:
    """The median of the times over the base's times in the same rounds, (rounds,) each, with its 95 % interval."""
    return estimate_cycles(paired_ratios(seconds, base, 1), usual_step)


def estimate_figures(name: str, estimate: Estimate) -> Figures:
    """An estimate by flat name: NAME, NAME_low and NAME_high."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def machine_facts(device: torch.device) -> Figures:
    """What a figure depends on beside the code: versions, threads, device."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = {name: version(name) for name in ("rankpilot", "torch", "transformers", "peft")}
    return {**packages, "device": device.type, "chip": chip, "threads": torch.get_num_threads()}


T = TypeVar("T")


def run_command(
    name: str, kind: type[Any], benchmark: Callable[[Any, Console], Figures], arguments: Sequence[str]
) -> None:
    """Run a benchmark as a command: tables to stdout, figures to a file.

    Args:
        name: after `python -m benchmarks`.
        kind: of the options, read from the command line; they have `json`, the file for the figures or None.
        benchmark: prints its tables on the console and returns its figures.
        arguments: the command line after the name.
    """
    options = tyro.cli(kind, args=arguments, prog=f"python -m benchmarks {name}")
    if options.json:
        check_output(options.json)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    figures = benchmark(options, console)
    if options.json:
        write_json(options.json, figures)


def with_progress(items: Sequence[T], title: str) -> Iterable[T]:
    """The same items, with a progress bar on stderr meanwhile."""
    return track(items, title, console=Console(stderr=True), transient=True)


def check_output(path: Path) -> None:
    """Make sure, before minutes of work, that a file can be written.

    Raises:
        ConfigError: the path is a folder, a file of JSON lines, or its folder cannot be made.
    """
    if path.is_dir():
        raise ConfigError(f"--json names the folder {path}. Name a file in it, such as {path / 'figures.json'}.")
    if path.suffix == ".jsonl":
        raise ConfigError(f"--json {path}: figures are one JSON object. Name {path.with_suffix('.json')}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot make the folder of --json {path}: {error}") from error


@contextmanager
def isolated() -> Iterator[None]:
    """One thread, and no trace in the random state: bases are adapted at random."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def padding_share(lengths: IntArray, parts: Sequence[Part]) -> float:
    """Share of the padding of one rectangle avoided by some parts, 0 if it has none."""
    rectangle, real = len(lengths) * int(lengths.max()), int(lengths.sum())
    in_parts = sum(part.tokens for part in parts)
    return (rectangle - in_parts) / (rectangle - real) if rectangle > real else 0.0
