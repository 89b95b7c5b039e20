"""The Gymnasium environment `rankpilot/RankAllocation-v3`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ..allocation.features import MODULE_FEATURE_TABLE, RUN_FEATURE_TABLE, feature_table
from ..allocation.observation import Observation
from ..allocation.policy import Decision
from ..allocation.schedule import DecisionSchedule
from ..errors import ConfigError, NonFiniteError
from .episode_record import EpisodeRecord
from .episodes.single import Episode, reference_of
from .proxies.adapted import adapted_base
from .rendering import describe, draw
from .spaces import delta_space, observation_space, read_deltas
from .tasks.finetune import FineTune
from .tasks.proxy_finetune import fine_tune_of
from .tasks.proxy_task import ProxyTask
from .tasks.suite_names import SUITES
from .tasks.suites import find_tasks, task_stream


class RankAllocationEnv(gym.Env[dict[str, Any], NDArray[np.int64]], gym.utils.EzPickle):
    """Decide the LoRA rank of every target module of a short fine-tune, a few times, inside a budget of bytes.

    ## Description
    An episode is one fine-tune with real LoRA adapters: of a small pretrained transformer (a `ProxyTask`), or of any
    model, data set and collator of yours (an `OwnTask`). A probe with all modules at rank 1 reads the first signals;
    then ranks are decided before the first step and at the schedule's later points, and training goes on in between.
    Adapters really change size and the optimiser's state is kept.

    `gym.make_vec(..., vectorization_mode="vector_entry_point")` runs many episodes at once on one frozen base
    (`env.vector.StackedVectorEnv`); it is the same decision process, several times faster.

    ## Action Space
    `MultiDiscrete([21] * max_modules)`: entry m minus 10 is the number of rungs of the ladder 0, 1, 2, 4, 8, 12, 16,
    24, 32, 48, 64 by which module m should move. The wish is clipped to the schedule's `max_step` (the first decision
    may use the whole ladder) and projected onto the budget: never above it, and with none of it left where another
    rung would fit. Entries past the last module are ignored. `ScoreActions` takes scores instead.

    ## Observation Space
    A `Dict`:

    | key | space | meaning |
    |---|---|---|
    | module_features | Box(-3, 3, (max_modules * 14,), float32) | `observation.MODULE_FEATURES`, module after module |
    | run_features | Box(-3, 3, (8,), float32) | `observation.RUN_FEATURES` |
    | mask | MultiBinary(max_modules) | 1 for modules that exist, 0 for padding |

    Features of each module, all of them relative, none of them a name:

    {module_features}

    Features of the run:

    {run_features}

    ## Rewards
    Until the end only churn. At the end, how much lower the held-out loss is than that of the uniform run
    (same seed, batches and budget) as a share of the task's headroom: the gap between uniform and the best known
    allocation, at least 5 % of what uniform gained over the untrained base. Clipped to -3 to 3. Minus 0.002 for each
    rung that the modules move on average after the first decision. In vectors with groups, the mean of the group is
    subtracted before the clip.

    ## Starting State
    A task drawn from the suites, or the one given; adapters fresh, probe done.

    ## Episode End
    Terminates after the last interval of training, or at a loss that is not finite (reward -3, the worst). Never
    truncates; `gym.make(..., max_episode_steps=n)` does.

    ## Information
    The same keys at each step:

    | key | meaning |
    |---|---|
    | task | id of the task |
    | step | optimiser steps done |
    | loss | mean training loss of the interval in nats; None at reset and where it is not finite |
    | held_out_loss | at the end, in nats; None before it |
    | uniform_loss | held-out loss of the uniform run, in nats |
    | cost, limit | price of the plan, and the budget: bytes, or parameters |
    | ranks | rank of each module, a tuple |
    | non_finite | whether the episode ended at a loss that is not finite |
    | improvement, group_mean, churn | the parts of the reward |

    ## Rendering
    "rgb_array": ranks, losses and budget as a picture, uint8 (600, 900, 3). "ansi": as text.

    ## Arguments
    * `task`: a fixed task; None draws one at each reset.
    * `suites`: names of the suites to draw from ("planted", "shift").
    * `split`: "train", "validation" or "test".
    * `bases`: draw only tasks on these proxy bases.
    * `schedule`: a `DecisionSchedule`.
    * `max_modules`: padding; None for the most that any of the tasks has.
    * `task_overrides`: fields of `ProxyTask` that every drawn task gets, such as `{"steps": 60}`.

    Options of `reset`: `task` overrides the task of one episode; `budget` its budget, as a share of what uniform rank
    8 takes.

    ## Version History
    * v3: a third of the training tasks count the bytes of a large batch; rise, release and entry are logarithms.
    * v2: tasks come from suites with fixed splits; the reward is a share of the headroom, and pays for churn; the
      gradient's norm and AdaLoRA's importance are features.
    * v1: the budget is the peak of the whole step, not only what is saved for backward; the last decision may spend
      the bytes of signal buffers; at later decisions a module's own rungs count as cheaper, against churn.
    * v0: first version.

    Raises:
        ConfigError: an argument out of range, an action of the wrong shape or range, or a step after the end.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}  # noqa: RUF012  (declared so by Gymnasium)

    def __init__(
        self,
        task: ProxyTask | FineTune | None = None,
        suites: tuple[str, ...] = SUITES,
        split: str = "train",
        bases: tuple[str, ...] | None = None,
        schedule: DecisionSchedule | None = None,
        max_modules: int | None = None,
        task_overrides: dict[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        gym.utils.EzPickle.__init__(
            self, task, suites, split, bases, schedule, max_modules, task_overrides, render_mode
        )
        self.task = task
        self.tasks: tuple[ProxyTask, ...] = () if task else find_tasks(suites, split, bases, task_overrides)
        modules = len(fine_tune_of(task).adapted()[1]) if task else most_modules(self.tasks)
        self.max_modules = max_modules or modules
        if self.max_modules < modules:
            raise ConfigError(f"max_modules is at least {modules}; got {max_modules}.")
        self.schedule = schedule or DecisionSchedule()
        self.render_mode = render_mode
        self.observation_space = observation_space(self.max_modules)
        self.action_space = delta_space(self.max_modules)
        self._stream: Iterator[ProxyTask] | None = None
        self._episode: Episode | None = None
        self._record: EpisodeRecord | None = None

    @property
    def observation(self) -> Observation:
        """The latest observation with the plans that it allows; wrappers decode their actions against it."""
        if self._record is None:
            raise ConfigError("No episode is under way: call reset() first.")
        return self._record.observation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; a new seed also draws a new task."""
        super().reset(seed=seed)
        options = check_options(options)
        if self._stream is None or seed is not None:
            self._stream = task_stream(self.tasks, self.np_random)
        task: ProxyTask | FineTune = options.get("task") or self.task or next(self._stream)
        fine_tune = fine_tune_of(within_budget(task, options["budget"]) if "budget" in options else task)
        self._episode = None  # so that nothing of it is kept aside
        reference = reference_of(fine_tune, self.schedule)  # before the episode: both train the same adapters
        self._episode = Episode(fine_tune, self.schedule)
        first = self._episode.observe()
        self._record = EpisodeRecord(fine_tune.id, reference, self._episode.controller, first)
        return self._arrays(), self._record.info(0)

    def step(self, action: NDArray[np.int64]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one decision and train until the next one or the end."""
        ranks = read_deltas(action, self.max_modules, self.observation.problem)
        return self.decide(Decision(ranks, np.zeros(len(ranks))))

    def decide(self, decision: Decision) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As `step`, with a policy's decision."""
        episode, record = self._episode, self._record
        if episode is None or record is None:
            raise ConfigError("No episode is under way: call reset() first.")
        episode.apply(decision)
        record.decided(episode.step)
        loss: float | None = None
        try:
            loss = episode.advance()
        except NonFiniteError:
            terminated = True
        else:
            terminated = episode.step == episode.task.steps
        reward, info = record.close_interval(
            episode.step,
            loss,
            ended=terminated,
            held_out_loss=episode.held_out_loss() if terminated and loss is not None else None,
            observation=None if terminated else episode.observe(loss),
        )
        if terminated:
            self._episode = None
        return self._arrays(), reward, terminated, False, info

    def _arrays(self) -> dict[str, Any]:
        return self.observation.padded(self.max_modules)

    def render(self) -> Any:
        """The episode so far as `render_mode` asks: a picture (height, width, 3), a text, or None."""
        if self._record is None or self.render_mode is None:
            return None
        return draw(self._record.trace) if self.render_mode == "rgb_array" else describe(self._record.trace)


for _placeholder, _features in (("module_features", MODULE_FEATURE_TABLE), ("run_features", RUN_FEATURE_TABLE)):
    # Without a docstring (python -OO) there is nothing to fill in.
    RankAllocationEnv.__doc__ = (RankAllocationEnv.__doc__ or "").replace(
        f"{{{_placeholder}}}", feature_table(_features, indent="    ")
    )


def most_modules(tasks: tuple[ProxyTask, ...]) -> int:
    """The most target modules that the base of any of these tasks has."""
    return max(len(adapted_base(name)[1]) for name in {task.base for task in tasks})


def check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a reset.

    Raises:
        ConfigError: an unknown one.
    """
    known = ("task", "budget")
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ConfigError(f"Options of reset are {known}; got {unknown}.")
    return options or {}


def within_budget(task: ProxyTask | FineTune, budget: float) -> ProxyTask:
    """The task within another budget, a share of what uniform rank 8 takes.

    Raises:
        ConfigError: the task is not a `ProxyTask`, or the budget is not above 0.
    """
    if not isinstance(task, ProxyTask):
        raise ConfigError(f"The option budget is for proxy tasks; give task {task.id} its budget when you make it.")
    return replace(task, budget=budget, reference=None)
