"""The Gymnasium environment `rankpilot/FineTune-v8`: steer one short fine-tune while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.checks import is_count
from ..common.errors import ConfigError, UnknownNameError, naming_extras, shown
from ..decide.groups import GROUP_FEATURES, GROUP_RULES, NOTHING, RATE_CHANGES, STEERING, GroupView, Steering
from ..decide.log import DecisionLog
from ..decide.observation import MOST_FEATURE, RUN_FEATURES
from ..decide.policy import Decision, Policy
from .bases import find_base
from .stack.episodes import StackedEpisodes
from .tasks import SPLITS, FineTuneTask, Regime, draw_task

with naming_extras():
    import gymnasium as gym
    from gymnasium import spaces
    from gymnasium.utils import seeding
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space

MOST_GROUPS = 24
"""Maximum number of groups in observations and actions; the proxy bases have 12 to 21."""

ACTIONS = len(RATE_CHANGES) + MOST_GROUPS

BAR, PICTURE_WIDTH = 8, 160
"""Bar height of a group and width of the widest bar (rank 255), in pixels."""

FAILED = 200.0
"""Cost of a run with a non-finite final loss, in hundredths of the log loss."""

Arrays = dict[str, NDArray[Any]]


def observation_space() -> spaces.Dict:
    """Observation space: `GROUP_FEATURES` per group, a mask of existing groups, and `RUN_FEATURES`."""
    return spaces.Dict(
        {
            "groups": spaces.Box(-MOST_FEATURE, MOST_FEATURE, (MOST_GROUPS * len(GROUP_FEATURES),), np.float32),
            "present": spaces.MultiBinary(MOST_GROUPS),
            "run": spaces.Box(-MOST_FEATURE, MOST_FEATURE, (len(RUN_FEATURES),), np.float32),
        }
    )


def padded(view: GroupView) -> Arrays:
    """Pad a view to an observation of the environment."""
    count = len(view.groups.names)
    groups, present = np.zeros((MOST_GROUPS, len(GROUP_FEATURES)), np.float32), np.zeros(MOST_GROUPS, np.int8)
    groups[:count], present[:count] = view.features, view.groups.repeated
    return {"groups": groups.reshape(-1), "present": present, "run": view.run.copy()}


def padded_mask(view: GroupView) -> NDArray[np.bool_]:
    """Action mask of the environment, bool (4 + MOST_GROUPS,)."""
    mask = np.zeros(ACTIONS, dtype=np.bool_)
    mask[: view.actions] = view.allowed
    return mask


@dataclass(frozen=True)
class FineTuneConfig:
    """Distribution of episodes, and the baseline for rewards.

    Attributes:
        split: split of the tasks, "train" or "test".
        base: proxy base of all tasks; drawn for each round of episodes if None.
        regime: the problem with the runs, see `REGIMES`; drawn for each task if None.
        steps: optimizer steps of the runs; drawn if None.
        tasks: tasks to draw episodes from; if given, the fields above are ignored.
        against: baseline rule for the reward, run on the same task, seed and batches; see `GROUP_RULES`.
        episodes_per_task: number of neighboring episodes in a vector sharing a task.
        logs: a folder; each episode logs its decisions to a subfolder, as a real run does.
        device: device to train on.

    Raises:
        ConfigError, UnknownNameError: an invalid value.
    """

    split: str = "train"
    base: str | None = None
    regime: Regime | None = None
    steps: int | None = None
    tasks: Sequence[FineTuneTask] | None = None
    against: str = "left-alone"
    episodes_per_task: int = 1
    logs: Path | str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tasks is not None:
            if not isinstance(self.tasks, Sequence) or not self.tasks:
                raise ConfigError(f"tasks must be a list of at least one FineTuneTask; got {shown(self.tasks)}.")
            for task in self.tasks:
                if not isinstance(task, FineTuneTask):
                    raise ConfigError(f"A task must be a FineTuneTask; got {shown(task)}.")
        if self.base is not None:
            find_base(self.base)
        if self.steps is not None and not (is_count(self.steps) and self.steps >= SHORTEST):
            raise ConfigError(f"Episodes need at least {SHORTEST} optimizer steps; got {shown(self.steps)}.")
        if self.against not in GROUP_RULES:
            raise UnknownNameError.of("rule to compare with", self.against, GROUP_RULES)
        if not is_count(self.episodes_per_task):
            given = shown(self.episodes_per_task)
            raise ConfigError(f"episodes_per_task must be a whole number of at least 1; got {given}.")
        draw_task(np.random.default_rng(0), self.split, self.base, self.regime)

    def draw(self, generator: np.random.Generator, base: str) -> FineTuneTask:
        """Draw the task of the next episode, on a given base."""
        if self.tasks:
            on_base = [task for task in self.tasks if task.base == base]
            return on_base[int(generator.integers(len(on_base)))]
        return draw_task(generator, self.split, base, self.regime, self.steps)

    def draw_base(self, generator: np.random.Generator) -> str:
        """Draw the base of the next round of episodes."""
        if self.base and not self.tasks:
            return self.base
        bases = [task.base for task in self.tasks] if self.tasks else SPLITS[self.split].bases
        return bases[int(generator.integers(len(bases)))]


SHORTEST = 25
"""Optimizer steps of the shortest episode: twelve decisions do not fit in fewer."""


@dataclass(frozen=True)
class _Outside:
    """Stand-in for the agent acting in an environment, for episode logs."""

    name: str = "agent"

    def decide(self, observation: Any) -> Decision:
        raise NotImplementedError("the actions of an environment come from outside")


class FineTuneVectorEnv(VectorEnv[Arrays, NDArray[Any], NDArray[Any]]):
    """`FineTuneEnv`, stacked: many episodes trained together on one frozen base; they begin and end together.

    `gymnasium.make_vec(rankpilot.ENV_ID, num_envs=16, vectorization_mode="vector_entry_point")`. An episode is reset in
    the same step it ends: its last observation and info are in `final_obs` and `final_info`.

    Args:
        num_envs: number of parallel episodes.
        render_mode: None.
        settings: fields of `FineTuneConfig`.

    Attributes:
        config: the settings.
        tasks: tasks of the current episodes, by slot.

    Raises:
        ConfigError, UnknownNameError: an invalid argument or action, or a step before `reset`.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, render_mode: str | None = None, **settings: Any) -> None:
        if render_mode is not None:
            raise UnknownNameError.of("render mode of the vector", str(render_mode), ["None"])
        known = list(FineTuneConfig.__dataclass_fields__)
        for name in settings:
            if name not in known:
                raise UnknownNameError.of("argument of the environment", name, known)
        self.config = FineTuneConfig(**settings)
        if not is_count(num_envs) or num_envs % self.config.episodes_per_task:
            given = f"{shown(num_envs)} and {self.config.episodes_per_task}"
            raise ConfigError(f"num_envs must be a whole number and a multiple of episodes_per_task; got {given}.")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = observation_space()
        self.single_action_space = spaces.Discrete(ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.tasks: dict[int, FineTuneTask] = {}
        self._stacks: dict[str, StackedEpisodes] = {}
        self._generators: list[np.random.Generator] = []
        self._current: list[GroupView] = []
        self._logged = 0

    # Gymnasium --------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Start an episode in every slot; there are no options."""
        if options:
            raise ConfigError(f"reset takes no options; got {shown(options)}.")
        if seed is not None or not self._generators:
            slots = range(self.num_envs)
            seeds = seed if isinstance(seed, list) else [None if seed is None else seed + slot for slot in slots]
            if len(seeds) != self.num_envs:
                raise ConfigError(f"seed must be a whole number, or one for each of {self.num_envs} environments.")
            self._generators = [seeding.np_random(each)[0] for each in seeds]
        self._begin()
        return self._seen(), self._gathered(self._infos())

    def step(self, actions: NDArray[Any]) -> tuple[Arrays, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take an action in every slot, and train to the next decision or the end."""
        seen, rewards, infos, over = self.advance(np.asarray(actions))
        if over:
            last = seen
            self._begin()
            seen, begun = self._seen(), self._infos()
            for slot, info in enumerate(infos):
                final = {name: values[slot] for name, values in last.items()}
                infos[slot] = {**begun[slot], "final_obs": final, "final_info": info}
        ended = np.full(self.num_envs, over)
        return seen, rewards, ended, np.zeros_like(ended), self._gathered(infos)

    def advance(self, actions: NDArray[Any]) -> tuple[Arrays, NDArray[np.float64], list[dict[str, Any]], bool]:
        """Like `step`, without resetting finished episodes.

        Args:
            actions: int (num_envs,).

        Returns:
            Observations, rewards, infos by slot, and True if the episodes have ended.
        """
        decisions, stack = self._decisions(actions), self._stack
        ruled = {slot: self._rule.decide(stack.under_way[slot].observation) for slot in self._ruled}
        stack.step(decisions | ruled)
        if not stack.over:
            self._look()
            return self._seen(), np.zeros(self.num_envs), self._infos(), False
        losses = stack.held_out()
        rewards = np.array([self._reward(losses, slot) for slot in range(self.num_envs)])
        return self._seen(), rewards, self._infos(losses), True

    def action_masks(self) -> NDArray[np.bool_]:
        """Mask of allowed actions, bool (num_envs, actions); any other action is a no-op."""
        return np.stack([padded_mask(view) for view in self._views])

    def picture(self, slot: int) -> NDArray[np.uint8]:
        """Render the mean rank of each group of an episode as bars, uint8 (height, width, 3)."""
        view, ranks = self._views[slot], self._stack.under_way[slot].applier.ranks
        means = np.bincount(view.groups.member, weights=ranks) / np.bincount(view.groups.member)
        image = np.full((BAR * len(means), PICTURE_WIDTH, 3), 255, dtype=np.uint8)
        for row, mean in enumerate(means):
            image[BAR * row + 1 : BAR * (row + 1) - 1, : round(PICTURE_WIDTH * np.log2(1 + mean) / 8)] = (31, 119, 180)
        return image

    def rule_actions(self) -> NDArray[np.int64]:
        """Actions the baseline rule would take now, int64 (num_envs,)."""
        return np.array([self._rule.actor.act(view) for view in self._views], dtype=np.int64)

    # Episodes ---------------------------------------------------------------------------------------------------------

    @property
    def _views(self) -> list[GroupView]:
        """Views of the current decisions, by slot."""
        if not self._current:
            raise ConfigError("No episode is in progress: call reset() first.")
        return self._current

    @property
    def _stack(self) -> StackedEpisodes:
        return self._stacks[self.tasks[0].base]

    @property
    def _rule(self) -> Steering:
        return GROUP_RULES[self.config.against]

    @property
    def _ruled(self) -> range:
        """Slots of the baseline runs, one per task."""
        return range(self.num_envs, self.num_envs + self.num_envs // self.config.episodes_per_task)

    def _begin(self) -> None:
        """Draw tasks, and start their episodes and the baseline's."""
        size, firsts = self.config.episodes_per_task, self._generators[:: self.config.episodes_per_task]
        base = self.config.draw_base(firsts[0])
        drawn = [self.config.draw(generator, base) for generator in firsts]
        self.tasks = {slot: drawn[slot // size] for slot in range(self.num_envs)}
        ruled = dict(zip(self._ruled, drawn, strict=True))
        if base not in self._stacks:
            self._stacks[base] = StackedEpisodes(base, self._ruled.stop, STEERING, device=self.config.device)
        self._stack.begin(self.tasks | ruled, self._logs())
        self._look()

    def _logs(self) -> dict[int, tuple[DecisionLog, Policy]]:
        """Logs of the new episodes, by slot."""
        if self.config.logs is None:
            return {}
        found: dict[int, tuple[DecisionLog, Policy]] = {}
        for slot in range(self.num_envs):
            while (folder := Path(self.config.logs) / f"episode-{self._logged:05d}").exists():
                self._logged += 1
            log = DecisionLog(folder)
            log.make_folder()
            found[slot] = log, _Outside()
        return found

    def _look(self) -> None:
        under_way = self._stack.under_way
        self._current = [GroupView.of(under_way[slot].observation) for slot in range(self.num_envs)]

    def _seen(self) -> Arrays:
        rows = [padded(view) for view in self._views]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _decisions(self, actions: NDArray[Any]) -> dict[int, Decision]:
        """Decisions for some actions, by slot."""
        whole = actions.shape == (self.num_envs,) and actions.dtype.kind in "iu"
        if not whole or not bool(((actions >= 0) & (actions < ACTIONS)).all()):
            count, last = self.num_envs, ACTIONS - 1
            raise ConfigError(f"Actions must be {count} whole numbers from 0 to {last}; got {shown(actions)}.")
        pairs = zip(self._views, actions.tolist(), strict=True)  # actions on missing groups are no-ops
        return {n: view.decision(act if act < view.actions else NOTHING) for n, (view, act) in enumerate(pairs)}

    def _twin(self, slot: int) -> int:
        """Slot of the baseline run on the same task."""
        return self._ruled[slot // self.config.episodes_per_task]

    def _reward(self, losses: Mapping[int, float], slot: int) -> float:
        """-100 times the log of the held-out loss over the baseline's."""
        own, other = losses[slot], losses[self._twin(slot)]
        if not math.isfinite(own):
            return -FAILED
        return FAILED if not math.isfinite(other) else -100 * math.log(own / other)

    def _info(self, slot: int, losses: Mapping[int, float] | None = None) -> dict[str, Any]:
        """Info dict of a run."""
        episode = self._stack.under_way[slot]
        task, record = episode.task, episode.record
        rate = task.learning_rate * 2 ** (task.offset + record.moved)
        ended = {"held_out_loss": losses[slot], "against": losses[self._twin(slot)]} if losses else {}
        told = {"task": task.id, "kind": task.kind, "step": record.step, "rate": rate, "ranks": episode.applier.ranks}
        return told | ended

    def _infos(self, losses: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
        return [self._info(slot, losses) for slot in range(self.num_envs)]

    def _gathered(self, infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        for slot, info in enumerate(infos):
            gathered = self._add_info(gathered, info, slot)
        return gathered


class FineTuneEnv(gym.Env[Arrays, int], gym.utils.EzPickle):
    """Steer one short fine-tune while it trains.

    ## Description
    A small pretrained transformer is fine-tuned with LoRA under a hard parameter budget, on text, labels or the outputs
    of a teacher. The run starts with the plan of the default policy. Twelve decisions, denser early on, change ranks
    and the learning rate during training. Each task has its own problem: few ranks, a learning rate up to 8 times too
    low or too high, a budget that moves, or a text that changes. Ranks and rate change through the same code as in real
    runs, so a policy trained here can steer one.

    ## Action Space
    `Discrete(28)`: 0 is a no-op; 1 halves the learning rate and 2 doubles it; 3 restores the adapters and optimizer
    state saved when ranks last changed or the rate was last kept or raised, at a quarter of the rate; 4 + g grows group
    g by a rung, taking any excess over the budget from the modules with the lowest signals. A group is a kind of module
    in a third of the depth. `action_masks()` marks the actions with an effect; any other is a no-op.

    ## Observation Space
    | key | space | what |
    |---|---|---|
    | groups | Box(-3, 3, (24 * 22,)) | 22 features of each group, group by group; 0 for missing groups |
    | present | MultiBinary(24) | mask of groups in layers |
    | run | Box(-3, 3, (27,)) | 27 features of the run |

    All features are float32 without a unit: shares, ratios, counts and logs (natural, unless a base is given), clipped
    to -3 and 3. A feature of a group is the mean over its modules of:

    | feature | meaning | range |
    |---|---|---|
    | sensitivity | log component sensitivity per rank, minus its mean over all modules | -3 to 3 |
    | snr | log gradient signal-to-noise, minus its mean | -3 to 3 |
    | relative_change | log norm(delta W) / norm(W), minus its mean | -3 to 3 |
    | gradient_norm | log root mean square norm of the gradient of B, minus its mean | -3 to 3 |
    | importance | log of AdaLoRA's sum of abs(weight * gradient) over B per rank, minus its mean | -3 to 3 |
    | rank | rung over highest rung | 0 to 1 |
    | adapted | 1 if the rank is above 0 | 0 or 1 |
    | relative_depth | layer, from the bottom (0) to the top (1) | 0 to 1 |
    | shape | log(d_out / d_in) | -3 to 3 |
    | rank_cost | log cost of one rank at the moment where it is highest, minus its mean | -3 to 3 |
    | next_rung_cost | log10(cost of the next rung up x modules / budget); -3 at the highest rung | -3 to 3 |
    | drop_saving | the same of what dropping the module would save; -3 if it is not adapted | -3 to 3 |
    | adapt_cost | the same of what adapting it at rank 1 would add; -3 if it is adapted | -3 to 3 |
    | signal_age | decisions since its signals were fresh, over 4 | 0 to 3 |
    | wide | 1 if it has the wide inner side of its layer, as the modules of an MLP do | 0 or 1 |
    | position | place among the modules of its layer, from the first (0) to the last (1) | 0 to 1 |
    | last_move | rungs by which its rank moved last, over 2; 0 if it never did | -3 to 3 |
    | since_move | decisions since then, over 4; 3 if its rank never moved | 0 to 3 |
    | fall | log loss of the interval before that move, less that of the latest interval, times 4 | -3 to 3 |
    | fall_error | standard error of `fall` | 0 to 3 |
    | share | share of all modules that are in the group | 0 to 1 |
    | overflow | share of the limit by which growing the group exceeds it, taken from other modules | 0 to 3 |

    Features of the run; those named `steps_` are 0 at the first decision. The alignment of a step is the cosine between
    it and the next descent direction.

    | feature | meaning | range |
    |---|---|---|
    | progress | share of the run's steps that are done | 0 to 1 |
    | decisions_left | decisions after this one, over 4 | 0 to 3 |
    | budget | the budget over what rank 8 on all modules takes | 0 to 3 |
    | spent | cost of the current ranks over the budget | 0 to 3 |
    | modules | log2 of the number of modules, over 10 | 0 to 3 |
    | depth | share of the layers that are adapted | 0 to 1 |
    | loss | log of training loss since the last decision over the loss of the probe's start | -3 to 3 |
    | trend | change of `loss` since the last decision | -3 to 3 |
    | horizon | log10 of the run's optimizer steps, less 2: 0 for 100 steps | -3 to 3 |
    | rows | log10 of the rows of an optimizer step | 0 to 3 |
    | probe_fall | share of the training loss that the probe took off | -3 to 1 |
    | predicted | log2 of the share of the tokens whose prediction the loss counts, over 4 | -3 to 0 |
    | limit_move | log2 of the limit over that at the decision before | -3 to 3 |
    | steps_alignment | mean alignment since the last decision, times 4 | -3 to 3 |
    | steps_alignment_over_the_first | that mean over the mean of the first steps | -3 to 3 |
    | steps_spread_of_the_alignment | standard deviation of the alignment since the last decision, times 4 | 0 to 3 |
    | steps_evidence | mean alignment over its standard error, over 4 | -3 to 3 |
    | steps_loss | log of the mean loss since the last decision over that of the first steps, times 2 | -3 to 3 |
    | steps_change_of_loss | log of that mean loss over the one at the decision before, times 4 | -3 to 3 |
    | steps_above_the_best | log of that mean loss over the best one before, times 4 | -3 to 3 |
    | steps_noise | standard deviation of the log loss since the last decision, times 4 | 0 to 3 |
    | steps_moved | log2 of the learning rate over the one without the actions, over 3 | -3 to 3 |
    | steps_time | share of the steps that are done | 0 to 1 |
    | steps_steps | log2 of a fifth of the steps that are done, over 4 | -3 to 3 |
    | steps_schedule | the schedule's rate now, as a share of its peak | 0 to 1 |
    | steps_warm-up | 1 while the schedule's rate rises | 0 or 1 |
    | steps_undone | 1 once the run has gone back | 0 or 1 |

    ## Rewards
    At the end, -100 log(held-out loss / held-out loss of the baseline rule on the same task, seed and batches):
    hundredths of the log loss, not clipped. A run with a non-finite loss gets -200. All other rewards are 0; do not
    discount.

    ## Starting State
    Tasks are drawn from the seed; see `rankpilot.env.tasks`.

    ## Episode End
    After the last optimizer step.

    ## Arguments
    Fields of `FineTuneConfig`: `split`, `base`, `regime`, `steps`, `tasks`, `against`, `logs`, `device`.

    ## Version History
    * v8: the feature `overflow`.
    * v7: a run goes back to its copy once at most; half of the tasks with labels have texts as classes.
    * v6: without the actions to take a rung from a group, which no agent took.
    * v5: decisions on ranks and learning rate in one environment, on groups of modules; replaces RankAllocation and
      RunControl.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **settings: Any) -> None:
        gym.utils.EzPickle.__init__(self, render_mode, **settings)
        self._vector = FineTuneVectorEnv(1, None, **settings)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnknownNameError.of("render mode", str(render_mode), self.metadata["render_modes"])
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Start an episode; there are no options."""
        super().reset(seed=seed)
        seen, infos = self._vector.reset(seed=seed, options=options)
        return _row(seen), {name: values[0] for name, values in infos.items() if not name.startswith("_")}

    def step(self, action: int) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """Take an action, and train to the next decision or the end."""
        seen, rewards, infos, over = self._vector.advance(np.asarray([action]))
        return _row(seen), float(rewards[0]), over, False, infos[0]

    def render(self) -> Any:
        """Render the mean rank of each group as a picture, uint8 (height, width, 3); None without a render mode."""
        return None if self.render_mode is None else self._vector.picture(0)

    def action_masks(self) -> NDArray[np.bool_]:
        """Mask of allowed actions, bool (actions,); any other action is a no-op."""
        return np.asarray(self._vector.action_masks()[0])


def _row(arrays: Arrays) -> Arrays:
    return {name: values[0] for name, values in arrays.items()}
