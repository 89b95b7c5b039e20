"""How fast the environment is: train steps per CPU second of stacked episodes beside single PEFT episodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rankpilot.common.arrays import FloatArray
from rankpilot.common.text import make_table
from rankpilot.common.workers import isolated
from rankpilot.decide.rate_control import KEEP, SHORTEST
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.proxy_task import ProxyTask, Reference
from rankpilot.env.rank_allocation import TOP, RankAllocationEnv
from rankpilot.env.run_control import RunControlVectorEnv
from rankpilot.env.vector import StackedVectorEnv
from rich.console import Console

from .harness import Figures, estimate_figures, interleave, machine_facts, usual_ratio, with_progress

SCHEDULE = DecisionSchedule(probe_steps=8, probe_batch=2, fractions=(0.0, 0.25, 0.5, 0.75))


@dataclass(frozen=True)
class Load:
    """What is trained, and how often.

    Attributes:
        steps: train steps of an episode, by name: a quarter of them lies between two decisions.
        runs: numbers of stacked episodes.
        rounds: timed episodes of each contender.
        base: the proxy base.
        rows: of a batch.
        length: tokens of a row.
        eval_rows: held-out rows, evaluated at the end of an episode.
    """

    steps: tuple[int, ...] = (20, 100)
    runs: tuple[int, ...] = (4, 16)
    rounds: int = 7
    base: str = "llama-4x64"
    rows: int = 4
    length: int = 16
    eval_rows: int = 32


FULL, QUICK = Load(), Load(steps=(20,), runs=(16,), rounds=3)


@dataclass(frozen=True)
class Options:
    """Measure the environment's speed: stacked episodes on one frozen base beside one PEFT episode at a time.

    `StackedVectorEnv` with 4 and with 16 episodes and `RankAllocationEnv` take turns in one process on one thread: an
    episode of each, with a Llama of 4 layers x 64, four decisions and no change of rank asked for. An episode is
    training, signals, plans, rank changes, observations and the held-out loss; the probe and the uniform run, which
    are the same for all episodes of a task, are off the clock. It is measured with 5 train steps between decisions,
    where decisions weigh most, and with 25, as in the suites that policies train on. Episodes whose learning rate is
    controlled come last: stacked ones beside one at a time, as a process for each environment would run them.

    Time is CPU time, which depends little on what else runs. Rates are medians over rounds; a ratio is the median over
    pairs of the same round, with a 95 % interval (bootstrap). The full run takes about three minutes on two cores.

    Attributes:
        quick: under a minute: short episodes, few rounds.
        json: also write the figures to this file, as flat JSON with names like "steps_100.n16.over_peft".
    """

    quick: bool = False
    json: Path | None = None


def whole_episodes(env: RankAllocationEnv | StackedVectorEnv) -> Callable[[int], None]:
    """Work for `interleave`: train all episodes of an environment to their end, and reset them."""
    no_change = np.full(env.action_space.shape or (), TOP, dtype=np.int64)
    env.reset(seed=0)

    def run(turn: int) -> None:
        for _ in SCHEDULE.fractions:
            _, _, ended, _, _ = env.step(no_change)
        assert np.all(ended), "the decisions of the schedule are all that an episode has"
        if isinstance(env, RankAllocationEnv):  # the vector environment has reset itself
            env.reset()

    return run


def measure(load: Load, steps: int) -> tuple[dict[str, int], dict[str, FloatArray]]:
    """Train steps of an episode and CPU seconds of each round, (rounds,), by contender; "peft" is the first."""
    task = ProxyTask(
        "shift",
        seed=0,
        base=load.base,
        steps=steps,
        batch_size=load.rows,
        length=load.length,
        eval_rows=load.eval_rows,
        reference=Reference(2.0, 1.8, 1.7),  # known, so that no environment measures it
    )
    work = {"peft": whole_episodes(RankAllocationEnv(task=task, schedule=SCHEDULE))}
    for runs in load.runs:
        work[f"n{runs}"] = whole_episodes(StackedVectorEnv(runs, base=load.base, task=task, schedule=SCHEDULE))
    cpu = torch.device("cpu")
    interleave(work, 1, cpu)  # to warm up
    seconds = interleave(work, load.rounds, cpu, clock=time.process_time)
    return dict(zip(work, [steps, *(steps * runs for runs in load.runs)], strict=True)), seconds


def measure_control(load: Load) -> tuple[dict[str, int], dict[str, FloatArray]]:
    """As `measure`, of episodes whose learning rate is controlled, and left as it is; "n1" is one at a time."""
    work, counts = {}, {}
    for runs in (1, *load.runs):
        env = RunControlVectorEnv(runs, base=load.base, lengths=(SHORTEST,))

        def run(turn: int, env: RunControlVectorEnv = env) -> None:
            env.reset(seed=0)  # the same runs each time, of which those left alone are known after the first
            ended = np.zeros(1)
            while not ended.any():
                ended = env.step(np.full(env.num_envs, KEEP))[2]

        work[f"n{runs}"], counts[f"n{runs}"] = run, SHORTEST * runs
    cpu = torch.device("cpu")
    interleave(work, 1, cpu)  # to warm up
    return counts, interleave(work, load.rounds, cpu, clock=time.process_time)


def benchmark(options: Options, console: Console) -> Figures:
    """Measure all lengths of episodes, print the table, and return the figures."""
    load = QUICK if options.quick else FULL
    figures: Figures = {**machine_facts(torch.device("cpu")), "threads": 1, "quick": options.quick}
    figures |= {name: value for name, value in asdict(load).items() if not isinstance(value, tuple)}
    rows = []
    for steps in with_progress(load.steps, "episodes"):
        with isolated():
            counts, seconds = measure(load, steps)
        each = {name: seconds[name] / counts[name] for name in counts}
        for name, count in counts.items():
            ratio = usual_ratio(each["peft"], each[name])
            rate = 1 / float(np.median(each[name]))
            title = "single PEFT episodes" if name == "peft" else f"{count // steps} stacked episodes"
            rows.append((f"{steps} steps, {title}", f"{rate:.1f}", f"{1e3 / rate:.2f} ms", f"{ratio:.2f}"))
            prefix = f"steps_{steps}.{name}"
            figures[f"{prefix}.train_steps_per_cpu_s"] = rate
            if name != "peft":
                figures |= estimate_figures(f"{prefix}.over_peft", ratio)
    with isolated():
        counts, seconds = measure_control(load)
    each = {name: seconds[name] / counts[name] for name in counts}
    for name, count in counts.items():
        ratio, rate = usual_ratio(each["n1"], each[name]), 1 / float(np.median(each[name]))
        title = f"controlled, {SHORTEST} steps, {count // SHORTEST} at once"
        rows.append((title, f"{rate:.1f}", f"{1e3 / rate:.2f} ms", f"{ratio:.2f}"))
        figures[f"control.{name}.train_steps_per_cpu_s"] = rate
        if name != "n1":
            figures |= estimate_figures(f"control.{name}.over_one", ratio)
    title = f"{load.base}, {load.rows} x {load.length} tokens, four decisions; medians of {load.rounds} rounds"
    console.print(make_table(title, ("episodes of", "train steps/CPU s", "CPU of one", "over single"), rows))
    return figures
