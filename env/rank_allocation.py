"""The Gymnasium environment `rankpilot/RankAllocation-v1`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ..errors import ConfigError, NonFiniteError
from ..lora.cost import FloatArray
from ..lora.ladder import DEFAULT_RANKS, RankLadder
from .episode import Episode, baseline
from .observation import MODULE_FEATURES, RUN_FEATURES, Observation
from .schedule import DecisionSchedule
from .tasks import ProxyTask, adapted_base, sample_task

REWARD_BOUND = 1.0
"""Rewards lie between minus and plus this; a run whose loss is not finite gets the lower end."""


class RankAllocationEnv(gym.Env[dict[str, Any], NDArray[np.int64]], gym.utils.EzPickle):
    """Decide the LoRA rank of every target module of a short fine-tune, a few times, inside a budget of bytes.

    ## Description
    An episode is one fine-tune of a small pretrained transformer (a `ProxyTask`) with real LoRA adapters. A probe with
    all modules at rank 1 reads the first signals; then ranks are decided before the first step and at the schedule's
    later points, and training goes on in between. Adapters really change size and the optimiser's state is kept.

    ## Action Space
    `MultiDiscrete([2 * top + 1] * max_modules)`, `top` the highest rung of the rank ladder: entry m minus `top` is the
    number of rungs by which module m should move. The wish is clipped to the schedule's `max_step` and projected onto
    the budget: never above it, and with none of it left where another rung would fit. Entries past the last module are
    ignored.

    ## Observation Space
    A `Dict`:

    | key | space | meaning |
    |---|---|---|
    | module_features | Box(-3, 3, (max_modules * 12,), float32) | `observation.MODULE_FEATURES`, module after module |
    | run_features | Box(-3, 3, (8,), float32) | see `observation.RUN_FEATURES` |
    | mask | MultiBinary(max_modules) | 1 for modules that exist, 0 for padding |

    ## Rewards
    0 until the end, then how much lower the held-out loss is than the uniform run's (same seed, batches and budget), as
    a share of what the uniform run gained over the untrained base, clipped to -1 to 1.

    ## Starting State
    A task drawn from the training distribution (`sample_task`), or the one given; adapters fresh.

    ## Episode End
    Terminates after the last interval of training, or at a loss that is not finite (reward -1). Never truncates.

    ## Information
    The same keys at each step: `task` (id), `step`, `loss` (mean training loss of the interval; None at reset and where
    it is not finite), `held_out_loss` and `uniform_loss` (None before the end), `cost`, `limit` (bytes), `ranks`
    (tuple), `non_finite`.

    ## Arguments
    * `task`: a fixed `ProxyTask`; None draws one at each reset.
    * `corpora`: texts of the shift tasks that are drawn.
    * `episodes_per_task`: how many episodes in a row share a drawn task, seed and batches, so that their returns can
      be compared with each other.
    * `schedule`: a `DecisionSchedule`.
    * `max_modules`: padding; None for as many as the base has.
    * `task_overrides`: fields of `ProxyTask` that every drawn task gets, such as `{"steps": 60}`.

    Options of `reset`: `task` overrides the task of one episode; `skip_tasks` draws and discards that many tasks first,
    which is how an interrupted training goes on.

    ## Version History
    * v1: the budget is the peak of the whole step, not only what is saved for backward; the last decision may spend
      the bytes of signal buffers; at later decisions a module's own rungs count as cheaper, against churn.
    * v0: first version.

    Raises:
        ConfigError: an argument out of range, or an action of the wrong shape or range.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  (declared so by Gymnasium)

    def __init__(
        self,
        task: ProxyTask | None = None,
        corpora: tuple[str, ...] = ("code",),
        episodes_per_task: int = 1,
        schedule: DecisionSchedule | None = None,
        max_modules: int | None = None,
        task_overrides: dict[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        gym.utils.EzPickle.__init__(
            self, task, corpora, episodes_per_task, schedule, max_modules, task_overrides, render_mode
        )
        modules = len(adapted_base(task.base if task else ProxyTask.base)[1])
        self.max_modules = max_modules or modules
        if self.max_modules < modules or episodes_per_task < 1:
            raise ConfigError(
                f"max_modules is at least {modules} and episodes_per_task at least 1; got {max_modules} and "
                f"{episodes_per_task}."
            )
        self.task = task
        self.corpora = corpora
        self.episodes_per_task = episodes_per_task
        self.schedule = schedule or DecisionSchedule()
        self.task_overrides = dict(task_overrides or {})
        self.render_mode = render_mode
        self.ladder = RankLadder(DEFAULT_RANKS)
        self.observation_space = spaces.Dict(
            {
                "module_features": spaces.Box(-3, 3, (self.max_modules * len(MODULE_FEATURES),), np.float32),
                "run_features": spaces.Box(-3, 3, (len(RUN_FEATURES),), np.float32),
                "mask": spaces.MultiBinary(self.max_modules),
            }
        )
        self.action_space = spaces.MultiDiscrete(np.full(self.max_modules, 2 * self.ladder.top + 1))
        self.observation: Observation | None = None
        """The latest observation with the plans that it allows; wrappers decode their actions against it."""
        self._episode: Episode | None = None
        self._drawn: ProxyTask | None = None
        self._episodes_of_drawn = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; a new seed also draws a new task."""
        super().reset(seed=seed)
        if seed is not None:
            self._drawn = None
        options = options or {}
        for _ in range(int(options.get("skip_tasks", 0))):
            sample_task(self.np_random, self.corpora)
        task = options.get("task", self.task) or self._draw()
        baseline(task, self.schedule)  # before the episode: both train the same adapters
        self._episode = Episode(task, self.schedule)
        self.observation = self._episode.observe()
        return self._arrays(), self._info(None)

    def _draw(self) -> ProxyTask:
        if self._drawn is None or self._episodes_of_drawn >= self.episodes_per_task:
            self._drawn = replace(sample_task(self.np_random, self.corpora), **self.task_overrides)
            self._episodes_of_drawn = 0
        self._episodes_of_drawn += 1
        return self._drawn

    def step(self, action: NDArray[np.int64]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one decision and train until the next one or the end."""
        action = np.asarray(action)
        if action.shape != (self.max_modules,) or not self.action_space.contains(action.astype(np.int64)):
            raise ConfigError(
                f"An action holds {self.max_modules} whole numbers from 0 to {2 * self.ladder.top}; got "
                f"{action.tolist()}."
            )
        count = len(self._running().targets)
        return self.decide(action[:count].astype(np.int64) - self.ladder.top, np.zeros(count))

    def decide(
        self, deltas: NDArray[np.int64], scores: FloatArray
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As `step`, with deltas in rungs and scores that order the projection; both of shape (modules,)."""
        episode = self._running()
        episode.apply(deltas, scores)
        try:
            loss = episode.advance()
        except NonFiniteError:
            info = self._info(None, non_finite=True)
            self._episode = None
            return self._arrays(), -REWARD_BOUND, True, False, info
        terminated = episode.step == episode.task.steps
        held_out = episode.held_out_loss() if terminated else None
        reward = 0.0
        if held_out is not None:
            gain = baseline(episode.task, self.schedule).improvement(held_out)
            reward = float(np.clip(gain, -REWARD_BOUND, REWARD_BOUND))
        else:
            self.observation = episode.observe(loss)
        info = self._info(loss, held_out=held_out)
        if terminated:
            self._episode = None
        return self._arrays(), reward, terminated, False, info

    def _running(self) -> Episode:
        if self._episode is None:
            raise ConfigError("No episode is under way: call reset() first.")
        return self._episode

    def _arrays(self) -> dict[str, Any]:
        assert self.observation is not None
        return self.observation.padded(self.max_modules)

    def _info(self, loss: float | None, *, held_out: float | None = None, non_finite: bool = False) -> dict[str, Any]:
        episode = self._running()
        problem = episode.controller.problem()
        return {
            "task": episode.task.id,
            "step": episode.step,
            "loss": loss,
            "held_out_loss": held_out,
            "uniform_loss": None if held_out is None else baseline(episode.task, self.schedule).uniform_loss,
            "cost": problem.price(problem.ranks),
            "limit": problem.limit,
            "ranks": tuple(problem.ranks.tolist()),
            "non_finite": non_finite,
        }

    def render(self) -> str | None:
        """The ranks of each layer as a line of text, if `render_mode` is "ansi"."""
        if self.render_mode != "ansi" or self._episode is None:
            return None
        problem = self._episode.controller.problem()
        rows = [
            f"layer {block:3d}  " + " ".join(f"{rank:3d}" for rank in problem.ranks[problem.blocks == block])
            for block in np.unique(problem.blocks)[::-1]
        ]
        return "\n".join([f"step {self._episode.step} of {self._episode.task.steps}", *rows])
