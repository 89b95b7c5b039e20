"""The Gymnasium environment `rankpilot/RankAllocation-v4`: its spaces, its actions, and its episodes."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..common.checks import is_count
from ..data.task import SPLITS, SUITES
from ..decide.observation import (
    MODULE_FEATURE_TABLE,
    MODULE_FEATURES,
    MOST_FEATURE,
    RUN_FEATURE_TABLE,
    RUN_FEATURES,
    Observation,
    feature_table,
)
from ..decide.policy import Decision, decision_from_scores
from ..decide.settings import DecisionSchedule
from ..errors import ConfigError, NonFiniteError, UnknownNameError, UnsupportedError, naming_extras, shown
from ..lora.spec import DEFAULT_RANKS
from ..plan.plan import PLACEMENT, SCORE_BOUND
from .bases import adapted_base
from .episode import (
    AGENT,
    UNIFORM,
    Comparison,
    Episode,
    EpisodeLog,
    EpisodeRecord,
    next_log,
    reference_of,
    rule_losses,
    rule_to_compare_with,
)
from .proxy_finetune import fine_tune_of
from .proxy_task import FineTune, ProxyTask, Reference, TaskStream, check_task, find_tasks

with naming_extras():
    import gymnasium as gym
    from gymnasium import spaces

Actions = Literal["deltas", "scores"]
ACTIONS: tuple[Actions, ...] = get_args(Actions)
"""Forms of actions: a number of rungs for each module, or a score for each module and two numbers that steer the whole
plan. Policies learn in scores: free choices per module did not learn (docs/experiments.md)."""

TOP = len(DEFAULT_RANKS) - 1
"""The highest rung of the rank ladder, and the largest delta in rungs."""


def observation_space(max_modules: int) -> spaces.Dict:
    """Features of modules (flat, module after module) and of the run, and which modules exist."""
    sizes = {"module_features": max_modules * len(MODULE_FEATURES), "run_features": len(RUN_FEATURES)}
    return spaces.Dict(
        {
            **{name: spaces.Box(-MOST_FEATURE, MOST_FEATURE, (size,), np.float32) for name, size in sizes.items()},
            "mask": spaces.MultiBinary(max_modules),
        }
    )


def action_space(actions: str, max_modules: int) -> spaces.MultiDiscrete | spaces.Box:
    """The space of one form of actions: a number of rungs plus TOP for each module, or their scores and the placement.

    Raises:
        UnknownNameError: there is no such form.
    """
    if actions not in ACTIONS:
        raise UnknownNameError.of("form of actions", str(actions), ACTIONS)
    if actions == "deltas":
        return spaces.MultiDiscrete(np.full(max_modules, 2 * TOP + 1))
    return spaces.Box(-SCORE_BOUND, SCORE_BOUND, (max_modules + len(PLACEMENT),), np.float32)


def read_action(actions: str, action: Any, max_modules: int, observation: Observation) -> Decision:
    """The decision that an action asks for; scores out of range are clipped.

    Args:
        actions: its form.
        action: of `action_space`.
        max_modules: padding of observations and actions.
        observation: of the decision.

    Raises:
        ConfigError: the action has another shape, or a value that is not allowed.
    """
    problem, count = observation.problem, len(observation.modules)
    if actions == "deltas":
        deltas = np.asarray(action)
        whole = deltas.dtype.kind in "iu" or (deltas.dtype.kind == "f" and bool((deltas == np.round(deltas)).all()))
        if deltas.shape != (max_modules,) or not whole or not bool(((deltas >= 0) & (deltas <= 2 * TOP)).all()):
            shown = np.array2string(deltas, threshold=12)
            raise ConfigError(f"An action holds {max_modules} whole numbers from 0 to {2 * TOP}; got {shown}.")
        return Decision(problem.ladder.step(problem.ranks, deltas[:count].astype(np.int64) - TOP), np.zeros(count))
    values = np.asarray(action, dtype=np.float64)
    size = max_modules + len(PLACEMENT)
    if values.shape != (size,) or not np.isfinite(values).all():
        shown = np.array2string(values, threshold=12)
        raise ConfigError(f"Scores are {size} finite numbers, rank floor and depth bias last; got {shown}.")
    values = np.clip(values, -SCORE_BOUND, SCORE_BOUND)
    return decision_from_scores(observation, values[:count], values[max_modules:])


class RankAllocationEnv(gym.Env[dict[str, Any], NDArray[Any]], gym.utils.EzPickle):
    """Decide the LoRA rank of every target module of a short fine-tune, a few times, inside a budget of bytes.

    ## Description
    An episode is one fine-tune with real LoRA adapters: of a small pretrained transformer (a `ProxyTask`), or of any
    model, data set and collator of yours (an `OwnTask`). A probe with all modules at rank 1 reads the first signals;
    then ranks are decided before the first step and at the schedule's later points, and training goes on in between.
    Adapters really change size and the optimizer's state is kept.

    `gym.make_vec(..., vectorization_mode="vector_entry_point")` runs many episodes at once on one frozen base
    (`env.vector.StackedVectorEnv`); it is the same decision process, several times faster.

    ## Action Space
    With `actions="deltas"`, `MultiDiscrete([25] * max_modules)`: entry m minus 12 is the number of rungs of the ladder
    0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128 by which module m should move. The wish is clipped to the schedule's
    `max_step` (the first decision may use the whole ladder) and projected onto the budget: never above it, and with
    none of it left where another rung would fit. Entries past the last module are ignored.

    With `actions="scores"`, `Box(-4, 4, (max_modules + 2,), float32)`: a score for each module, which is its log rank
    relative to the others, then a correction of the rank floor, which decides how many modules are adapted, and one of
    the depth bias, which decides how much upper layers come before lower ones. In this form policies learn.

    ## Observation Space
    A `Dict`:

    | key | space | meaning |
    |---|---|---|
    | module_features | Box(-3, 3, (max_modules * 16,), float32) | `observation.MODULE_FEATURES`, module after module |
    | run_features | Box(-3, 3, (12,), float32) | `observation.RUN_FEATURES` |
    | mask | MultiBinary(max_modules) | 1 for modules that exist, 0 for padding |

    Features of each module, all of them relative, none of them a name:

    {module_features}

    Features of the run:

    {run_features}

    ## Rewards
    Nothing until the end. At the end, how much lower the held-out loss is than that of the run that the episode is
    compared with (`against`), as a share of the task's headroom, -3 to 3; less 0.002 for each rung that the modules
    have moved on average after the first decision. The other run has the same seed, batches and budget. The headroom
    is the gap between uniform and the best known allocation, at least 5 % of what uniform gained over the untrained
    base; where no best one is known, a tenth of what uniform gained. Where a rule is compared with, it is the same
    share of what the rule gained. No best one is known of an `OwnTask` without a `reference`, of tasks with
    `task_overrides`, with fresh seeds against uniform and with the option `budget`. There, and above all in short
    episodes, where uniform gains little, small differences easily reach the bounds of -3 and 3.

    ## Starting State
    A task drawn from the suites, or the one given; adapters fresh, probe done.

    ## Episode End
    Terminates after the last interval of training, or at a loss that is not finite, which counts as an improvement of
    -3. Never truncates; `gym.make(..., max_episode_steps=n)` does.

    ## Information
    The same keys at each step:

    | key | meaning |
    |---|---|
    | task | id of the task |
    | step | optimizer steps done |
    | loss | mean training loss of the interval in nats; None at reset and where it is not finite |
    | held_out_loss | at the end, in nats; None before it |
    | uniform_loss | held-out loss of the uniform run, in nats |
    | other_loss | held-out loss of the run that the episode is compared with, in nats; None before the end |
    | cost, limit | cost of the plan (NaN before the first), and the most that it may cost: bytes, or parameters |
    | ranks | rank of each module, a tuple |
    | non_finite | whether the episode ended at a loss that is not finite |
    | improvement, churn | the parts of the reward: 0 before the end; what moves have cost so far |

    ## Rendering
    "ansi": where the episode stands, and the rank of each module, as text. Pictures of a run are made from its log.

    ## Arguments
    * `task`: a fixed task; None draws one at each reset.
    * `suites`: names of the suites to draw from ("planted", "shift"). This and the next two, and `task_overrides`, are
      of drawn tasks: not with `task`.
    * `split`: "train", "validation" or "test".
    * `bases`: draw only tasks on these proxy bases. Stacked episodes share one, their `base`.
    * `schedule`: a `DecisionSchedule`.
    * `max_modules`: padding; None for the most that any of the tasks has.
    * `task_overrides`: fields of `ProxyTask` that every drawn task gets, such as `{"steps": 60}`.
    * `actions`: "deltas" or "scores".
    * `against`: "uniform", or the name of a rule (`rankpilot.decide.rules`), whose run of the task is trained first.
    * `fresh_seeds`: give each drawn task a seed of its own, so that teacher, data and adapters are new. Against
      uniform, the uniform run of each is trained first; else `uniform_loss` stays that of the task as it was.
    * `logs`: a folder; each episode writes the decision log `episode-NNNNN` there, after those that it holds.

    Options of `reset`: `task` overrides the task of one episode; `budget` its budget, as a share of what uniform rank
    8 takes.

    ## Version History
    * v4: the whole reward comes at the end; it can compare with a rule's run; scores and fresh seeds are arguments.
      Shaping, repeated tasks and the option `skip_tasks` are gone.
    * v3: a third of the training tasks count the bytes of a large batch; the cost of the next rung, the
      saving of a drop and the cost of adapting are logarithms.
    * v2: tasks come from suites with fixed splits; the reward is a share of the headroom, and pays for churn; the
      gradient's norm and AdaLoRA's importance are features.
    * v1: the budget is the peak of the whole step, not only what is saved for backward; the last decision may spend
      the bytes of signal buffers; at later decisions a module's own rungs count as cheaper, against churn.
    * v0: first version.

    Raises:
        ConfigError: an argument out of range or of another type, or one that contradicts `task`; an action of the wrong
            shape or range, or a step after the end; a held-out loss that is not finite before training.
        UnknownNameError: a name that is not among the allowed ones.
        UnsupportedError: a render mode that is not among them.
        RunFolderError: no folder can be made in `logs`.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  (declared so by Gymnasium)

    def __init__(
        self,
        task: ProxyTask | FineTune | None = None,
        suites: tuple[str, ...] = SUITES,
        split: str = "train",
        bases: tuple[str, ...] | None = None,
        schedule: DecisionSchedule | None = None,
        max_modules: int | None = None,
        task_overrides: dict[str, Any] | None = None,
        actions: Actions = "deltas",
        against: str = UNIFORM,
        fresh_seeds: bool = False,
        render_mode: str | None = None,
        logs: str | None = None,
    ) -> None:
        gym.utils.EzPickle.__init__(
            self, task, suites, split, bases, schedule, max_modules, task_overrides, actions, against, fresh_seeds,
            render_mode, logs,
        )  # fmt: skip
        self.tasks: tuple[ProxyTask | FineTune, ...] = environment_tasks(
            task, suites, split, bases, task_overrides, fresh_seeds=fresh_seeds, against=against
        )
        if render_mode not in (None, *self.metadata["render_modes"]):
            # A TypeError: at it, Stable-Baselines3, which asks for pictures first, makes the environment without.
            raise UnsupportedError(f"There is no render mode {shown(render_mode)}; allowed: 'ansi', None.")
        if schedule is not None and not isinstance(schedule, DecisionSchedule):
            raise ConfigError(f"schedule is a rankpilot.DecisionSchedule or None; got {schedule!r}.")
        if logs is not None and not isinstance(logs, str | Path):
            raise ConfigError(f"logs is a folder or None; got {shown(logs)}.")
        modules = most_modules(self.tasks) if task is None else len(fine_tune_of(task).adapted()[1])
        if max_modules is not None and not (is_count(max_modules) and max_modules >= modules):
            raise ConfigError(f"max_modules is at least {modules}, a whole number; got {shown(max_modules)}.")
        self.max_modules: int = modules if max_modules is None else max_modules
        self._against = against if rule_to_compare_with(against) else None
        self.actions = actions
        self.schedule: DecisionSchedule = schedule or DecisionSchedule()
        self.render_mode = render_mode
        self.observation_space = observation_space(self.max_modules)
        self.action_space = action_space(actions, self.max_modules)
        self._fresh_seeds = fresh_seeds
        self._logs = None if logs is None else Path(logs)
        self._log: EpisodeLog | None = None
        self._stream: TaskStream | None = None
        self._episode: Episode | None = None
        self._record: EpisodeRecord | None = None
        self._other: tuple[float, float] | None = None

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
        if self._stream is None or seed is not None:
            self._stream = TaskStream(self.tasks, self.np_random, fresh_seeds=self._fresh_seeds)
        fine_tune = fine_tune_of(self._stream.take(options))
        modules = len(fine_tune.adapted()[1])
        if modules > self.max_modules:
            raise ConfigError(
                f"The task {fine_tune.id} has {modules} modules, and this environment {self.max_modules}: make it with "
                f"max_modules={modules}."
            )
        self._episode = None  # so that nothing of it is kept aside
        # What the episode is compared with comes before it: both train the same adapters.
        reference = reference_of(fine_tune, self.schedule)
        self._other = rule_losses(fine_tune, self.schedule, self._against) if self._against else None
        self._episode = Episode(fine_tune, self.schedule)
        first = self._episode.observe()
        self._record = EpisodeRecord(fine_tune.id, reference, self._episode.applier, first)
        self._log = None if self._logs is None else next_log(self._logs, AGENT, fine_tune.id)
        return self._arrays(), self._record.info()

    def step(self, action: NDArray[Any]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one decision and train until the next one or the end."""
        decision = read_action(self.actions, action, self.max_modules, self.observation)
        episode, record = self._episode, self._record
        if episode is None or record is None:
            raise ConfigError("No episode is under way: call reset() first.")
        seen, step, last_loss = record.observation, episode.step, record.loss
        plan = episode.apply(decision)
        if self._log is not None:
            self._log.append(episode.applier, seen, decision, plan, step=step, loss=last_loss)
        loss: float | None = None
        try:
            loss = episode.advance()
        except NonFiniteError:
            terminated = True
        else:
            terminated = episode.step == episode.task.steps
        record.advance(episode.step, loss, seen if terminated else episode.observe(loss))
        reward = 0.0
        if terminated:
            held_out_loss = None if loss is None else episode.held_out_loss()
            reward = record.end(held_out_loss, self._comparison(record.reference, held_out_loss))
            self._episode = None
        return self._arrays(), reward, terminated, False, record.info()

    def _comparison(self, reference: Reference, held_out_loss: float | None) -> Comparison:
        """What the episode that has ended is compared with."""
        if self._other is None:
            return Comparison.with_uniform(reference)
        sound = [] if held_out_loss is None or not math.isfinite(held_out_loss) else [held_out_loss]
        return Comparison.with_run(*self._other, reference, sound)

    def _arrays(self) -> dict[str, Any]:
        return self.observation.padded(self.max_modules)

    def render(self) -> str | None:
        """The episode so far as text, with `render_mode="ansi"`."""
        return self._record.describe() if self._record and self.render_mode else None


for _placeholder, _features in (("module_features", MODULE_FEATURE_TABLE), ("run_features", RUN_FEATURE_TABLE)):
    # Without a docstring (python -OO) there is nothing to fill in.
    RankAllocationEnv.__doc__ = (RankAllocationEnv.__doc__ or "").replace(
        f"{{{_placeholder}}}", feature_table(_features)
    )


def environment_tasks(
    task: ProxyTask | FineTune | None,
    suites: Sequence[str],
    split: str,
    bases: Sequence[str] | None,
    overrides: dict[str, Any] | None,
    *,
    fresh_seeds: bool,
    against: str,
) -> tuple[ProxyTask | FineTune, ...]:
    """The tasks that an environment draws from; see its arguments.

    Raises:
        UnknownNameError: no such suite, split or base.
        ConfigError: there are none, or one that cannot have a fresh seed; an argument of another type, or one that is
            of drawn tasks beside a fixed one.
    """
    _check_names(suites, split, bases)
    check_task(task)
    if task is not None:
        _check_alone(suites, split, bases, overrides)
    tasks: tuple[ProxyTask | FineTune, ...] = find_tasks(suites, split, bases, overrides) if task is None else (task,)
    if not fresh_seeds:
        return tasks
    if not all(isinstance(each, ProxyTask) for each in tasks):
        raise ConfigError("Only proxy tasks can have fresh seeds; make an OwnTask with the seed that you want.")
    proxies = tuple(each for each in tasks if isinstance(each, ProxyTask))
    return tuple(replace(each, reference=None) for each in proxies) if against == UNIFORM else proxies


def _check_names(suites: object, split: object, bases: object) -> None:
    """Raise ConfigError for names of another type."""
    for name, given, example in (
        ("suites", suites, SUITES[0]),
        ("bases", () if bases is None else bases, ProxyTask.base),
    ):
        if isinstance(given, str) or not isinstance(given, Collection) or not all(isinstance(n, str) for n in given):
            example = given if isinstance(given, str) else example
            raise ConfigError(f"{name} is a tuple of names, such as ({example!r},); got {shown(given)}.")
    if not isinstance(split, str):
        raise ConfigError(f"split is one of {SPLITS}; got {shown(split)}.")


def _check_alone(
    suites: Sequence[str], split: str, bases: Sequence[str] | None, overrides: dict[str, Any] | None
) -> None:
    """Raise ConfigError for arguments about drawn tasks, which would have no effect beside a fixed task."""
    given = {"suites": tuple(suites), "split": split, "bases": bases, "task_overrides": overrides}
    usual = {"suites": SUITES, "split": SPLITS[0], "bases": None, "task_overrides": None}
    without = [f"{name}={shown(value)}" for name, value in given.items() if value is not None and value != usual[name]]
    if without:
        raise ConfigError(
            f"With a fixed task no task is drawn, so {', '.join(without)} would have no effect. Leave out either these "
            "or the task; a ProxyTask gets other fields by `dataclasses.replace`."
        )


def most_modules(tasks: Sequence[ProxyTask | FineTune]) -> int:
    """The most target modules that the base of any of these tasks has."""
    return max(len(adapted_base(name)[1]) for name in {task.base for task in tasks if isinstance(task, ProxyTask)})
