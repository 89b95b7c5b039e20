"""Stacked episodes as a Stable-Baselines3 vector environment, in this process, in worker processes or on a Ray cluster.

A stack is a `FineTuneVectorEnv` held by a worker. Each call carries everything needed to compute its answer: the seed
of the current episodes and all actions so far. A worker that loses its stack (because its node died) replays the
episodes, so results do not depend on where or how often this happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.checks import is_count
from ..common.cluster import RayWorker
from ..common.errors import ConfigError, WorkerError, naming_extras, shown
from .fine_tune import Arrays, FineTuneVectorEnv

with naming_extras():
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import VecEnv


@dataclass(frozen=True)
class Played:
    """Response of a stack.

    Attributes:
        seen: observations, one row per episode.
        masks: action masks, bool (episodes, actions).
        ruled: actions of the rule used as the reward baseline, int64 (episodes,).
        rewards: (episodes,).
        infos: one dict per episode.
        over: True if the episodes have ended.
    """

    seen: Arrays
    masks: NDArray[np.bool_]
    ruled: NDArray[np.int64]
    rewards: NDArray[np.float64]
    infos: list[dict[str, Any]]
    over: bool


@dataclass
class _Stack:
    """A stack and the seed and actions behind its current state."""

    env: FineTuneVectorEnv
    settings: dict[str, Any]
    seed: int = -1
    actions: list[list[int]] = field(default_factory=list)


_STACKS: dict[int, _Stack] = {}
"""Stacks of this process, by number."""


def play(number: int, settings: dict[str, Any], seed: int, actions: Sequence[Sequence[int]]) -> Played:
    """Return the state of a stack after some actions; a process without the stack replays the episodes from the start.

    Args:
        number: number of the stack.
        settings: arguments of `FineTuneVectorEnv`.
        seed: seed of the episodes.
        actions: actions of each decision so far, (episodes,) each.
    """
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):  # adapters are initialized at random
        if number not in _STACKS or _STACKS[number].settings != settings:
            _STACKS[number] = _Stack(FineTuneVectorEnv(**settings), settings)
        stack = _STACKS[number]
        env, taken = stack.env, [list(each) for each in actions]
        left = taken[-1:]
        if stack.seed != seed or stack.actions != taken[:-1] or not taken:
            seen, _ = env.reset(seed=seed)
            rewards, infos, over = np.zeros(env.num_envs), [dict[str, Any]()] * env.num_envs, False
            left = taken
        for each in left:
            seen, rewards, infos, over = env.advance(np.asarray(each))
        stack.seed, stack.actions = seed, taken
        return Played(seen, env.action_masks(), env.rule_actions(), rewards, infos, over)


class _Here:
    """An executor that runs everything in this process."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        _STACKS.clear()


SCALES = {"text": 3.0, "labels": 8.0, "planted": 20.0}
"""Scale of returns by kind of task. With 30 % of the actions drawn, arcsinh(return / scale) spreads by .6 to .7."""


class StackVecEnv(VecEnv):
    """Several stacks of episodes as one vector environment, with `action_masks` for MaskablePPO.

    Args:
        num_envs: episodes per stack; a multiple of `episodes_per_task`.
        stacks: number of stacks.
        workers: local processes to train them in; 1 means this process. With `cluster`, the number of actors.
        cluster: address of a Ray cluster: "local" starts one, "auto" joins the one running here; None for no cluster.
        seed: seed of the tasks. They depend on nothing else here.
        scaled: rewards are arcsinh(r / scale) with a scale for each kind of task, see `SCALES`: it limits outliers, and
            kinds weigh alike. Returns in `info["episode"]`, which `evaluate_policy` reports, are always raw.
        settings: fields of `FineTuneConfig`.

    Attributes:
        round: rounds of episodes started so far; set it before `reset` to resume from that round.

    Raises:
        ConfigError, UnknownNameError: an invalid argument.
        WorkerError: raised later, if a local process has died.
    """

    def __init__(
        self,
        num_envs: int = 16,
        *,
        stacks: int = 1,
        workers: int = 1,
        cluster: str | None = None,
        seed: int = 0,
        scaled: bool = False,
        **settings: Any,
    ) -> None:
        if not (is_count(stacks) and is_count(workers)):
            given = f"{shown(stacks)} and {shown(workers)}"
            raise ConfigError(f"stacks and workers must be whole numbers of at least 1; got {given}.")
        self._settings = {"num_envs": num_envs, **settings}
        like = FineTuneVectorEnv(**self._settings)
        self._stacks, self._scaled = stacks, scaled
        self._workers = _workers(min(workers, stacks), cluster)
        self._seed, self.round = seed, 0
        self._seed_of, self._taken = list[int](), list[list[list[int]]]()
        self._played: list[Played] = []
        self.render_mode = None
        super().__init__(stacks * num_envs, like.single_observation_space, like.single_action_space)

    def _play(self) -> None:
        """Bring all stacks up to date."""
        futures = []
        for number, (seed, taken) in enumerate(zip(self._seed_of, self._taken, strict=True)):
            worker = self._workers[number % len(self._workers)]
            futures.append(worker.submit(play, number, self._settings, seed, list(taken)))
        try:
            self._played = [future.result() for future in futures]
        except BrokenExecutor as error:
            reason = "A worker process died, possibly out of memory. Continue with --resume and fewer workers."
            raise WorkerError(reason) from error

    def reset(self) -> Any:
        """Start a round of episodes in all stacks."""
        self._begin_round()
        return self._seen()

    def _begin_round(self) -> None:
        draws = [np.random.SeedSequence([self._seed, self.round, number]) for number in range(self._stacks)]
        self._seed_of, self._taken = [int(draw.generate_state(1)[0]) // 2 for draw in draws], [[] for _ in draws]
        self.round += 1
        self._play()

    def _seen(self) -> Arrays:
        rows = [played.seen for played in self._played]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _check_begun(self) -> None:
        if not self._played:
            raise ConfigError("No episode is in progress: call reset() first.")

    def _joined(self, name: str) -> NDArray[Any]:
        """One field of `Played`, for the episodes of all stacks."""
        self._check_begun()
        return np.concatenate([getattr(played, name) for played in self._played])

    def step_async(self, actions: NDArray[Any]) -> None:
        """Submit actions, (episodes of all stacks,)."""
        self._check_begun()
        for taken, part in zip(self._taken, np.split(np.asarray(actions), self._stacks), strict=True):
            taken.append([int(action) for action in part])

    def step_wait(self) -> Any:
        """Return the results of the actions; all episodes end together, and the next ones start at once."""
        self._play()
        rewards = self._joined("rewards")
        infos = [dict(info) for played in self._played for info in played.infos]
        over = all(played.over for played in self._played)
        if over:
            last = self._seen()
            for slot, info in enumerate(infos):
                info["terminal_observation"] = {name: values[slot] for name, values in last.items()}
                info["episode"] = {"r": float(rewards[slot]), "l": len(self._taken[0]), "t": 0.0}
            self._begin_round()
        rewards = np.arcsinh(rewards / [SCALES[info["kind"]] for info in infos]) if self._scaled else rewards
        return self._seen(), rewards.astype(np.float32), np.full(self.num_envs, over), infos

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Draw tasks from this seed at the next `reset`, starting at the first round; None changes nothing."""
        if seed is not None:
            self._seed, self.round = seed, 0
        return [self._seed] * self.num_envs

    def rule_actions(self) -> NDArray[np.int64]:
        """Actions the baseline rule would take now, int64 (num_envs,)."""
        return self._joined("ruled")

    def close(self) -> None:
        """Shut down the workers."""
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute for each episode: the `action_masks` method, or an attribute of this object."""
        indices = list(self._get_indices(indices))
        if attr_name == "action_masks":
            return [lambda index=index: self.env_method(attr_name, indices=index)[0] for index in indices]
        return [getattr(self, attr_name)] * len(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise an error: attributes of single episodes cannot be set."""
        raise ConfigError(f"{attr_name!r} cannot be set for single episodes: pass it when creating the environment.")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call `action_masks` on some episodes; there is no other method.

        Raises:
            AttributeError: another method.
        """
        if method_name != "action_masks":
            raise AttributeError(method_name)
        masks = self._joined("masks")
        return [masks[index] for index in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Return True for `Monitor` alone, whose returns and lengths of episodes are in the infos."""
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))


def _workers(count: int, cluster: str | None) -> Sequence[Any]:
    """Executors for training the stacks."""
    if cluster is not None:
        return RayWorker.start(cluster, count)
    if count == 1:
        return [_Here()]
    return [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(count)]
