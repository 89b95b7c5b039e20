"""What Stable-Baselines3 gets: vector environments, the network as its policy, and advantages relative to a group.

PPO's environment is the registered one on fresh tasks, with all cores at work. Each iteration is a round of a few
stacks, each on one base: groups of episodes of one fresh task each, and beside each group a run of the rule that an
untrained policy is. What episodes see, how actions are read and what the reward is are those of the registered
environment, because each stack is its vector form; which tasks come, and in which process a stack is trained, is
decided here. Processes decide nothing, so results are the same on any number of cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..agents.networks import CorrelatedGaussian, RankNetwork
from ..common.arrays import Arrays, FloatArray
from ..common.workers import Call, make_workers
from ..decide.observation import MODULE_FEATURES
from ..decide.settings import NetworkConfig
from ..env.episode import UNIFORM
from ..env.proxy_finetune import CACHED_TASKS, utilities
from ..env.proxy_task import ProxyTask
from ..env.rank_allocation import action_space, observation_space
from ..env.vector import StackedConfig, StackedVectorEnv
from ..errors import ConfigError, naming_extras
from .task_sampling import FreshTasks

with naming_extras():
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from stable_baselines3.common.buffers import DictRolloutBuffer
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn


class RankPolicy(ActorCriticPolicy):
    """`RankNetwork` for PPO: observation Dict(module_features, run_features, mask), action Box(modules + 2).

    Args:
        network: size and start of the network.
    """

    network: RankNetwork

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        network: NetworkConfig | None = None,
        **options: Any,
    ) -> None:
        self.network_config: NetworkConfig = network or NetworkConfig()
        super().__init__(observation_space, action_space, lr_schedule, ortho_init=False, **options)

    def _build(self, lr_schedule: Schedule) -> None:
        self.network = RankNetwork(self.network_config)
        self.optimizer = self.optimizer_class(self.network.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _evaluate(self, obs: PyTorchObs) -> tuple[CorrelatedGaussian, torch.Tensor]:
        """The action's distribution, and what each critic expects, (batch, critics)."""
        assert isinstance(obs, dict)
        mask = obs["mask"].float()
        modules = obs["module_features"].float().reshape(len(mask), mask.shape[1], len(MODULE_FEATURES))
        action = self.network(modules, obs["run_features"].float(), mask)
        return CorrelatedGaussian(action, mask), action.values

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions (batch, action size), values (batch, 1) and log-probabilities (batch,)."""
        distribution, values = self._evaluate(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values.mean(dim=1, keepdim=True), distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values, log-probabilities and entropies of given actions.

        Each value is that of a critic drawn by lot, so that critics learn from different runs and disagree where they
        have seen little.
        """
        distribution, values = self._evaluate(obs)
        chosen = torch.randint(values.shape[1], (len(values), 1), device=values.device)
        return values.gather(1, chosen), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> CorrelatedGaussian:  # type: ignore[override]
        """The action distribution."""
        return self._evaluate(obs)[0]

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Values, (batch, 1)."""
        return self._evaluate(obs)[1].mean(dim=1, keepdim=True)


LEAST_SPREAD = 0.25
"""Added to the standard deviation of a group's returns: where all episodes end alike, what is left is noise."""


class GroupRolloutBuffer(DictRolloutBuffer):
    """Advantages relative to a group, as in GRPO (Shao et al., 2024, arXiv 2402.03300) and RLOO.

    Neighbouring episodes share task, seed and batches, so the mean return of the group is a far better baseline than a
    critic: what is left is the effect of the actions.

    Args:
        group: episodes of a group; the number of environments is a multiple of it.
    """

    def __init__(self, *arguments: Any, group: int, **options: Any) -> None:
        self.group = group
        super().__init__(*arguments, **options)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """Undiscounted returns, less the group's mean return from the same decision on, over the group's spread."""
        super().compute_returns_and_advantage(last_values, dones)
        groups = self.returns.reshape(len(self.returns), -1, self.group)
        centred = groups - groups.mean(axis=2, keepdims=True)
        relative = centred / (groups.std(axis=2, keepdims=True) + LEAST_SPREAD)
        self.advantages = relative.reshape(self.returns.shape).astype(np.float32)


class SharedVecEnv(VecEnv):
    """Episodes that are trained together, so that none has attributes or methods of its own."""

    render_mode = None

    def step_async(self, actions: NDArray[Any]) -> None:
        """Note the actions, (num_envs, action size)."""
        self._actions = actions

    def close(self) -> None:
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of this environment, once for each episode; AttributeError for unknown names."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: episodes have no attributes of their own."""
        raise ConfigError(f"Episodes share their settings: make a new {type(self).__name__}.")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Refused: episodes have no methods of their own."""
        raise AttributeError(f"Episodes have no method {method_name!r} of their own.")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Never."""
        return [False] * len(list(self._get_indices(indices)))


class GymnasiumVecEnv(SharedVecEnv):
    """A vector environment of Gymnasium, for Stable-Baselines3.

    An episode that ends is reset in the same step, and its last observation is in `infos[i]["terminal_observation"]`.

    Args:
        envs: resets episodes in the step in which they end, as `gym.make_vec(rankpilot.ENV_ID,
            vectorization_mode="vector_entry_point", ...)` does.

    Raises:
        ConfigError: it resets them otherwise.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ConfigError(f"Stable-Baselines3 needs vectors that reset episodes in the same step; this has {mode}.")
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.envs = envs

    def close(self) -> None:
        """Close the vector."""
        self.envs.close()

    def reset(self) -> VecEnvObs:
        """Start an episode everywhere; a seed given before draws the tasks anew."""
        seeds: Any = None if self._seeds[0] is None else [int(seed or 0) for seed in self._seeds]
        observations, infos = self.envs.reset(seed=seeds, options=self._options[0] or None)
        self.reset_infos = [_of_slot(infos, slot) for slot in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations  # type: ignore[no-any-return]

    def step_wait(self) -> VecEnvStepReturn:
        """Take the noted actions."""
        observations, rewards, terminated, truncated, gathered = self.envs.step(self._actions)
        infos = []
        for slot in range(self.num_envs):
            info = _of_slot(gathered, slot)
            if terminated[slot] or truncated[slot]:
                last, final = info.pop("final_obs"), info.pop("final_info")
                self.reset_infos[slot] = info
                info = {**final, "terminal_observation": last}
            infos.append({**info, "TimeLimit.truncated": bool(truncated[slot] and not terminated[slot])})
        return observations, rewards.astype(np.float32), terminated | truncated, infos


def _of_slot(gathered: dict[str, Any], slot: int) -> dict[str, Any]:
    """One episode's info out of those that Gymnasium has gathered."""
    info = {}
    for key, values in gathered.items():
        if not key.startswith("_") and gathered[f"_{key}"][slot]:
            info[key] = _of_slot(values, slot) if isinstance(values, dict) else values[slot]
    return info


Note = Callable[[Arrays, Sequence[FloatArray | None]], None]


@dataclass(frozen=True, eq=False)
class StackStep:
    """What a stack has come to after a decision.

    Attributes:
        arrays: the observations, one row an episode.
        rewards: of the episodes that have ended with this decision, 0 for others, float64 (episodes,).
        infos: of each episode; see `RankAllocationEnv`.
    """

    arrays: Arrays
    rewards: NDArray[np.float64]
    infos: tuple[dict[str, Any], ...]


class EnvironmentStack:
    """The vector environment on given tasks, as a worker keeps it; episodes that have ended wait for all others.

    Args:
        config: of the vector; its base is that of the tasks.
    """

    def __init__(self, config: StackedConfig) -> None:
        self._config = config
        self._vectors: dict[str, StackedVectorEnv] = {}
        self._infos: dict[int, dict[str, Any]] = {}
        self._active: list[int] = []

    def begin(self, tasks: Sequence[ProxyTask]) -> Arrays:
        """Start the episodes of tasks on one base, one a group; returns what they see."""
        base, size = tasks[0].base, self._config.episodes_per_task
        if base not in self._vectors:
            self._vectors[base] = StackedVectorEnv(task=tasks[0], **vars(self._config) | {"base": base})
        self._vector = self._vectors[base]
        self._vector.records.clear()
        self._infos = self._vector.begin({slot: tasks[slot // size] for slot in range(len(tasks) * size)})
        self._active = list(self._infos)
        return self._vector.padded()

    def worth(self, tasks: Sequence[ProxyTask]) -> list[FloatArray | None]:
        """What each module is worth at most, in nats, (modules,) by task; None where it is not known.

        Args:
            tasks: as they have begun, in groups of one.
        """
        problems = [self._vector.records[slot].observation.problem for slot in range(len(tasks))]
        pairs = zip(tasks, problems, strict=True)
        return [utilities(task, problem)[:, -1] if task.kind == "planted" else None for task, problem in pairs]

    def step(self, actions: NDArray[Any]) -> StackStep:
        """Take decisions, (episodes, action size)."""
        transitions = self._vector.advance({slot: actions[slot] for slot in self._active})
        self._active = [slot for slot, each in transitions.items() if not each.terminated]
        self._infos |= {slot: each.info for slot, each in transitions.items()}
        rewards = [transitions[slot].reward if slot in transitions else 0.0 for slot in self._infos]
        return StackStep(self._vector.padded(), np.array(rewards), tuple(self._infos.values()))


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
        whole_tasks = replace(config, num_envs=config.rows, episodes_per_task=1, against=UNIFORM)
        for stack in range(stacks):
            self.workers.keep(stack, partial(EnvironmentStack, config))
            self.workers.keep(stacks + stack, partial(EnvironmentStack, whole_tasks))

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
            tasks: any with a reference, of the templates' length; those on one base run side by side.
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
            infos = self._play({stack: [tasks[i] for i in chunk] for stack, chunk in side_by_side.items()}, act, note)
            for stack, chunk in side_by_side.items():
                for index, info in zip(chunk, infos[stack], strict=True):
                    losses[index] = math.nan if info["held_out_loss"] is None else info["held_out_loss"]
            report(sum(map(len, chunks[: start + len(side_by_side)])), len(tasks))
        return losses

    def _play(
        self, stacks: dict[int, list[ProxyTask]], act: Callable[[Arrays], NDArray[Any]], note: Note | None
    ) -> dict[int, tuple[dict[str, Any], ...]]:
        """Run whole tasks, by number of their stack, side by side; returns the last infos of each."""
        names = {stack: ", ".join(task.id for task in tasks) for stack, tasks in stacks.items()}

        def call(method: Callable[..., Any], arguments: dict[int, Any], *, anew: bool = False) -> dict[int, Any]:
            calls = {stack: Call(method, (each,), names[stack], anew=anew) for stack, each in arguments.items()}
            return self.workers.call(calls)

        seen = call(EnvironmentStack.begin, stacks, anew=True)
        worth = call(EnvironmentStack.worth, stacks) if note else {}
        for _ in range(self.decisions):
            chosen = {stack: act(arrays) for stack, arrays in seen.items()}
            steps = call(EnvironmentStack.step, chosen)
            for stack, arrays in seen.items():
                if note:
                    note(arrays, worth[stack])
            seen = {stack: step.arrays for stack, step in steps.items()}
        return {stack: step.infos for stack, step in steps.items()}

    def close(self) -> None:
        """End the processes."""
        self.workers.close()


def _joined(arrays: dict[int, Arrays]) -> Arrays:
    """The observations of all stacks, one row an episode."""
    ordered = [arrays[stack] for stack in sorted(arrays)]
    return {key: np.concatenate([each[key] for each in ordered]) for key in ordered[0]}
