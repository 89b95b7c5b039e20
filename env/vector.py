"""The vector environment of Gymnasium: many episodes at once on one frozen base."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ..allocation.policy import Decision
from ..errors import ConfigError
from .episodes.slots import StackedConfig, StackedRankAllocation
from .rendering import describe, draw
from .spaces import delta_space, observation_space, read_deltas


class StackedVectorEnv(VectorEnv[dict[str, Any], NDArray[np.int64], NDArray[Any]]):
    """`RankAllocationEnv`, stacked: the same spaces, rewards and infos, all episodes trained together.

    `gym.make_vec("rankpilot/RankAllocation-v3", num_envs=8, vectorization_mode="vector_entry_point", base=...)`. An
    episode that ends is reset in the same step: its last observation and info are in `final_obs` and `final_info`.

    Args:
        num_envs: episodes at a time.
        render_mode: "rgb_array" or "ansi"; `render` then returns one picture or text for each episode.
        settings: fields of `StackedConfig`.
    """

    metadata = {  # noqa: RUF012  (declared so by Gymnasium)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, num_envs: int = 1, render_mode: str | None = None, **settings: Any) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.core = StackedRankAllocation(StackedConfig(num_envs, **settings))
        self.single_observation_space = observation_space(self.core.max_modules)
        self.single_action_space = delta_space(self.core.max_modules)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode in every slot."""
        slots = range(self.num_envs)
        if seed is not None:
            self.core.seed(seed)  # type: ignore[arg-type]
        infos = self.core.reset(slots, options)
        return self.core.padded(slots), self._gathered(infos)

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take one decision in every slot and train until the next one or the end."""
        core = self.core
        if len(core.records) < self.num_envs:
            raise ConfigError("No episode is under way: call reset() first.")
        if len(actions) != self.num_envs:
            raise ConfigError(f"One action for each of {self.num_envs} environments is needed; got {len(actions)}.")
        problems = [core.records[slot].observation.problem for slot in range(self.num_envs)]
        wanted = [
            read_deltas(*each) for each in zip(actions, [core.max_modules] * self.num_envs, problems, strict=True)
        ]
        steps = core.step({slot: Decision(ranks, np.zeros(len(ranks))) for slot, ranks in enumerate(wanted)})
        rewards = np.array([step.reward for step in steps.values()])
        terminated = np.array([step.terminated for step in steps.values()])
        infos = {slot: step.info for slot, step in steps.items()}
        ended = np.flatnonzero(terminated).tolist()
        if ended:
            last = {slot: steps[slot].observation.padded(core.max_modules) for slot in ended}
            fresh = core.reset(ended)
            for slot in ended:
                infos[slot] = {**fresh[slot], "final_obs": last[slot], "final_info": infos[slot]}
        observations = core.padded(range(self.num_envs))
        return observations, rewards, terminated, np.zeros_like(terminated), self._gathered(infos)

    def _gathered(self, infos: dict[int, dict[str, Any]]) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        for slot, info in infos.items():
            gathered = self._add_info(gathered, info, slot)
        return gathered

    def render(self) -> tuple[Any, ...] | None:
        """One picture or text for each episode so far."""
        if self.render_mode is None or not self.core.records:
            return None
        paint = draw if self.render_mode == "rgb_array" else describe
        return tuple(paint(self.core.records[slot].trace) for slot in range(self.num_envs))
