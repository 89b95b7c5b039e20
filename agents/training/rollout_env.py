"""PPO's environment for training a policy: the registered environment on fresh tasks, with all cores at work.

Each iteration is a round of a few stacks, each on one base: groups of episodes of one fresh task each, and beside each
group a run of the rule that an untrained policy is. What episodes see, how actions are read and what the reward is are
those of the registered environment, because each stack is its vector form; which tasks come, and in which process a
stack is trained, is decided here. Processes decide nothing, so results are the same on any number of cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from ...common.arrays import Arrays, FloatArray
from ...common.workers import Call, make_workers
from ...env.episodes.rollout import rollout
from ...env.episodes.slots import StackedConfig
from ...env.spaces import action_space, observation_space
from ...env.tasks.proxy_finetune import CACHED_TASKS
from ...env.tasks.proxy_task import ProxyTask
from .stack_worker import EnvironmentStack, RolloutStack
from .task_sampling import FreshTasks
from .vec_env import SharedVecEnv

Note = Callable[[Arrays, Sequence[FloatArray | None]], None]


class ProxyVecEnv(SharedVecEnv):
    """Rounds of fresh tasks for PPO: every episode has the same number of decisions, and all end together.

    Args:
        fresh: tasks of each stack.
        config: of each stack; its base is that of the tasks.
        stacks: how many there are.
        workers: processes, at least 1; no more than stacks are of use.

    Attributes:
        round: number of the round under way.

    Raises:
        ConfigError: tasks of several lengths.
        WorkerError: worker processes died again and again; what they raise is raised here as it is.
    """

    config: StackedConfig
    fresh: FreshTasks
    stacks: int
    round: int

    def __init__(self, fresh: FreshTasks, config: StackedConfig, *, stacks: int, workers: int) -> None:
        assert config.max_modules is not None
        self.fresh, self.config, self.stacks = fresh, config, stacks
        self.decisions: int = len(config.schedule.steps(fresh.steps))
        space = observation_space(config.max_modules)
        super().__init__(stacks * config.num_envs, space, action_space(config.actions, config.max_modules))
        self.round = self._taken = 0
        self._names: list[str] = []
        self.workers = make_workers(min(workers, stacks))
        for stack in range(stacks):
            self.workers.keep(stack, partial(EnvironmentStack, config))
            self.workers.keep(stacks + stack, partial(RolloutStack, config))

    # Rounds of PPO ----------------------------------------------------------------------------------------------------

    def reset(self) -> VecEnvObs:
        """Start round `round`."""
        self._taken = 0
        self._returns = np.zeros(self.num_envs)
        self._names, calls = [], {}
        for stack in range(self.stacks):
            tasks = self.fresh.draw(self.round, stack)
            self._names.append(f"stack {stack} of round {self.round} ({', '.join(task.id for task in tasks)})")
            calls[stack] = Call(EnvironmentStack.begin, (tasks,), self._names[stack], anew=True)
        return _joined(self.workers.call(calls))

    def step_wait(self) -> VecEnvStepReturn:
        """Take one decision in every episode; after the last one the next round begins."""
        parts = np.split(self._actions, self.stacks)
        calls = {stack: Call(EnvironmentStack.step, (part,), self._names[stack]) for stack, part in enumerate(parts)}
        steps = self.workers.call(calls)
        self._taken += 1
        self._returns += np.concatenate([steps[stack].rewards for stack in calls])
        seen = _joined({stack: step.arrays for stack, step in steps.items()})
        infos = [{**info, "TimeLimit.truncated": False} for stack in calls for info in steps[stack].infos]
        ended = self._taken == self.decisions
        if not ended:
            return seen, np.zeros(self.num_envs, dtype=np.float32), np.full(self.num_envs, False), infos
        rewards = self._returns.astype(np.float32)
        for slot, info in enumerate(infos):
            info["terminal_observation"] = {key: value[slot] for key, value in seen.items()}
        self.round += 1
        return self.reset(), rewards, np.full(self.num_envs, True), infos

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
        size = min(self.config.rows, CACHED_TASKS)
        by_base: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            by_base.setdefault(task.base, []).append(index)
        chunks = [on_base[i : i + size] for on_base in by_base.values() for i in range(0, len(on_base), size)]
        losses = [math.nan] * len(tasks)
        report = on_progress or (lambda done, total: None)
        report(0, len(tasks))
        for start in range(0, len(chunks), self.stacks):
            side_by_side = dict(enumerate(chunks[start : start + self.stacks], start=self.stacks))
            running = _Tasks(self, {stack: [tasks[i] for i in chunk] for stack, chunk in side_by_side.items()}, note)
            rollout(running, lambda seen: {stack: act(arrays) for stack, arrays in seen.items()}, running.note)
            for stack, chunk in side_by_side.items():
                for index, loss in zip(chunk, running.states[stack].losses, strict=True):
                    losses[index] = loss
            report(sum(map(len, chunks[: start + len(side_by_side)])), len(tasks))
        return losses

    def close(self) -> None:
        """End the processes."""
        self.workers.close()


def _joined(arrays: dict[int, Arrays]) -> Arrays:
    """The observations of all stacks, one row an episode."""
    ordered = [arrays[stack] for stack in sorted(arrays)]
    return {key: np.concatenate([each[key] for each in ordered]) for key in ordered[0]}


class _Tasks:
    """Stacks of whole tasks that run side by side; see `Running`.

    Args:
        envs: whose workers train them.
        stacks: tasks on one base, by number of the stack.
        note: see `ProxyVecEnv.play`.
    """

    def __init__(self, envs: ProxyVecEnv, stacks: dict[int, list[ProxyTask]], note: Note | None) -> None:
        self._envs, self._note, self._taken = envs, note, 0
        self._names = {stack: ", ".join(task.id for task in tasks) for stack, tasks in stacks.items()}
        calls = {
            stack: Call(RolloutStack.begin, (tasks, note is not None), self._names[stack], anew=True)
            for stack, tasks in stacks.items()
        }
        self.states = envs.workers.call(calls)
        self._worth = {stack: state.worth for stack, state in self.states.items()}

    @property
    def ended(self) -> bool:
        """Whether all decisions have been taken."""
        return self._taken == self._envs.decisions

    @property
    def seen(self) -> dict[int, Arrays]:
        """Observations by stack."""
        return {stack: state.arrays for stack, state in self.states.items()}

    def step(self, chosen: dict[int, NDArray[Any]]) -> None:
        """Take decisions, (episodes, action size) by stack."""
        calls = {stack: Call(RolloutStack.step, (each,), self._names[stack]) for stack, each in chosen.items()}
        self.states = self._envs.workers.call(calls)
        self._taken += 1

    def note(self, seen: dict[int, Arrays], _: object) -> None:
        """Note observations together with what modules are worth."""
        if self._note:
            for stack, arrays in seen.items():
                self._note(arrays, self._worth[stack])
