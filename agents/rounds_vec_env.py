"""PPO's environment for training a policy: groups of episodes on fresh tasks, all cores at work.

Each iteration is a round of a few stacks, each on one base: groups of episodes of one fresh task each, and one more
episode of it that is flown by the rule which an untrained policy is. The reward comes at the end: how much lower an
episode's held-out loss is than the rule's, as a share of the task's headroom. Which process trains a stack decides
nothing, so results are the same on any number of cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from ..env.oracle import utilities
from ..env.reward import REWARD_BOUND
from ..env.rounds import Round
from ..env.schedule import DecisionSchedule
from ..env.score_actions import decode
from ..env.spaces import observation_space, read_scores, score_space
from ..env.stacked_episodes import StackedEpisodes
from ..env.task_data import TASKS_HELD
from ..env.tasks import ProxyTask
from ..errors import ConfigError, WorkerError
from ..lora.cost import FloatArray
from ..lora.ladder import IntArray
from .policy import Policy
from .pool import apart

Arrays = dict[str, NDArray[Any]]
Note = Callable[[Arrays, Sequence[FloatArray | None]], None]

FRESH_SEEDS = 10_000_000
"""Seeds of fresh tasks lie above this, those of suites below."""


@dataclass(frozen=True)
class RoundsConfig:
    """What is trained on.

    Attributes:
        templates: tasks by suite; fresh ones differ from one of them in the seed alone. Suites take turns, and what
            budgets count (`ProxyTask.price`) is drawn evenly.
        stacks: how many stacks of episodes a round has, each on one base.
        groups: tasks of a stack.
        group: episodes of each task.
        schedule: when ranks are decided.
        seed: of the tasks.
        workers: processes, at least 1; no more than stacks are of use.
        device: where they train.
    """

    templates: tuple[tuple[ProxyTask, ...], ...]
    stacks: int
    groups: int
    group: int
    schedule: DecisionSchedule
    seed: int = 0
    workers: int = 1
    device: str = "cpu"

    @property
    def worker_count(self) -> int:
        """Processes that run."""
        return min(self.workers, self.stacks)

    def draw(self, round_: int, stack: int) -> list[ProxyTask]:
        """The fresh tasks of a stack, one a group; each keeps its template's reference, as a measure of headroom."""
        generator = np.random.default_rng([self.seed, round_, stack])
        bases = sorted({task.base for suite in self.templates for task in suite})
        base = bases[int(generator.integers(len(bases)))]
        suites = [own for suite in self.templates if (own := [task for task in suite if task.base == base])]
        tasks = []
        for group in range(self.groups):
            suite = suites[(round_ + stack + group) % len(suites)]
            prices = sorted({task.price for task in suite})
            price = prices[int(generator.integers(len(prices)))]
            alike = [task for task in suite if task.price == price]
            template = alike[int(generator.integers(len(alike)))]
            tasks.append(replace(template, seed=FRESH_SEEDS + int(generator.integers(2**30))))
        return tasks


@dataclass(frozen=True, eq=False)
class StackState:
    """What a worker tells of a stack: before its first decision, and after each.

    Attributes:
        arrays: the observations, one row an episode.
        losses: held-out losses at the end, in nats; NaN for failed runs.
        churn: see `Round`.
        rule_losses: those of the rule's episodes, one a group.
        initial_losses: before training, one a group.
        utilities: what each module is worth at most, in nats, (modules,) by episode; None where it is not known.
        ranks: at the end, int64 (modules,) by episode.
    """

    arrays: Arrays
    losses: tuple[float, ...] = ()
    churn: tuple[float, ...] = ()
    rule_losses: tuple[float, ...] = ()
    initial_losses: tuple[float, ...] = ()
    utilities: tuple[FloatArray | None, ...] = ()
    ranks: tuple[IntArray, ...] = ()


class _Worker:
    """Trains stacks; lives in a process of its own, or in this one."""

    def __init__(self, rule: Policy, schedule: DecisionSchedule, slots: int, max_modules: int, device: str) -> None:
        self._rule, self._schedule, self._slots, self._max_modules = rule, schedule, slots, max_modules
        self._device = device
        self._engines: dict[tuple[int, str], StackedEpisodes] = {}
        self._rounds: dict[int, tuple[Round, int]] = {}
        self._initial: dict[int, tuple[float, ...]] = {}

    def begin(
        self, stack: int, tasks: Sequence[ProxyTask], ruled: Sequence[ProxyTask], with_utilities: bool
    ) -> StackState:
        """Start a stack.

        Args:
            stack: its number; several are under way at once, each in an engine of its own.
            tasks: one an episode.
            ruled: what the rule flies beside them.
            with_utilities: tell what modules are worth on planted tasks.
        """
        key = (stack, tasks[0].base)
        if key not in self._engines:
            self._engines[key] = StackedEpisodes(tasks[0].base, self._schedule, self._slots, device=self._device)
        found = Round(self._engines[key], [*tasks, *ruled])
        self._rounds[stack] = found, len(tasks)
        self._initial[stack] = tuple(found.initial_loss(len(tasks) + place) for place in range(len(ruled)))
        worth: tuple[FloatArray | None, ...] = ()
        if with_utilities:
            pairs = zip(tasks, found.observations, strict=False)
            worth = tuple(utilities(t, o.problem)[:, -1] if t.kind == "planted" else None for t, o in pairs)
        return StackState(self._arrays(stack), utilities=worth)

    def step(self, stack: int, actions: NDArray[Any]) -> StackState:
        """Take decisions, (episodes, action size)."""
        found, count = self._rounds[stack]
        decisions = {}
        for slot in found.flying:
            observation = found.observations[slot]
            if slot < count:
                scores, steering = read_scores(actions[slot], self._max_modules, len(observation.modules))
                decisions[slot] = decode(observation.problem, scores, steering)[0], scores
            else:
                ruled = self._rule.decide(observation)
                decisions[slot] = ruled.deltas, ruled.scores
        found.step(decisions)
        if found.flying:
            return StackState(self._arrays(stack))
        losses = tuple(found.losses())
        return StackState(
            self._arrays(stack),
            losses[:count],
            tuple(found.churn[:count]),
            losses[count:],
            self._initial[stack],
            ranks=tuple(found.ranks[:count]),
        )

    def _arrays(self, stack: int) -> Arrays:
        found, count = self._rounds[stack]
        rows = [observation.padded(self._max_modules) for observation in found.observations[:count]]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _serve(pipe: Connection, *options: Any) -> None:
    """A worker's process: answer calls until the pipe closes."""
    torch.set_num_threads(1)
    worker = _Worker(*options)
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({stack: getattr(worker, name)(stack, *values) for stack, (name, values) in calls.items()})
        except Exception as error:  # whatever it is, the parent raises it
            pipe.send(error)


class RoundsVecEnv(VecEnv):
    """Rounds of fresh tasks for PPO: every episode has the same number of decisions, and all end together.

    Args:
        config: what is trained on.
        rule: flies the episode that others are measured against.
        max_modules: padding of observations and actions.

    Attributes:
        round: number of the round under way.

    Raises:
        ConfigError: tasks of several lengths.
        WorkerError: a worker's process ended; what it raises is raised here as it is.
    """

    def __init__(self, config: RoundsConfig, rule: Policy, max_modules: int) -> None:
        self.config = config
        steps = {task.steps for templates in config.templates for task in templates}
        if len(steps) != 1:
            raise ConfigError(f"All tasks of a round have the same number of steps; got {sorted(steps)}.")
        self.decisions = len(config.schedule.steps(steps.pop()))
        self.max_modules = max_modules
        self.render_mode = None
        episodes = config.stacks * config.groups * config.group
        super().__init__(episodes, observation_space(max_modules), score_space(max_modules))
        self.round = 0
        slots = config.groups * (config.group + 1)
        self._worker_options = (rule, config.schedule, slots, max_modules, config.device)
        self._local: _Worker | None = None
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._actions: NDArray[Any] | None = None

    def _calls(self, calls: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, StackState]:
        """Have the workers answer calls, by stack."""
        if self.config.worker_count == 1:
            self._local = self._local or _Worker(*self._worker_options)
            with apart():
                return {stack: getattr(self._local, name)(stack, *values) for stack, (name, values) in calls.items()}
        if not self._pipes:
            self._start_processes()
        shares = [{s: call for s, call in calls.items() if s % len(self._pipes) == i} for i in range(len(self._pipes))]
        found: dict[int, StackState] = {}
        try:
            for pipe, share in zip(self._pipes, shares, strict=True):
                pipe.send(share)
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError) as error:
            raise WorkerError("A worker process ended, for lack of memory perhaps. Try fewer workers.") from error
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            found |= answer
        return found

    def _start_processes(self) -> None:
        context = get_context("spawn")
        for _ in range(self.config.worker_count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, *self._worker_options), daemon=True)
            process.start()
            there.close()  # else nobody would notice that the process ended
            self._pipes.append(here)
            self._processes.append(process)

    # Rounds of PPO ----------------------------------------------------------------------------------------------------

    def reset(self) -> VecEnvObs:
        """Start round `round`."""
        config = self.config
        self._tasks = [config.draw(self.round, stack) for stack in range(config.stacks)]
        self._taken = 0
        found = self._calls(
            {
                stack: ("begin", ([task for task in own for _ in range(config.group)], own, False))
                for stack, own in enumerate(self._tasks)
            }
        )
        return self._joined(found)

    def _joined(self, found: dict[int, StackState]) -> Arrays:
        ordered = [found[stack].arrays for stack in range(len(found))]
        return {key: np.concatenate([arrays[key] for arrays in ordered]) for key in ordered[0]}

    def step_async(self, actions: NDArray[Any]) -> None:
        """Note the actions, (num_envs, action size)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Take one decision in every episode; after the last one the next round begins."""
        assert self._actions is not None
        parts = np.split(self._actions, self.config.stacks)
        found = self._calls({stack: ("step", (part,)) for stack, part in enumerate(parts)})
        self._taken += 1
        seen = self._joined(found)
        observations: VecEnvObs = seen
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        ended = self._taken == self.decisions
        if ended:
            rewards = np.concatenate([rewards_of(found[stack], own) for stack, own in enumerate(self._tasks)])
            ranks = [own for stack in range(len(self._tasks)) for own in found[stack].ranks]
            for slot, info in enumerate(infos):
                info["ranks"] = ranks[slot]
                info["terminal_observation"] = {key: value[slot] for key, value in seen.items()}
            self.round += 1
            observations = self.reset()
        return observations, rewards, np.full(self.num_envs, ended), infos

    # Whole tasks ------------------------------------------------------------------------------------------------------

    def play(
        self,
        tasks: Sequence[ProxyTask],
        act: Callable[[Arrays], NDArray[Any]],
        *,
        note: Note | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Fly tasks to their end, in stacks of their own: the round under way waits.

        Args:
            tasks: any, of the templates' length; those on one base run side by side.
            act: actions (episodes, action size) for observations.
            note: called with the observations and the worth of modules, at each decision of each stack.
            on_progress: called with the tasks that have been flown and all of them, at first and now and then.

        Returns:
            Held-out losses in nats, NaN for failed runs.
        """
        size = min(self.config.groups * (self.config.group + 1), TASKS_HELD)
        by_base: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            by_base.setdefault(task.base, []).append(index)
        chunks = [own[i : i + size] for own in by_base.values() for i in range(0, len(own), size)]
        losses = [math.nan] * len(tasks)
        report = on_progress or (lambda done, total: None)
        report(0, len(tasks))
        for start in range(0, len(chunks), self.config.stacks):
            some = dict(enumerate(chunks[start : start + self.config.stacks], start=self.config.stacks))
            found = self._calls(
                {s: ("begin", ([tasks[i] for i in own], [], note is not None)) for s, own in some.items()}
            )
            worth = {stack: state.utilities for stack, state in found.items()}
            for _ in range(self.decisions):
                if note:
                    for stack, state in found.items():
                        note(state.arrays, worth[stack])
                actions = {stack: act(state.arrays) for stack, state in found.items()}
                found = self._calls({stack: ("step", (own,)) for stack, own in actions.items()})
            for stack, own in some.items():
                for index, loss in zip(own, found[stack].losses, strict=True):
                    losses[index] = loss
            report(sum(map(len, chunks[: start + len(some)])), len(tasks))
        return losses

    # The rest of the contract -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._pipes, self._processes = [], []

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of this environment, once for each episode; AttributeError for unknown names."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: episodes have no attributes of their own."""
        raise ConfigError("Rounds share their settings: make a new RoundsVecEnv.")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Refused: episodes have no methods of their own."""
        raise AttributeError(f"Rounds have no method {method_name!r} of their own.")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Never."""
        return [False] * len(list(self._get_indices(indices)))


def rewards_of(state: StackState, tasks: Sequence[ProxyTask]) -> NDArray[np.float32]:
    """Improvements over the rule in shares of the headroom, less the churn; -3 to 3, failed runs at the lower end.

    Args:
        state: of a stack that has ended.
        tasks: one a group; the reference of each says how the headroom compares with what uniform gains.
    """
    rows = []
    groups = np.array(state.losses).reshape(len(tasks), -1)
    for task, losses, rule, initial in zip(tasks, groups, state.rule_losses, state.initial_losses, strict=True):
        assert task.reference is not None
        sound = losses[np.isfinite(losses)]
        level = rule if math.isfinite(rule) else float(np.median(sound)) if len(sound) else initial
        gain = max(initial - level, 0.01 * initial, 1e-6)
        shares = (level - losses) / (gain * task.reference.headroom / task.reference.gain)
        rows.append(np.clip(np.nan_to_num(shares, nan=-REWARD_BOUND), -REWARD_BOUND, REWARD_BOUND))
    return np.asarray(np.concatenate(rows) - np.array(state.churn), dtype=np.float32)
