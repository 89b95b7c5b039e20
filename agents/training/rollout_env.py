"""PPO's environment for training a policy: groups of episodes on fresh tasks, all cores at work.

Each iteration is a round of a few stacks, each on one base: groups of episodes of one fresh task each, and one more
episode of it in which the rule that an untrained policy is decides. The reward comes at the end: how much lower an
episode's held-out loss is than the rule's, as a share of the task's headroom. Which process trains a stack decides
nothing, so results are the same on any number of cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from ...allocation.policy import Policy
from ...common.arrays import Arrays, FloatArray
from ...common.workers import isolated
from ...env.episodes.rollout import rollout
from ...env.spaces import observation_space, score_space
from ...env.tasks.proxy_finetune import CACHED_TASKS
from ...env.tasks.proxy_task import ProxyTask
from ...errors import ConfigError, WorkerError
from .rewards import rewards_of
from .stack_worker import StackState, _serve, _Worker
from .task_sampling import RolloutConfig

Note = Callable[[Arrays, Sequence[FloatArray | None]], None]


class ProxyVecEnv(VecEnv):
    """Rounds of fresh tasks for PPO: every episode has the same number of decisions, and all end together.

    Args:
        config: what is trained on.
        rule: decides in the episode that others are measured against.
        max_modules: padding of observations and actions.

    Attributes:
        round: number of the round under way.

    Raises:
        ConfigError: tasks of several lengths.
        WorkerError: a worker's process ended; what it raises is raised here as it is.
    """

    def __init__(self, config: RolloutConfig, rule: Policy, max_modules: int) -> None:
        self.config = config
        steps = {task.steps for templates in config.templates for task in templates}
        if len(steps) != 1:
            raise ConfigError(f"All tasks of a round have the same number of steps; got {sorted(steps)}.")
        self.decisions = len(config.schedule.steps(steps.pop()))
        self.max_modules = max_modules
        self.render_mode = None
        episodes = config.stacks * config.tasks_per_stack * config.episodes_per_task
        super().__init__(episodes, observation_space(max_modules), score_space(max_modules))
        self.round = 0
        slots = config.tasks_per_stack * (config.episodes_per_task + 1)
        self._worker_options = (rule, config.schedule, slots, max_modules, config.device)
        self._local: _Worker | None = None
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._actions: NDArray[Any] | None = None

    def _calls(self, calls: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, StackState]:
        """Have the workers answer calls, by stack."""
        if self.config.worker_count == 1:
            self._local = self._local or _Worker(*self._worker_options)
            with isolated():
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
        begin: dict[int, tuple[str, tuple[Any, ...]]] = {
            stack: ("begin", ([task for task in tasks for _ in range(config.episodes_per_task)], tasks, False))
            for stack, tasks in enumerate(self._tasks)
        }
        return self._joined(self._calls(begin))

    def _joined(self, states: dict[int, StackState]) -> Arrays:
        ordered = [states[stack].arrays for stack in range(len(states))]
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
        """Run tasks to their end, in stacks of their own: the round under way waits.

        Args:
            tasks: any, of the templates' length; those on one base run side by side.
            act: actions (episodes, action size) for observations.
            note: called with the observations and the worth of modules, after each decision of each stack.
            on_progress: called with the tasks that are done and all of them, at first and now and then.

        Returns:
            Held-out losses in nats, NaN for failed runs.
        """
        size = min(self.config.tasks_per_stack * (self.config.episodes_per_task + 1), CACHED_TASKS)
        by_base: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            by_base.setdefault(task.base, []).append(index)
        chunks = [on_base[i : i + size] for on_base in by_base.values() for i in range(0, len(on_base), size)]
        losses = [math.nan] * len(tasks)
        report = on_progress or (lambda done, total: None)
        report(0, len(tasks))
        for start in range(0, len(chunks), self.config.stacks):
            side_by_side = dict(enumerate(chunks[start : start + self.config.stacks], start=self.config.stacks))
            stacks = {stack: [tasks[index] for index in chunk] for stack, chunk in side_by_side.items()}
            running = _WholeTasks(self, stacks, with_worth=note is not None)
            rollout(running, lambda seen: {stack: act(arrays) for stack, arrays in seen.items()}, running.noting(note))
            for stack, chunk in side_by_side.items():
                for index, loss in zip(chunk, running.losses(stack), strict=True):
                    losses[index] = loss
            report(sum(map(len, chunks[: start + len(side_by_side)])), len(tasks))
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
        raise ConfigError("Rounds share their settings: make a new ProxyVecEnv.")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Refused: episodes have no methods of their own."""
        raise AttributeError(f"Rounds have no method {method_name!r} of their own.")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Never."""
        return [False] * len(list(self._get_indices(indices)))


class _WholeTasks:
    """Stacks of whole tasks that run side by side; see `Running`.

    Args:
        envs: whose workers train them.
        stacks: tasks on one base, by number of the stack.
        with_worth: ask what modules are worth on planted tasks.
    """

    def __init__(self, envs: ProxyVecEnv, stacks: dict[int, list[ProxyTask]], *, with_worth: bool) -> None:
        self._envs, self._taken = envs, 0
        self._states = envs._calls({stack: ("begin", (tasks, [], with_worth)) for stack, tasks in stacks.items()})
        self._worth = {stack: state.utilities for stack, state in self._states.items()}

    @property
    def ended(self) -> bool:
        """Whether all decisions have been taken."""
        return self._taken == self._envs.decisions

    @property
    def seen(self) -> dict[int, Arrays]:
        """Observations by stack."""
        return {stack: state.arrays for stack, state in self._states.items()}

    def step(self, chosen: dict[int, NDArray[Any]]) -> None:
        """Take decisions, (episodes, action size) by stack."""
        self._states = self._envs._calls({stack: ("step", (actions,)) for stack, actions in chosen.items()})
        self._taken += 1

    def noting(self, note: Note | None) -> Callable[[dict[int, Arrays], object], None] | None:
        """What `rollout` calls to note observations together with what modules are worth."""
        if note is None:
            return None

        def note_stacks(seen: dict[int, Arrays], _: object) -> None:
            for stack, arrays in seen.items():
                note(arrays, self._worth[stack])

        return note_stacks

    def losses(self, stack: int) -> tuple[float, ...]:
        """Held-out losses of a stack at the end, in nats; NaN for failed runs."""
        return self._states[stack].losses
