"""The stacked episodes as a vector environment of Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from ...allocation.actions import decode
from ...common.arrays import FloatArray, IntArray
from ...env.episodes.slots import StackedConfig, StackedRankAllocation
from ...env.spaces import delta_space, observation_space, read_deltas, read_scores, score_space
from ...errors import ConfigError


class StackedVecEnv(VecEnv):
    """Many episodes at once on one frozen base, for PPO.

    As SB3 wants it, an episode that ends is reset in the same step, and its last observation is in
    `infos[i]["terminal_observation"]`.

    Args:
        config: what is stacked.
        scores: take scores (see `ScoreActions`) in place of rank deltas.
        render_mode: None; pictures come from Gymnasium's environments.
    """

    def __init__(self, config: StackedConfig, *, scores: bool = True) -> None:
        self.core = StackedRankAllocation(config)
        self.scores = scores
        self.render_mode = None
        modules = self.core.max_modules
        action_space: spaces.Space[Any] = score_space(modules) if scores else delta_space(modules)
        super().__init__(config.num_envs, observation_space(modules), action_space)
        self._actions: NDArray[Any] | None = None

    def reset(self) -> VecEnvObs:
        """Start an episode in every slot; a seed given before draws the tasks anew."""
        if self._seeds[0] is not None or any(self._options):
            seeds = None if self._seeds[0] is None else [int(seed or 0) for seed in self._seeds]
            self.core.seed(seeds, int(self._options[0].get("skip_tasks", 0)))
        options = {key: value for key, value in self._options[0].items() if key != "skip_tasks"}
        infos = self.core.reset(range(self.num_envs), options)
        self.reset_infos = [infos[slot] for slot in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return self.core.padded(range(self.num_envs))

    def step_async(self, actions: NDArray[Any]) -> None:
        """Note the actions, (num_envs, action size)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Take one decision in every slot and train until the next one or the end."""
        if self._actions is None or len(self.core.sessions) < self.num_envs:
            raise ConfigError("No episode is under way: call reset() first.")
        if len(self._actions) != self.num_envs:
            raise ConfigError(
                f"One action for each of {self.num_envs} environments is needed; got {len(self._actions)}."
            )
        steps = self.core.step({slot: self._decision(slot, action) for slot, action in enumerate(self._actions)})
        infos = [{**steps[slot].info, "TimeLimit.truncated": False} for slot in range(self.num_envs)]
        ended = [slot for slot, step in steps.items() if step.terminated]
        for slot in ended:
            infos[slot]["terminal_observation"] = steps[slot].observation.padded(self.core.max_modules)
        if ended:
            for slot, info in self.core.reset(ended).items():
                self.reset_infos[slot] = info
        rewards = np.array([steps[slot].reward for slot in range(self.num_envs)], dtype=np.float32)
        dones = np.array([steps[slot].terminated for slot in range(self.num_envs)])
        return self.core.padded(range(self.num_envs)), rewards, dones, infos

    def _decision(self, slot: int, action: NDArray[Any]) -> tuple[IntArray, FloatArray]:
        observation = self.core.sessions[slot].observation
        count = len(observation.modules)
        if not self.scores:
            return read_deltas(action, self.core.max_modules, observation.problem), np.zeros(count)
        scores, placement = read_scores(action, self.core.max_modules, count)
        return decode(observation.problem, scores, placement)[0], scores

    def close(self) -> None:
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of this environment, once for each slot; AttributeError for unknown names."""
        return [getattr(self, attr_name)] * len(self._slots(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: slots have no attributes of their own."""
        raise ConfigError("Stacked episodes share their settings: make a new StackedVecEnv.")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: slots have no methods of their own."""
        raise AttributeError(f"Stacked episodes have no method {method_name!r} of their own.")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Never."""
        return [False] * len(self._slots(indices))

    def _slots(self, indices: VecEnvIndices) -> Sequence[int]:
        return list(self._get_indices(indices))
