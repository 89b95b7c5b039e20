"""Vector environments for Stable-Baselines3: what they have in common, and one around a vector of Gymnasium."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from ...errors import ConfigError


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
