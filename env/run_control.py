"""The Gymnasium environment `rankpilot/RunControl-v2`: the learning rate of a fine-tune, corrected while it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.arrays import FloatArray, IntArray
from ..common.checks import is_count
from ..decide.rate_control import CHANGES, FEATURES, KEEP, MOST_FEATURE, SHORTEST, UNDO, RunRecord, decision_steps
from ..errors import ConfigError, UnsupportedError, naming_extras, shown
from ..lora.spec import REFERENCE_RANK
from ..lora.stacked.run import Move, reset_runs, set_stacked_ranks
from .proxy_finetune import known_of
from .proxy_task import ProxyTask, find_tasks
from .stacked import Lane, StackTrainer

with naming_extras():
    import gymnasium as gym
    from gymnasium import spaces
    from gymnasium.utils import seeding
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space

LENGTHS = (60, 100, 160, 250, 400)
"""Optimizer steps of episodes."""

RATE = 6e-3
"""About the best rate of the proxies on most texts."""

OFFSETS = tuple(half / 2 for half in range(-6, 7))
"""log2 of the rate at the start over `RATE`: up to 8 times too low, or too high."""

PARTS = ("all", "top half")
"""Where the adapters are: on all modules, or on those of the upper half of the layers."""

WARM_UPS = (0.0, 0.1)
"""Shares of the steps in which the rate rises along a line; from then on it falls along one, to 0."""

MOST_REWARD = 2.0
"""Rewards are from minus to plus this; a run whose loss is not finite gets the lower end."""


@dataclass(frozen=True)
class ControlTask:
    """One run to be controlled.

    Attributes:
        task: what is fine-tuned.
        part: a name of `PARTS`.
        offset: log2 of the rate at the start over that of the task.
        warm_up: share of the steps.
    """

    task: ProxyTask
    part: str = "all"
    offset: float = 0.0
    warm_up: float = 0.0

    def schedule(self, step: int) -> float:
        """The rate of a step as a share of its peak."""
        steps, warm = self.task.steps, max(1, round(self.warm_up * self.task.steps))
        return min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)


class ControlledRuns:
    """Runs under control, stacked on one base; all take their decisions together, at the same shares of their steps.

    Args:
        base: name of the proxy base of all tasks.
        slots: how many runs.
        device: where to train.
    """

    def __init__(self, base: str, slots: int, *, device: torch.device | str = "cpu") -> None:
        self._trainer = StackTrainer(base, slots, device=torch.device(device))
        self._adapters = self._trainer.adapters
        self._tasks: dict[int, ControlTask] = {}
        self._records: dict[int, RunRecord] = {}
        self._failed: dict[int, bool] = {}
        self._copies: dict[int, tuple[Any, ...]] = {}
        self._turn = 0

    def begin(self, tasks: Mapping[int, ControlTask]) -> None:
        """Begin runs, and train them to their first decision; earlier ones are forgotten."""
        self._tasks, self._turn = dict(tasks), 0
        self._records = {slot: RunRecord(each.task.steps) for slot, each in tasks.items()}
        self._failed = dict.fromkeys(tasks, False)
        reset_runs(self._adapters, {slot: each.task.seed for slot, each in tasks.items()})
        set_stacked_ranks(
            self._adapters,
            [Move(slot, self._ranks(each.part), each.task.seed, 0) for slot, each in tasks.items()],
        )
        self._copies = {slot: self._adapters.copy_runs([slot]) for slot in tasks}
        self._train()

    def _ranks(self, part: str) -> IntArray:
        blocks = np.array([target.block for target in self._adapters.targets])
        chosen = blocks >= (0 if part == "all" else (blocks.max() + 1) / 2)
        return np.where(chosen, REFERENCE_RANK, 0).astype(np.int64)

    @property
    def over(self) -> bool:
        """Whether the runs have ended."""
        return all(record.step >= record.total_steps for record in self._records.values())

    def observe(self) -> FloatArray:
        """What is seen of each run, (slots, len(FEATURES))."""
        rows = []
        for slot, each in self._tasks.items():
            record = self._records[slot]
            rows.append(record.observe(each.schedule(min(record.step, record.total_steps - 1))))
        return np.stack(rows)

    def step(self, actions: Mapping[int, int]) -> None:
        """Take an action in each run, and train to the next decision or the end."""
        for slot, action in actions.items():
            if action == UNDO:
                self._adapters.put_back_runs([slot], self._copies[slot])
                self._failed[slot] = False
            elif CHANGES[action] >= 0 and not self._failed[slot]:
                self._copies[slot] = self._adapters.copy_runs([slot])
            self._records[slot].take(action)
        self._train()

    def _train(self) -> None:
        lanes = {}
        for slot, each in self._tasks.items():
            record, steps = self._records[slot], decision_steps(each.task.steps)
            until = steps[self._turn] if self._turn < len(steps) else each.task.steps
            peak = each.task.learning_rate * 2 ** (each.offset + record.moved)
            if not self._failed[slot]:
                rate = _Rate(each, peak)
                lanes[slot] = Lane(each.task, slot, record.step, until, rate, None, alignments=[])
            else:  # it waits for its undoing, or its end
                record.losses, record.step = [math.inf], until
        self._trainer.train(list(lanes.values()))
        for slot, lane in lanes.items():
            assert lane.alignments is not None
            record, first = self._records[slot], lane.until - len(lane.losses)
            for index, loss in enumerate(lane.losses):
                known = index < len(lane.alignments) and (first + index > 0)
                record.add(loss, lane.alignments[index] if known else math.nan)
            record.step, self._failed[slot] = lane.until, lane.failed
        self._turn += 1

    def losses(self) -> dict[int, float]:
        """Held-out losses now, in nats; infinite for a run that failed."""
        sound = [slot for slot, failed in self._failed.items() if not failed]
        found = dict(zip(sound, self._trainer.held_out({s: self._tasks[s].task for s in sound}), strict=True))
        return {slot: value if math.isfinite(value := found.get(slot, math.inf)) else math.inf for slot in self._tasks}


@dataclass(frozen=True)
class _Rate:
    """The rate of each step."""

    task: ControlTask
    peak: float

    def __call__(self, step: int) -> float:
        return self.peak * self.task.schedule(step)


def control_tasks(base: str, split: str = "train", lengths: Sequence[int] = LENGTHS) -> tuple[ControlTask, ...]:
    """Runs of a suite's texts at every offset of the rate; lengths, parts and warm-ups take turns.

    Args:
        base: name of a proxy base.
        split: of the suites.
        lengths: of the runs, in optimizer steps.

    Raises:
        UnknownNameError: no such base or split.
        ConfigError: the split has no text for this base, or a run is too short to be controlled.
    """
    if not lengths or not all(is_count(length) and length >= SHORTEST for length in lengths):
        raise ConfigError(f"Runs under control have at least {SHORTEST} steps; got {shown(lengths)}.")
    texts: dict[str, ProxyTask] = {}
    for task in find_tasks(("shift",), split, (base,)):
        if task.kind == "shift":
            texts.setdefault(task.corpus, replace(task, learning_rate=RATE, reference=None))
    if not texts:
        raise ConfigError(f"No text of the {split} split is on the base {base}.")
    return tuple(
        ControlTask(
            replace(task, steps=lengths[(turn + 2 * number) % len(lengths)]),
            PARTS[(turn + number) % 3 // 2],
            offset,
            WARM_UPS[(turn // 2 + number) % 2],
        )
        for number, task in enumerate(texts.values())
        for turn, offset in enumerate(OFFSETS)
    )


class RunControlVectorEnv(VectorEnv[FloatArray, NDArray[Any], NDArray[Any]]):
    """Correct the learning rate of many short fine-tunes while they go.

    ## Description
    An episode is one fine-tune of a small pretrained transformer by LoRA, at a rate that is up to 8 times too low or
    too high. It is controlled at 8 moments, between 2 and 50 % of its steps. All episodes of the vector share a frozen
    base and are trained together; they begin and end together.

    ## Action Space
    `Discrete(8)`: keep the rate; multiply it by 1/4, 1/2, 0.7, 1.4, 2 or 4; or go back to the adapters and the
    optimizer's state that were kept when the rate was last kept or raised, and take a quarter of the rate.

    ## Observation Space
    `Box(-3, 3, (14,))`: `rankpilot.decide.rate_control.FEATURES`.

    ## Rewards
    At the end by how much the log of the held-out loss is below that of the same run left alone, -2 to 2.

    ## Arguments
    * `base`: the proxy base.
    * `split`: of the suites whose texts are learned.
    * `lengths`: of the runs, in optimizer steps.
    * `device`: where to train.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        base: str = "llama-4x64",
        split: str = "train",
        lengths: Sequence[int] = LENGTHS,
        device: str = "cpu",
    ) -> None:
        if not is_count(num_envs):
            raise ConfigError(f"num_envs is a whole number of at least 1; got {shown(num_envs)}.")
        self.num_envs = num_envs
        self.tasks: tuple[ControlTask, ...] = control_tasks(base, split, tuple(lengths))
        self.single_observation_space = spaces.Box(-MOST_FEATURE, MOST_FEATURE, (len(FEATURES),), np.float32)
        self.single_action_space = spaces.Discrete(len(CHANGES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._runs = ControlledRuns(base, num_envs, device=device)
        self._device = device
        self._generators: list[np.random.Generator] = []
        self._drawn: dict[int, ControlTask] = {}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every slot."""
        if options:
            raise ConfigError(f"There are no options of reset; got {shown(options)}.")
        if seed is not None or not self._generators:
            seeds = (
                seed if isinstance(seed, list) else [None if seed is None else seed + n for n in range(self.num_envs)]
            )
            self._generators = [seeding.np_random(each)[0] for each in seeds]
        return self._begin(), {}

    def _begin(self) -> NDArray[np.float32]:
        drawn = {n: self.tasks[int(draw.integers(len(self.tasks)))] for n, draw in enumerate(self._generators)}
        self._drawn = drawn
        self._runs.begin(drawn)
        return self._seen()

    def _seen(self) -> NDArray[np.float32]:
        return self._runs.observe().astype(np.float32)

    def left_alone(self, tasks: Mapping[int, ControlTask]) -> dict[int, float]:
        """Held-out losses of runs that nobody controls, by slot; each is trained once."""
        unknown = {each: slot for slot, each in tasks.items() if self._key(each) not in known_of(each.task)}
        if unknown:
            self._runs.begin({slot: each for each, slot in unknown.items()})
            while not self._runs.over:
                self._runs.step(dict.fromkeys(unknown.values(), KEEP))
            losses = self._runs.losses()
            for each, slot in unknown.items():
                known_of(each.task)[self._key(each)] = losses[slot]
        return {slot: known_of(each.task)[self._key(each)] for slot, each in tasks.items()}

    def _key(self, each: ControlTask) -> tuple[Any, ...]:
        return ("left alone", each.part, each.offset, each.warm_up, self._device)

    def step(self, actions: NDArray[Any]) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take an action in every slot, and train to the next decision or the end."""
        if not self._drawn:
            raise ConfigError("No episode is under way: call reset() first.")
        chosen = np.asarray(actions)
        allowed = chosen.shape == (self.num_envs,) and chosen.dtype.kind in "iu"
        if not allowed or not bool(((chosen >= 0) & (chosen < len(CHANGES))).all()):
            raise ConfigError(
                f"Actions are {self.num_envs} whole numbers from 0 to {len(CHANGES) - 1}; got {shown(actions)}."
            )
        self._runs.step(dict(enumerate(chosen.tolist())))
        over, rewards = self._runs.over, np.zeros(self.num_envs)
        seen, infos = self._seen(), dict[str, Any]()
        if over:
            losses, alone = self._runs.losses(), self.left_alone(self._drawn)
            rewards = np.array([_reward(losses[slot], alone[slot]) for slot in range(self.num_envs)])
            for slot, each in self._drawn.items():
                final = {"offset": each.offset, "loss": losses[slot], "left_alone": alone[slot]}
                infos = self._add_info(infos, {"final_obs": seen[slot], "final_info": final}, slot)
            seen = self._begin()
        ended = np.full(self.num_envs, over)
        return seen, rewards, ended, np.zeros_like(ended), infos


def _reward(loss: float, alone: float) -> float:
    if not math.isfinite(loss):
        return -MOST_REWARD
    if not math.isfinite(alone):
        return MOST_REWARD
    return float(np.clip(math.log(alone / loss), -MOST_REWARD, MOST_REWARD))


class RunControlEnv(gym.Env[NDArray[np.float32], int], gym.utils.EzPickle):
    """One episode of `RunControlVectorEnv` at a time; see there."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **settings: Any) -> None:
        gym.utils.EzPickle.__init__(self, render_mode, **settings)
        if render_mode is not None:
            raise UnsupportedError(f"There is no render mode {shown(render_mode)}; allowed: None.")
        self._vector = RunControlVectorEnv(1, **settings)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        seen, _ = self._vector.reset(seed=seed, options=options)
        return seen[0], {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take an action; see `RunControlVectorEnv`."""
        seen, rewards, ended, _, infos = self._vector.step(np.asarray([action]))
        over = bool(ended[0])
        info = {name: values[0] for name, values in infos["final_info"].items() if name[0] != "_"} if over else {}
        return infos["final_obs"][0] if over else seen[0], float(rewards[0]), over, False, info
