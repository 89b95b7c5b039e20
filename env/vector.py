"""The vector environment of Gymnasium: many episodes at once on one frozen base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.checks import is_count
from ..data.task import SUITES
from ..decide.settings import DecisionSchedule
from ..errors import ConfigError, UnknownNameError, naming_extras, shown
from .episode import UNIFORM, Comparison, EpisodeRecord, rule_to_compare_with
from .proxy_task import ProxyTask, TaskStream
from .rank_allocation import Actions, action_space, environment_tasks, observation_space, read_action
from .stacked import StackedEpisodes

with naming_extras():
    from gymnasium.utils import seeding
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space


@dataclass(frozen=True)
class StackedConfig:
    """What is stacked.

    Attributes:
        num_envs: episodes at a time.
        base: the proxy base of all tasks.
        episodes_per_task: so many neighbouring episodes are a group: they share task, seed and batches, and begin and
            end together; divides `num_envs`.
        actions: "deltas" or "scores"; see `ACTIONS`.
        against: what the reward compares an episode with: "uniform", or the name of a rule, whose run of the task is
            trained beside the episodes.
        schedule: when ranks are decided.
        max_modules: padding of observations and actions; None for as many as the base has.
        device: where to train.

    Raises:
        ConfigError: a value out of range.
        UnknownNameError: no such form of actions, or no such comparison.
    """

    num_envs: int
    base: str = "llama-4x64"
    episodes_per_task: int = 1
    actions: Actions = "deltas"
    against: str = UNIFORM
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    max_modules: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        counts = (self.num_envs, self.episodes_per_task)
        if not all(map(is_count, counts)) or self.num_envs % self.episodes_per_task:
            raise ConfigError(
                f"num_envs is at least 1 and a multiple of episodes_per_task; got {self.num_envs!r} and "
                f"{self.episodes_per_task!r}."
            )
        if self.max_modules is not None and not is_count(self.max_modules):
            raise ConfigError(f"max_modules is a whole number of at least 1, or None; got {shown(self.max_modules)}.")
        action_space(self.actions, 1)
        rule_to_compare_with(self.against)

    @property
    def rows(self) -> int:
        """Runs that are trained at a time: the episodes and, beside each group, the rule's."""
        return self.num_envs + (self.num_envs // self.episodes_per_task if rule_to_compare_with(self.against) else 0)


@dataclass(frozen=True, eq=False)
class Transition:
    """What one episode's step returns.

    Attributes:
        reward: how much better the episode ended than the run that it is compared with; 0 before the end.
        terminated: whether the episode is over.
        info: as `RankAllocationEnv`'s.
    """

    reward: float
    terminated: bool
    info: dict[str, Any]


class StackedVectorEnv(VectorEnv[dict[str, Any], NDArray[Any], NDArray[Any]]):
    """`RankAllocationEnv`, stacked: the same spaces, rewards and infos, all episodes trained together.

    `gym.make_vec("rankpilot/RankAllocation-v4", num_envs=8, vectorization_mode="vector_entry_point", base=...)`. An
    episode that ends is reset in the same step: its last observation and info are in `final_obs` and `final_info`.

    With `episodes_per_task` above 1, neighbouring episodes share task, seed and batches, so that their returns can be
    compared with each other. They begin and end together: one whose training fails waits for the others, and gets its
    reward then.

    Who chooses the tasks itself, as the training of a policy does, calls `begin` and `advance` in place of `reset` and
    `step`.

    Args:
        num_envs: episodes at a time.
        render_mode: "ansi"; `render` then returns one text for each episode.
        task: a fixed task; None draws one for each group.
        suites: names of the suites to draw from; this, `split` and `task_overrides` not with `task`.
        split: of the suites.
        task_overrides: fields of `ProxyTask` that each drawn task gets.
        fresh_seeds: see `RankAllocationEnv`.
        settings: fields of `StackedConfig`.

    Attributes:
        records: the episodes under way, by slot.

    Raises:
        ConfigError: an argument out of range, an action of the wrong shape or range, or a step before `reset`.
        UnknownNameError: a name that is not among the allowed ones.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

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
        self.config = config = StackedConfig(num_envs, **settings)
        if task and not isinstance(task, ProxyTask):
            raise ConfigError(f"Stacked episodes train proxies; make an environment of {type(task).__name__} alone.")
        if task and task.base != config.base:
            raise ConfigError(f"The task is on base {task.base}, not {config.base}. Give base={task.base!r}.")
        self.tasks = environment_tasks(
            task,
            suites,
            split,
            None if task else (config.base,),
            task_overrides,
            fresh_seeds=fresh_seeds,
            against=config.against,
        )
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._rule = rule_to_compare_with(config.against)
        self.episodes: StackedEpisodes = StackedEpisodes(
            config.base, config.schedule, config.rows, device=config.device
        )
        count = self.episodes.module_count
        self.max_modules: int = config.max_modules or count
        if self.max_modules < count:
            raise ConfigError(f"max_modules is at least {count} for {config.base}; got {config.max_modules}.")
        self.single_observation_space = observation_space(self.max_modules)
        self.single_action_space = action_space(config.actions, self.max_modules)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.records: dict[int, EpisodeRecord] = {}
        self._initial: dict[int, float] = {}
        self._fresh_seeds = fresh_seeds
        self._streams: list[TaskStream] = []
        self._seed_tasks(None)

    # Gymnasium --------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode in every slot; for the options see `RankAllocationEnv`."""
        if seed is not None:
            self._seed_tasks(seed)
        self.records.clear()  # so that no episode is under way if the start of one fails
        infos = self._begin_drawn(range(self.num_envs), options)
        return self.padded(), self._gathered(infos)

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take one decision in every slot and train until the next one or the end."""
        if len(self.records) < self.num_envs:
            raise ConfigError("No episode is under way: call reset() first.")
        count = next(iter(np.shape(actions)), 0) if isinstance(actions, np.ndarray | Sequence) else 0
        if count != self.num_envs:
            raise ConfigError(f"One action for each of {self.num_envs} environments is needed; got {count}.")
        steps = self.advance(dict(enumerate(actions)))
        rewards = np.array([step.reward for step in steps.values()])
        terminated = np.array([step.terminated for step in steps.values()])
        infos = {slot: step.info for slot, step in steps.items()}
        ended = np.flatnonzero(terminated).tolist()
        if ended:
            # They go at once, so that none of them seems under way if the start of the next one fails.
            last = {slot: self.records.pop(slot).observation.padded(self.max_modules) for slot in ended}
            for slot, info in self._begin_drawn(ended).items():
                infos[slot] = {**info, "final_obs": last[slot], "final_info": infos[slot]}
        return self.padded(), rewards, terminated, np.zeros_like(terminated), self._gathered(infos)

    def render(self) -> tuple[str, ...] | None:
        """One text for each episode so far."""
        if self.render_mode is None or len(self.records) < self.num_envs:
            return None
        return tuple(self.records[slot].describe() for slot in range(self.num_envs))

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
            for each in seeds[:: self.config.episodes_per_task]
        ]

    def _begin_drawn(self, slots: Sequence[int], options: dict[str, Any] | None = None) -> dict[int, dict[str, Any]]:
        """Start an episode of a drawn task in each of these slots, which are whole groups; returns their infos."""
        size = self.config.episodes_per_task
        drawn = {group: self._streams[group].take(options) for group in dict.fromkeys(slot // size for slot in slots)}
        return self.begin({slot: drawn[slot // size] for slot in slots})  # type: ignore[misc]

    def _gathered(self, infos: dict[int, dict[str, Any]]) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        for slot, info in infos.items():
            gathered = self._add_info(gathered, info, slot)
        return gathered

    # Episodes ---------------------------------------------------------------------------------------------------------

    def begin(self, tasks: Mapping[int, ProxyTask]) -> dict[int, dict[str, Any]]:
        """Begin episodes of given tasks, whole groups at a time; returns their infos.

        Args:
            tasks: by slot; the slots of a group get the same one.

        Raises:
            ConfigError: a part of a group, or several tasks in one group; see also `StackedEpisodes.start`.
        """
        for slot, task in tasks.items():
            if any(tasks.get(other) != task for other in self._group(slot)):
                raise ConfigError(f"Slots {self._group(slot)} begin together, on one task.")
        self.episodes.measure_references(tasks)
        ruled = {self._rule_slot(slot): task for slot, task in tasks.items()} if self._rule else {}
        self.episodes.start({**tasks, **ruled})
        for slot, task in tasks.items():
            episode = self.episodes.under_way[slot]
            reference = self.episodes.reference(task)
            self.records[slot] = EpisodeRecord(task.id, reference, episode.applier, episode.observation)
        self._initial |= self.episodes.held_out_losses(list(ruled))
        return {slot: self.records[slot].info() for slot in tasks}

    def advance(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Transition]:
        """Take a decision in whole groups, and train their episodes until the next one or the end.

        Args:
            actions: by slot, see `read_action`; those of episodes that wait are ignored.

        Raises:
            ConfigError: an action cannot be read; nothing has happened then.
        """
        under_way, records = self.episodes.under_way, self.records
        decisions = {
            slot: read_action(self.config.actions, action, self.max_modules, records[slot].observation)
            for slot, action in actions.items()
            if not under_way[slot].ended
        }
        ruled = [slot for slot in self._rule_slots(actions) if not under_way[slot].ended]
        rules = {slot: self._rule.decide(under_way[slot].observation) for slot in ruled if self._rule}
        self.episodes.step({**decisions, **rules})
        for slot in decisions:
            episode = under_way[slot]
            records[slot].advance(episode.step, episode.loss, episode.observation)
        return self._transitions(list(actions))

    def _transitions(self, slots: Sequence[int]) -> dict[int, Transition]:
        under_way = self.episodes.under_way
        over = [slot for slot in slots if all(under_way[other].ended for other in self._group(slot))]
        whole = [slot for slot in (*over, *self._rule_slots(over)) if under_way[slot].ended]
        losses = self.episodes.held_out_losses([slot for slot in whole if not under_way[slot].failed])
        transitions = {}
        for slot in slots:
            record = self.records[slot]
            reward = record.end(losses.get(slot), self._comparison(slot, losses)) if slot in over else 0.0
            transitions[slot] = Transition(reward, slot in over, record.info())
        return transitions

    def _comparison(self, slot: int, losses: Mapping[int, float]) -> Comparison:
        """What an episode is compared with, given the held-out losses of its group and its rule."""
        reference = self.records[slot].reference
        if not self._rule:
            return Comparison.with_uniform(reference)
        group = [losses[other] for other in self._group(slot) if math.isfinite(losses.get(other, math.nan))]
        ruled = self._rule_slot(slot)
        return Comparison.with_run(losses.get(ruled, math.nan), self._initial[ruled], reference, group)

    def _group(self, slot: int) -> range:
        """The slots that share a task with one."""
        first = slot - slot % self.config.episodes_per_task
        return range(first, first + self.config.episodes_per_task)

    def _rule_slots(self, slots: Iterable[int]) -> list[int]:
        """Where the rule runs the tasks of these slots, each once; nowhere without a rule."""
        return list(dict.fromkeys(map(self._rule_slot, slots))) if self._rule else []

    def _rule_slot(self, slot: int) -> int:
        return self.num_envs + slot // self.config.episodes_per_task

    def padded(self) -> dict[str, NDArray[Any]]:
        """The latest observations of the episodes under way as arrays, one row a slot."""
        rows = [self.records[slot].observation.padded(self.max_modules) for slot in sorted(self.records)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
