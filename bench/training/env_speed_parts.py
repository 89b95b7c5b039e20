"""What `env_speed` measures: PPO on vector environments, in CPU time that counts child processes; phases; memory.

As a command, `python -m rankpilot.bench.training.env_speed_parts JSON`, it is the child process of `memory_of`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import psutil
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from ...agents.training.config import TrainConfig
from ...agents.training.ppo_policy import RankPolicy
from ...agents.training.stacked_vec_env import StackedVecEnv
from ...allocation.actions import PLACEMENT
from ...allocation.schedule import DecisionSchedule
from ...common.arrays import FloatArray
from ...env.episodes import stacked as stacked_episodes
from ...env.episodes.slots import StackedConfig
from ...env.episodes.stacked import StackedEpisodes
from ...env.rank_allocation import RankAllocationEnv
from ...env.score_actions import ScoreActions
from ...env.tasks.finetune import Reference
from ...env.tasks.proxy_task import ProxyTask
from ...errors import RankPilotError
from ...lora.stacked.adapters import StackedAdapters
from ...lora.stacked.run import StackedMeter
from ...memory import resident
from ..harness import Estimate, bootstrap, interleave, paired_ratios, usual_step

FRACTIONS = (0.0, 0.25, 0.5, 0.75)
"""When ranks are decided: four env steps an episode."""

COMPILE_ATTEMPTS = 6
"""Iterations with a compilation in them are made again, but no more than this often in a round."""


@dataclass(frozen=True)
class Load:
    """What each environment trains, and how much PPO collects before an update.

    Attributes:
        steps: train steps of an episode; a quarter of them an env step.
        rows: of a batch.
        length: tokens of a row.
        eval_rows: held-out rows, evaluated once an episode.
        transitions: env steps of an iteration, over all episodes at a time.
    """

    steps: int = 20
    rows: int = 4
    length: int = 16
    eval_rows: int = 32
    transitions: int = 64

    @property
    def schedule(self) -> DecisionSchedule:
        """When ranks are decided; the probe is run once, off the clock."""
        return DecisionSchedule(probe_steps=8, probe_batch=min(2, self.rows), fractions=FRACTIONS)

    def task(self, base: str) -> ProxyTask:
        """A fine-tune whose uniform run counts as known, so that no environment makes it."""
        return ProxyTask(
            "shift",
            seed=0,
            base=base,
            steps=self.steps,
            batch_size=self.rows,
            length=self.length,
            eval_rows=self.eval_rows,
            reference=Reference(2.0, 1.8, 1.7),
        )


# Environments and PPO -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """Makes one worker's environment on one thread; pickled to the worker's process."""

    load: Load
    base: str

    def __call__(self) -> gym.Env[Any, Any]:
        """The environment."""
        torch.set_num_threads(1)
        return ScoreActions(RankAllocationEnv(task=self.load.task(self.base), schedule=self.load.schedule))


def subproc_envs(load: Load, base: str, workers: int) -> VecEnv:
    """PEFT environments, each in a process of its own."""
    return SubprocVecEnv([Worker(load, base)] * workers, start_method="spawn")


def stacked_envs(load: Load, base: str, runs: int, *, compiled: bool = False) -> StackedVecEnv:
    """Stacked episodes in this process."""
    task = load.task(base)
    return StackedVecEnv(StackedConfig(runs, base=base, task=task, schedule=load.schedule, compiled=compiled))


class Contender:
    """PPO on one vector environment.

    Args:
        envs: where the episodes run.
        transitions: env steps of an iteration; at least one whole episode of each environment is made.

    The learning rate is next to nothing: updates cost what they cost, and all contenders keep the same policy, so that
    none gets smaller plans than another.
    """

    def __init__(self, envs: VecEnv, transitions: int) -> None:
        rollout = max(transitions // envs.num_envs, len(FRACTIONS))
        self.envs = envs
        self.steps = rollout * envs.num_envs
        self.compile_seconds = self.unsettled = 0.0
        self.model = PPO(
            RankPolicy,
            envs,
            n_steps=rollout,
            batch_size=self.steps,
            n_epochs=TrainConfig.epochs,
            learning_rate=1e-7,
            clip_range=TrainConfig.clip_range,
            gamma=1.0,
            gae_lambda=1.0,
            vf_coef=0.1,
            seed=0,
            device="cpu",
        )

    def iterate(self) -> tuple[float, float]:
        """Collect one rollout and update; returns seconds of CPU and of wall time."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        self.model.learn(self.steps, reset_num_timesteps=False)
        return cpu_seconds() - cpu, time.perf_counter() - wall

    def settled(self) -> tuple[float, float]:
        """As `iterate`, without what is compiled: again, until nothing was; compiled iterations are added up apart."""
        for _ in range(COMPILE_ATTEMPTS):
            before = _graphs()
            cpu, wall = self.iterate()
            if _graphs() == before:
                return cpu, wall
            self.compile_seconds += cpu
        self.unsettled += 1
        return cpu, wall


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile needs on a CPU, if there is one."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cpu_seconds() -> float:
    """CPU time of this process and of all its children, those that live and those that have ended."""
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(total)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: threads that wait for each other would count as CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The race -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Result:
    """One contender's iterations.

    Attributes:
        steps: env steps of an iteration.
        cpu: seconds, (rounds,).
        wall: seconds, (rounds,).
        compile_seconds: CPU time of iterations in which something was compiled; not in `cpu`.
        unsettled: rounds that compiled on however often they were made again, and hold it in `cpu`.
    """

    steps: int
    cpu: FloatArray
    wall: FloatArray
    compile_seconds: float = 0.0
    unsettled: int = 0

    @property
    def rate(self) -> float:
        """Env steps per CPU second, median over rounds."""
        return float(self.steps / np.median(self.cpu))

    @property
    def wall_rate(self) -> float:
        """Env steps per second of wall time, median over rounds."""
        return float(self.steps / np.median(self.wall))

    def over(self, base: Result) -> Estimate:
        """How many times as fast as another, in CPU time, from pairs of the same round."""
        return bootstrap(paired_ratios(base.cpu / base.steps, self.cpu / self.steps, 1), usual_step)


def race(
    contenders: Mapping[str, Contender], rounds: int, after_round: Callable[[int], None] | None = None
) -> dict[str, Result]:
    """Run one iteration of each in turn, after one off the clock."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}

    def timed(name: str, turn: int) -> None:
        spent[name].append(contenders[name].settled())

    with one_thread():
        for contender in contenders.values():
            contender.settled()
        work = {name: functools.partial(timed, name) for name in contenders}
        interleave(work, rounds, torch.device("cpu"), after_round=after_round)
    results = {}
    for name, contender in contenders.items():
        cpu, wall = np.array(spent[name]).T
        results[name] = Result(contender.steps, cpu, wall, contender.compile_seconds, int(contender.unsettled))
    return results


# Phases ---------------------------------------------------------------------------------------------------------------

REST = "the rest"

POINTS: tuple[tuple[str, Any, str], ...] = (
    ("training, both passes", StackedEpisodes, "_train"),
    ("Adam and clipping", StackedAdapters, "clip"),
    ("Adam and clipping", StackedAdapters, "step"),
    ("signals", stacked_episodes, "accumulate_all"),
    ("signals", StackedMeter, "read"),
    ("rank changes", stacked_episodes, "set_stacked_ranks"),
    ("rank changes", stacked_episodes, "reset_runs"),
    ("held-out evaluation", StackedEpisodes, "_held_out"),
    ("observations and plans", StackedVecEnv, "step_wait"),
    ("observations and plans", StackedVecEnv, "reset"),
    ("policy in rollouts", PPO, "collect_rollouts"),
    ("PPO update", PPO, "train"),
)
"""Calls that are timed; each counts without the timed calls inside it."""


class PhaseClock:
    """Adds up CPU time by phase: a call stops the clock of the one around it.

    Args:
        now: reads the time.

    Attributes:
        seconds: by phase.
    """

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside, but not in inner phases."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = self._now()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted as a phase."""

        @functools.wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return timed_call


def phases_of(contender: Contender, rounds: int) -> dict[str, float]:
    """CPU seconds of each phase in some more iterations of stacked environments."""
    clock = PhaseClock()
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        for name, owner, attribute in POINTS:
            call = clock.timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, call))
        for _ in range(rounds):
            with clock.phase(REST):
                contender.iterate()
    return {name: clock.seconds.get(name, 0.0) for name in dict.fromkeys([name for name, _, _ in POINTS] + [REST])}


# Memory ---------------------------------------------------------------------------------------------------------------


def memory_of(load: Load, base: str, runs: int) -> dict[str, int]:
    """What stacked episodes hold, seen in a fresh process.

    Returns:
        "buffer_bytes": factors, gradients, moments and sums at their largest; "resident_bytes": how far the resident
        set rises from before they are made to its peak in one episode, on Linux; "base_bytes": of the frozen weights.

    Raises:
        RankPilotError: the process failed.
    """
    given = json.dumps({"load": asdict(load), "base": base, "runs": runs})
    command = [sys.executable, "-m", "rankpilot.bench.training.env_speed_parts", given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RankPilotError(f"The process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    seen: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return seen


def measure_memory(load: Load, base: str, runs: int) -> dict[str, int]:
    """The child's work: one run first, for the libraries and all that is kept, then all of them."""
    _episode(stacked_envs(load, base, 1))
    before = resident.restart_peak() if resident.can_tell() else None
    envs = stacked_envs(load, base, runs)
    buffers = _episode(envs)
    seen = {"buffer_bytes": buffers}
    if before is not None:
        seen["resident_bytes"] = resident.peak() - before
    model = envs.core.episodes._adapters.model
    return seen | {"base_bytes": sum(parameter.nbytes for parameter in model.parameters())}


def _episode(envs: StackedVecEnv) -> int:
    """Run one episode at equal scores; returns the most bytes that the buffers took."""
    adapters, most = envs.core.episodes._adapters, 0
    envs.reset()
    for _ in FRACTIONS:
        most = max(most, adapters.buffer_bytes)
        envs.step(np.zeros((envs.num_envs, envs.core.max_modules + len(PLACEMENT)), dtype=np.float32))
    return most


if __name__ == "__main__":
    torch.set_num_threads(1)
    parsed = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(measure_memory(Load(**parsed["load"]), parsed["base"], parsed["runs"])) + "\n")
