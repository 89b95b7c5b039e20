"""The vector environment of Gymnasium: many episodes at once on one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ..errors import ConfigError, UnknownNameError
from .episodes.slots import StackedConfig, StackedRankAllocation
from .rank_allocation import environment_tasks
from .rendering import describe, draw
from .spaces import action_space, observation_space
from .tasks.proxy_task import ProxyTask
from .tasks.stream import TaskStream
from .tasks.suite_names import SUITES


class StackedVectorEnv(VectorEnv[dict[str, Any], NDArray[Any], NDArray[Any]]):
    """`RankAllocationEnv`, stacked: the same spaces, rewards and infos, all episodes trained together.

    `gym.make_vec("rankpilot/RankAllocation-v4", num_envs=8, vectorization_mode="vector_entry_point", base=...)`. An
    episode that ends is reset in the same step: its last observation and info are in `final_obs` and `final_info`.

    With `episodes_per_task` above 1, neighbouring episodes share task, seed and batches, so that their returns can be
    compared with each other. They begin and end together: one whose training fails waits for the others, and gets its
    reward then.

    Args:
        num_envs: episodes at a time.
        render_mode: "rgb_array" or "ansi"; `render` then returns one picture or text for each episode.
        task: a fixed task; None draws one for each group.
        suites: names of the suites to draw from; this, `split` and `task_overrides` not with `task`.
        split: of the suites.
        task_overrides: fields of `ProxyTask` that each drawn task gets.
        fresh_seeds: see `RankAllocationEnv`.
        settings: fields of `StackedConfig`.

    Raises:
        ConfigError: an argument out of range, an action of the wrong shape or range, or a step before `reset`.
        UnknownNameError: a name that is not among the allowed ones.
    """

    metadata = {  # noqa: RUF012  (declared so by Gymnasium)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        *,
        task: ProxyTask | None = None,
        suites: tuple[str, ...] = SUITES,
        split: str = "train",
        task_overrides: dict[str, Any] | None = None,
        fresh_seeds: bool = False,
        **settings: Any,
    ) -> None:
        known = [field.name for field in fields(StackedConfig)]
        for name in settings:
            if name not in known:
                raise UnknownNameError.of("argument of stacked environments", name, known[1:])
        if settings.get("schedule", ...) is None:  # as one environment has it by default
            del settings["schedule"]
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnknownNameError.of("render mode", str(render_mode), self.metadata["render_modes"])
        config = StackedConfig(num_envs, **settings)
        if task and not isinstance(task, ProxyTask):
            raise ConfigError(f"Stacked episodes train proxies; make an environment of {type(task).__name__} alone.")
        if task and task.base != config.base:
            raise ConfigError(f"The task is on base {task.base}, not {config.base}. Give base={task.base!r}.")
        bases = None if task else (config.base,)
        self.tasks = environment_tasks(
            task, suites, split, bases, task_overrides, fresh_seeds=fresh_seeds, against=config.against
        )
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.core: StackedRankAllocation = StackedRankAllocation(config)
        self.single_observation_space = observation_space(self.core.max_modules)
        self.single_action_space = action_space(config.actions, self.core.max_modules)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._fresh_seeds = fresh_seeds
        self._streams: list[TaskStream] = []
        self._seed_tasks(None)

    def _seed_tasks(self, seed: Any) -> None:
        """Begin the tasks anew: a group draws what an environment with the seed of its first slot would."""
        if seed is None:
            seed = int(np.random.default_rng().integers(2**31))
        if isinstance(seed, np.ndarray):
            seed = seed.tolist()
        if isinstance(seed, str) or not isinstance(seed, (int, np.integer, Sequence)):
            raise ConfigError(f"A seed is a whole number, or one for each environment; got {seed!r}.")
        seeds = list(seed) if isinstance(seed, Sequence) else [int(seed) + slot for slot in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ConfigError(f"One seed for each of {self.num_envs} environments is needed; got {len(seeds)}.")
        self._streams = [
            TaskStream(self.tasks, seeding.np_random(each)[0], fresh_seeds=self._fresh_seeds)
            for each in seeds[:: self.core.config.episodes_per_task]
        ]

    def _start(self, slots: Sequence[int], options: dict[str, Any] | None = None) -> dict[int, dict[str, Any]]:
        """Start an episode in each of these slots, which are whole groups; returns their infos."""
        size = self.core.config.episodes_per_task
        drawn = {group: self._streams[group].take(options) for group in dict.fromkeys(slot // size for slot in slots)}
        return self.core.start({slot: drawn[slot // size] for slot in slots})  # type: ignore[misc]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode in every slot; for the options see `RankAllocationEnv`."""
        if seed is not None:
            self._seed_tasks(seed)
        slots = range(self.num_envs)
        self.core.records.clear()  # so that no episode is under way if the start of one fails
        infos = self._start(slots, options)
        return self.core.padded(slots), self._gathered(infos)

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take one decision in every slot and train until the next one or the end."""
        core = self.core
        if len(core.records) < self.num_envs:
            raise ConfigError("No episode is under way: call reset() first.")
        count = next(iter(np.shape(actions)), 0) if isinstance(actions, np.ndarray | Sequence) else 0
        if count != self.num_envs:
            raise ConfigError(f"One action for each of {self.num_envs} environments is needed; got {count}.")
        steps = core.step(dict(enumerate(actions)))
        rewards = np.array([step.reward for step in steps.values()])
        terminated = np.array([step.terminated for step in steps.values()])
        infos = {slot: step.info for slot, step in steps.items()}
        ended = np.flatnonzero(terminated).tolist()
        if ended:
            last = {slot: steps[slot].observation.padded(core.max_modules) for slot in ended}
            for slot in ended:  # so that none of them seems under way if the start of the next one fails
                del core.records[slot]
            for slot, info in self._start(ended).items():
                infos[slot] = {**info, "final_obs": last[slot], "final_info": infos[slot]}
        observations = core.padded(range(self.num_envs))
        return observations, rewards, terminated, np.zeros_like(terminated), self._gathered(infos)

    def _gathered(self, infos: dict[int, dict[str, Any]]) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        for slot, info in infos.items():
            gathered = self._add_info(gathered, info, slot)
        return gathered

    def render(self) -> tuple[Any, ...] | None:
        """One picture or text for each episode so far."""
        if self.render_mode is None or len(self.core.records) < self.num_envs:
            return None
        paint = draw if self.render_mode == "rgb_array" else describe
        return tuple(paint(self.core.records[slot].trace) for slot in range(self.num_envs))
