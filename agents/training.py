"""Train a policy with PPO on proxy fine-tunes (Stable-Baselines3).

First, if asked, the network learns scores from tasks whose best allocation is known. Then, each iteration, all worker
processes run a round of episodes on fresh tasks; PPO (Schulman et al., 2017, arXiv 1707.06347) updates the network on
them, with advantages relative to the group of each task. A checkpoint after the start and after each iteration makes
the run resumable: weights, optimiser, random state and tasks go on as if nothing had happened. The policy that did best
on the validation tasks is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from ..devices import find_device
from ..env.fresh import vary
from ..env.suites import VERSION, evenly, find_tasks
from ..env.task_data import check_texts
from ..env.tasks import ProxyTask, adapted_base
from ..errors import RunFolderError
from ..files import append_json_line, atomic_path, read_json, read_json_lines, write_json, write_text
from .config import TrainConfig, as_json
from .critic_fit import fit_critics
from .learned import LearnedPolicy
from .network import RankNetwork
from .plan_critic import PlanCritics
from .policy_file import CARD, SCHEMA, save_policy
from .rounds_vec_env import Arrays, RoundsConfig, RoundsVecEnv
from .rules import find_rule
from .run_folder import open_run
from .sb3_policy import GroupRolloutBuffer, RankPolicy
from .trials import RUNS, Stack, lessons_of, run_trials
from .warm_start import warm_start

CHECKPOINT, PROGRESS, TENSORBOARD = "checkpoint.pt", "progress.jsonl", "tensorboard"

WARM_START = "warm_start"
"""Folder, inside a run's, of the policy before PPO."""

WARM_ROUND, TRIAL_ROUND = 1_000_000, 2_000_000
"""Tasks of the warm start and of the trials are drawn as those of rounds from these on."""

TRIALS, SUMMARY = "trials", "summary.json"
"""Folder, inside a run's, of what the plan critics learn from, and what came of it."""

START = "heur3"
"""The rule that an untrained network is, and that episodes are measured against."""


@dataclass(frozen=True)
class Stage:
    """How far training has come, for progress bars.

    Attributes:
        name: "warm start", "training", "validation", "trials" or "plan critics".
        done: iterations done; of trials stacks of runs.
        total: iterations in all; of trials stacks.
    """

    name: str
    done: int
    total: int


OnStage = Callable[[Stage], None]


def greedy(policy: RankPolicy) -> Callable[[Arrays], Any]:
    """Mean actions."""

    @torch.no_grad()
    def act(arrays: Arrays) -> Any:
        return policy.get_distribution(policy.obs_to_tensor(arrays)[0]).mode().cpu().numpy()

    return act


class _Validation:
    """Measures the policy on validation tasks, and keeps the best one.

    Attributes:
        best: state of the best network so far, and its score.
    """

    def __init__(self, tasks: Sequence[ProxyTask], envs: RoundsVecEnv) -> None:
        self._tasks, self._envs = tasks, envs
        self._start: list[float] = []
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None

    def measure(self, policy: RankPolicy) -> dict[str, float]:
        """Fly the tasks; improvements over the untrained policy and over uniform, in shares of the headroom."""
        losses = self._envs.play(self._tasks, greedy(policy))
        self._start = self._start or losses
        headrooms = [task.reference.headroom for task in self._tasks if task.reference]
        uniform = [task.reference.uniform for task in self._tasks if task.reference]
        row = {}
        for name, baseline in (("over_start", self._start), ("over_uniform", uniform)):
            row[name] = float(np.mean([_share(*each) for each in zip(baseline, losses, headrooms, strict=True)]))
        if self.best is None or row["over_start"] > self.best[0]:
            state = {name: value.clone() for name, value in policy.network.state_dict().items()}
            self.best = row["over_start"], state
        return row

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"start": self._start, "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._start, self.best = state["start"], state["best"]


def _share(before: float, after: float, headroom: float) -> float:
    """How much lower a loss is, in shares of the headroom, -1 to 1; a run that failed (NaN) counts as the worst."""
    if math.isfinite(before) and math.isfinite(after):
        return min(max((before - after) / headroom, -1.0), 1.0)
    return float(math.isfinite(after)) - float(math.isfinite(before))


class _Progress(BaseCallback):
    """After each update: a row of progress, validation if it is due, and a checkpoint."""

    def __init__(self, folder: Path, config: TrainConfig, validation: _Validation, report: OnStage) -> None:
        super().__init__()
        self._folder, self._config, self._validation, self.report = folder, config, validation, report
        self.iteration = 0
        self._returns: Any = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        """The update of the iteration before is done."""
        self._save()

    def _on_rollout_end(self) -> None:
        self._returns = self.locals["rollout_buffer"].rewards.sum(axis=0)

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        if self._returns is None:
            return
        returns, self._returns = self._returns, None
        self.iteration += 1
        assert isinstance(self.model, PPO)
        assert isinstance(self.training_env, RoundsVecEnv)
        network: RankNetwork = self.model.policy.network  # type: ignore[assignment]
        envs = self.training_env
        groups = returns.reshape(-1, self._config.group)
        row = {
            "iteration": self.iteration,
            "episodes": int(returns.size),
            "return_mean": float(returns.mean()),
            "return_p10": float(np.quantile(returns, 0.1)),
            "return_p90": float(np.quantile(returns, 0.9)),
            "spread_in_groups": float(groups.std(axis=1).mean()),
            "tasks": [task.id for s in range(self._config.stacks) for task in envs.config.draw(self.iteration - 1, s)],
            "returns": [round(float(value), 3) for value in groups.mean(axis=1)],
            "score_std": float(network.log_std[0].exp().detach()),
            "floor_std": float(network.log_std[1].exp().detach()),
            "tilt_std": float(network.log_std[2].exp().detach()),
            **{
                key.removeprefix("train/"): float(value)
                for key, value in self.logger.name_to_value.items()
                if key in ("train/approx_kl", "train/clip_fraction", "train/loss", "train/value_loss")
            },
        }
        for key in ("return_mean", "spread_in_groups"):
            self.logger.record(f"rollout/{key}", row[key])
        if self.iteration % self._config.validate_every == 0 or self.iteration == self._config.iterations:
            row |= self.validate()
        append_json_line(self._folder / PROGRESS, row)
        _write_checkpoint(self._folder / CHECKPOINT, self.model, self.iteration, self._validation)
        self.report(Stage("training", self.iteration, self._config.iterations))

    def validate(self) -> dict[str, float]:
        """Measure the policy, if there are validation tasks."""
        if not self._config.validation_tasks:
            return {}
        assert isinstance(self.model, PPO)
        assert isinstance(self.model.policy, RankPolicy)
        self.report(Stage("validation", self.iteration, self._config.iterations))
        found = self._validation.measure(self.model.policy)
        for key, value in found.items():
            self.logger.record(f"validation/{key}", value)
        return {f"validation_{key}": value for key, value in found.items()}


def _write_checkpoint(path: Path, model: PPO, iteration: int, validation: _Validation) -> None:
    """Tensors and numbers only, so that reading it back never unpickles code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (SB3 shuffles with it)
    state = {
        "schema": SCHEMA,
        "iteration": iteration,
        "timesteps": model.num_timesteps,
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "validation": validation.state(),
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            gauss,
        ],
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, model: PPO, validation: _Validation) -> int:
    """Go on from a checkpoint; returns the iterations done."""
    try:
        state = torch.load(path, weights_only=True)
        if state.get("schema") != SCHEMA:
            raise ValueError("it was written by another version of rankpilot")
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        model.num_timesteps = int(state["timesteps"])
        validation.restore(state["validation"])
        torch.set_rng_state(state["torch_rng"])
        kind, keys, position, has_gauss, gauss = state["numpy_rng"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        return int(state["iteration"])
    except Exception as error:  # whatever torch makes of a damaged file
        raise RunFolderError(f"The checkpoint {path} cannot be read ({error}). Delete it to start over.") from error


def is_finished(folder: Path) -> bool:
    """Whether a training run has written its policy."""
    return (folder / CARD).exists()


def train(config: TrainConfig, folder: Path, *, resume: bool = False, on_stage: OnStage | None = None) -> LearnedPolicy:
    """Train a policy; the run's progress and checkpoint are in `folder`.

    Args:
        config: how.
        folder: the run's folder.
        resume: go on with an interrupted run.
        on_stage: called as training goes on.

    Returns:
        The actor that did best on the validation tasks, the last one without any, and the plan critics, if trials were
        asked for. `finish` writes it.

    Raises:
        RunFolderError: see `open_run`.
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks, or no such device.
        AssetError: a text is not at hand.
    """
    rounds = rounds_of(config)
    validation_tasks = evenly(_tasks(config.suites, "validation", config), config.validation_tasks)
    everything = [*(task for suite in rounds.templates for task in suite), *validation_tasks]
    check_texts(everything)
    open_run(folder, as_json(config), resume=resume)
    report = on_stage or (lambda stage: None)
    envs = RoundsVecEnv(rounds, find_rule(START), max(len(adapted_base(task.base)[1]) for task in everything))
    try:
        model = _new_model(config, envs, folder)
        validation = _Validation(validation_tasks, envs)
        progress = _Progress(folder, config, validation, report)
        begun = (folder / CHECKPOINT).exists()
        if begun:
            progress.iteration = _restore(folder / CHECKPOINT, model, validation)
        # Progress is written before the checkpoint: a run that was killed in between repeats an iteration.
        rows = [row for row in read_json_lines(folder / PROGRESS) if begun and row["iteration"] <= progress.iteration]
        write_text(folder / PROGRESS, "".join(json.dumps(row) + "\n" for row in rows))
        if not begun:
            _begin(model, envs, config, progress, folder)
            _write_checkpoint(folder / CHECKPOINT, model, 0, validation)
        network: RankNetwork = model.policy.network  # type: ignore[assignment]
        network.freeze_estimate()
        if progress.iteration < config.iterations:
            envs.round = progress.iteration
            model._last_obs = envs.reset()  # type: ignore[assignment]
            model._last_episode_starts = np.ones(envs.num_envs, dtype=bool)
            # A checkpoint holds the random state of the moment after its update, so nothing may be drawn before.
            rest = (config.iterations - progress.iteration) * envs.decisions * envs.num_envs
            model.learn(rest, callback=progress, reset_num_timesteps=False, tb_log_name="ppo")
    finally:
        envs.close()
    if validation.best:
        network.load_state_dict(validation.best[1])
    actor = LearnedPolicy(folder.name, network.eval())
    return replace(actor, critics=_judges(actor, rounds, config, folder, report)) if config.trial_tasks else actor


def _judges(
    actor: LearnedPolicy, rounds: RoundsConfig, config: TrainConfig, folder: Path, report: OnStage
) -> PlanCritics:
    """Plan critics, from trials of fresh tasks."""
    draws = trial_draws(rounds, config.trial_tasks)
    stacks = [
        Stack(number, number % (len(draws) // 2), tasks, actor, config.schedule, config.seed, rounds.device)
        for number, tasks in enumerate(draws)
    ]
    trials = run_trials(
        stacks,
        folder / TRIALS,
        workers=config.worker_count,
        on_progress=lambda done, total: report(Stage("trials", done, total)),
    )
    lessons = lessons_of(list(trials))
    report(Stage("plan critics", len(stacks), len(stacks)))
    critics = PlanCritics()
    facts = fit_critics(critics, lessons, seed=config.seed, workers=config.worker_count)
    write_json(folder / TRIALS / SUMMARY, {"runs": len(stacks) * rounds.groups * RUNS} | facts)
    return critics


def rounds_of(config: TrainConfig) -> RoundsConfig:
    """What rounds of a training run are drawn from, and where they are flown.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks, or no such device.
    """
    return RoundsConfig(
        tuple(_tasks((suite,), "train", config) for suite in config.suites),
        config.stacks,
        config.groups,
        config.group,
        config.schedule,
        config.seed,
        config.worker_count,
        str(find_device(config.device)),
    )


def trial_draws(rounds: RoundsConfig, tasks: int) -> list[tuple[ProxyTask, ...]]:
    """The fresh tasks of each stack of trials, in the order in which they are flown; at least so many in all.

    The first half are like those of rounds; the second half are the same ones varied, see `vary`.
    """
    numbers = range(TRIAL_ROUND, TRIAL_ROUND - (-tasks // (2 * rounds.groups)))
    plain = sorted((tuple(rounds.draw(number, 0)) for number in numbers), key=_base)  # bases take long to load
    suites = {(task.kind, task.base): suite for suite in rounds.templates for task in suite}
    return plain + [tuple(vary(task, suites[task.kind, task.base]) for task in drawn) for drawn in plain]


def _base(tasks: Sequence[ProxyTask]) -> str:
    return tasks[0].base


def _tasks(suites: Sequence[str], split: str, config: TrainConfig) -> tuple[ProxyTask, ...]:
    """Tasks of a split; with other steps, they keep their references as a measure of headroom."""
    tasks = find_tasks(suites, split, config.bases or None)
    return tuple(replace(task, **config.task_overrides) for task in tasks)


def _begin(model: PPO, envs: RoundsVecEnv, config: TrainConfig, progress: _Progress, folder: Path) -> None:
    """Measure the untrained policy, teach it scores, measure again, and keep it to compare with."""
    policy = model.policy
    assert isinstance(policy, RankPolicy)
    model._setup_learn(0, progress, reset_num_timesteps=False)
    progress.init_callback(model)
    row: dict[str, Any] = {"iteration": 0} | progress.validate()
    if config.warm_tasks:
        progress.report(Stage("warm start", 0, config.iterations))
        rounds = range(WARM_ROUND, WARM_ROUND + -(-config.warm_tasks // config.groups))
        tasks = [task for round_ in rounds for task in envs.config.draw(round_, 0)][: config.warm_tasks]
        row |= {f"warm_{key}": value for key, value in warm_start(policy, envs, tasks, seed=config.seed).items()}
        row |= {f"warm_{key}": value for key, value in progress.validate().items()}
        save_policy(
            folder / WARM_START, policy.network, config.schedule, {"name": WARM_START, "training": as_json(config)}
        )
    append_json_line(folder / PROGRESS, row)


def _new_model(config: TrainConfig, envs: RoundsVecEnv, folder: Path) -> PPO:
    return PPO(
        RankPolicy,
        envs,
        n_steps=envs.decisions,
        batch_size=envs.decisions * envs.num_envs,
        n_epochs=config.epochs,
        learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0),
        clip_range=config.clip_range,
        target_kl=config.target_kl,
        gamma=1.0,
        gae_lambda=1.0,
        vf_coef=0.1,
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={"group": config.group},
        policy_kwargs={"network": config.network},
        tensorboard_log=str(folder / TENSORBOARD) if find_spec("tensorboard") else None,
        seed=config.seed,
        device="cpu",
    )


def finish(folder: Path, policy: LearnedPolicy, config: TrainConfig, results: dict[str, Any] | None = None) -> Path:
    """Write the trained policy and its card into the run's folder; the run then counts as finished."""
    rows = read_json_lines(folder / PROGRESS)
    provenance = {
        "name": folder.name,
        "training": as_json(config),
        "suite_version": VERSION,
        "episodes": sum(row.get("episodes", 0) for row in rows),
        "start": rows[0],
        "trials": read_json(folder / TRIALS / SUMMARY) if policy.critics else {},
        "validation": results or {},
    }
    return save_policy(folder, policy.network, config.schedule, provenance, policy.critics)
