"""Trains a policy with PPO on proxy fine-tunes (Stable-Baselines3).

First, if asked, comes the warm start: on planted tasks the oracle knows what each module is worth, and the network
learns to tell that from what a policy sees, at every decision of runs that it explores. Where the worth is not known,
its scores stay those of the rule. What signals cannot tell averages out, so modules that look alike keep like scores.

Then, each iteration, all worker processes run a round of episodes on fresh tasks; PPO (Schulman et al., 2017, arXiv
1707.06347) updates the network on them, with advantages relative to the group of each task. The policy that did best on
the validation tasks is kept.

A checkpoint after the warm start and after each iteration makes the run resumable: weights, optimizer, random state and
tasks go on as if nothing had happened. Checkpoints hold tensors and numbers only, so reading one never unpickles code.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..agents.learned_policy import LearnedPolicy
from ..agents.networks import RankNetwork
from ..agents.policy_file import CARD, SCHEMA, save_policy
from ..common import files
from ..common.arrays import Arrays, FloatArray, IntArray
from ..common.devices import find_device
from ..env.bases import adapted_base
from ..env.episode import Comparison
from ..env.proxy_finetune import check_texts
from ..env.proxy_task import VERSION, ProxyTask
from ..env.vector import StackedConfig
from ..errors import DataError, RunFolderError, first_line, naming_extras
from .config import TrainConfig
from .task_sampling import FreshTasks, fresh_tasks, validation_tasks, warm_draws
from .vec_env import GroupRolloutBuffer, ProxyVecEnv, RankPolicy

with naming_extras():
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
    from stable_baselines3.common.utils import LinearSchedule

PROGRESS, CHECKPOINT = "progress.jsonl", "checkpoint.pt"

BOUND = 1.0
"""Improvements on one task count from minus to plus this, so that no task alone decides which network is best."""


@dataclass(frozen=True)
class Stage:
    """How far training has come, for progress bars.

    Attributes:
        name: "warm start", "training" or "validation".
        done: iterations done; of the warm start tasks.
        total: of the same, in all.
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


class Validation:
    """Measures the policy on validation tasks, and keeps the best one.

    Args:
        tasks: that it runs.
        envs: that run them.
        of_suite: whether runs have the suite's steps, after which the losses of uniform ranks are known.

    Attributes:
        best: state of the best network so far, and its score.
    """

    def __init__(self, tasks: Sequence[ProxyTask], envs: ProxyVecEnv, *, of_suite: bool = True) -> None:
        self._tasks, self._envs, self._of_suite = tasks, envs, of_suite
        self._start: list[float] = []
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None

    def measure(self, policy: RankPolicy) -> dict[str, float]:
        """Run the tasks; improvements over the untrained policy and over uniform, in shares of the headroom."""
        losses = self._envs.play(self._tasks, greedy(policy))
        self._start = self._start or losses
        headrooms = [task.reference.headroom for task in self._tasks if task.reference]
        uniform = [task.reference.uniform for task in self._tasks if task.reference]
        row = {}
        baselines = {"over_start": self._start} | ({"over_uniform": uniform} if self._of_suite else {})
        for name, baseline in baselines.items():
            comparisons = [Comparison(*each) for each in zip(baseline, headrooms, strict=True)]
            shares = [other.improvement(loss, BOUND) for other, loss in zip(comparisons, losses, strict=True)]
            row[name] = float(np.mean(shares))
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


class PPOProgress(BaseCallback):
    """After each update: a row of progress, validation if it is due, and a checkpoint."""

    report: OnStage

    def __init__(self, folder: Path, config: TrainConfig, validation: Validation, report: OnStage) -> None:
        super().__init__()
        self._folder, self._config, self._validation, self.report = folder, config, validation, report
        self.iteration: int = 0
        self._returns: Any = None
        self._ranks: list[IntArray] = []

    def _on_step(self) -> bool:
        self._ranks = [np.array(info["ranks"]) for info in self.locals["infos"]]
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
        assert isinstance(self.training_env, ProxyVecEnv)
        network: RankNetwork = self.model.policy.network  # type: ignore[assignment]
        envs = self.training_env
        groups = returns.reshape(-1, self._config.episodes_per_task)
        row = {
            "iteration": self.iteration,
            "episodes": int(returns.size),
            "return_mean": float(returns.mean()),
            "return_p10": float(np.quantile(returns, 0.1)),
            "return_p90": float(np.quantile(returns, 0.9)),
            "spread_in_groups": float(groups.std(axis=1).mean()),
            "tasks": [task.id for s in range(self._config.stacks) for task in envs.fresh.draw(self.iteration - 1, s)],
            "returns": [round(float(value), 3) for value in groups.mean(axis=1)],
            "adapted": float(np.mean([(ranks > 0).mean() for ranks in self._ranks])),
            "mean_rank": float(np.mean([ranks.mean() for ranks in self._ranks])),
            "score_std": float(network.log_std[0].exp().detach()),
            "rank_floor_std": float(network.log_std[1].exp().detach()),
            "depth_bias_std": float(network.log_std[2].exp().detach()),
            **{
                key.removeprefix("train/"): float(value)
                for key, value in self.logger.name_to_value.items()
                if key in ("train/approx_kl", "train/clip_fraction", "train/loss", "train/value_loss")
            },
        }
        for key in ("return_mean", "spread_in_groups", "adapted", "mean_rank"):
            self.logger.record(f"rollout/{key}", row[key])
        if self.iteration % self._config.validate_every == 0 or self.iteration == self._config.iterations:
            row |= self.validate()
        files.append_json_line(self._folder / PROGRESS, row)
        write_checkpoint(self._folder / CHECKPOINT, self.model, self.iteration, self._validation)
        self.report(Stage("training", self.iteration, self._config.iterations))

    def validate(self) -> dict[str, float]:
        """Measure the policy, if there are validation tasks."""
        if not self._config.validation_tasks:
            return {}
        assert isinstance(self.model, PPO)
        assert isinstance(self.model.policy, RankPolicy)
        self.report(Stage("validation", self.iteration, self._config.iterations))
        shares = self._validation.measure(self.model.policy)
        for key, value in shares.items():
            self.logger.record(f"validation/{key}", value)
        if "over_uniform" in shares:
            self.logger.record("validation/regret", 1 - shares["over_uniform"])
        return {f"validation_{key}": value for key, value in shares.items()}


def write_checkpoint(path: Path, model: PPO, iteration: int, validation: Validation) -> None:
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
    with files.atomic_path(path) as temporary:
        torch.save(state, temporary)


def restore(path: Path, model: PPO, validation: Validation) -> int:
    """Go on from a checkpoint; returns the iterations done."""
    try:
        state = files.load_archive(path)
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


SPAN = 4.0
"""Worths lower than the largest by more than this, in log, count alike: their order is noise."""

EXPONENT = 0.5
"""Rank goes as this power of the worth: each further rank of a module captures less."""

PASSES, BATCH, RATE = 30, 64, 2e-3


def target_scores(worth: FloatArray) -> FloatArray:
    """Scores that a module's worth asks for, centred, (modules,).

    Args:
        worth: in nats, at least 0, (modules,).
    """
    logs = np.log(np.maximum(worth, 1e-12))
    scores = EXPONENT * np.maximum(logs - logs.max(), -SPAN)
    return np.asarray(scores - scores.mean())


@dataclass
class ScoreDataset:
    """What was seen and what the scores should have been; one row an observation.

    Attributes:
        rows: the arrays of the observations.
        targets: scores, padded with zeros.
        known: whether the worth is known; else the rule's scores are the target.
    """

    rows: list[Arrays] = field(default_factory=list)
    targets: list[FloatArray] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)

    def note(self, arrays: Arrays, worths: Sequence[FloatArray | None]) -> None:
        """Take in the observations of a stack."""
        for row, worth in enumerate(worths):
            target = np.zeros(arrays["mask"].shape[1])
            if worth is not None:
                target[: len(worth)] = target_scores(worth)
            self.rows.append({key: value[row] for key, value in arrays.items()})
            self.targets.append(target)
            self.known.append(worth is not None)


def explore(policy: RankPolicy) -> Callable[[Arrays], NDArray[np.float32]]:
    """Actions drawn from the policy's distribution."""

    @torch.no_grad()
    def act(arrays: Arrays) -> NDArray[np.float32]:
        actions: NDArray[np.float32] = policy(policy.obs_to_tensor(arrays)[0])[0].cpu().numpy()
        return actions

    return act


def warm_start(
    policy: RankPolicy,
    envs: ProxyVecEnv,
    tasks: Sequence[ProxyTask],
    *,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Teach a policy's network the worth of modules. The placement has no part in it and stays that of the rule.

    Args:
        policy: untrained; it explores and is taught.
        envs: runs the tasks.
        tasks: planted ones, and others.
        seed: of the order of the dataset.
        on_progress: called with the tasks that are done and all of them, now and then.

    Returns:
        Mean squared error of the scores where the worth is known: "before" and "after", and "constant" for equal ones.
        Nothing where no task is planted: there is nothing to learn then.
    """
    if not any(task.kind == "planted" for task in tasks):
        return {}
    dataset = ScoreDataset()
    envs.play(tasks, explore(policy), note=dataset.note, on_progress=on_progress)
    keys = dataset.rows[0].keys()
    seen = {key: torch.from_numpy(np.stack([row[key] for row in dataset.rows])) for key in keys}
    known = torch.tensor(dataset.known)
    with torch.no_grad():
        rule = policy.get_distribution(seen).mean[:, : seen["mask"].shape[1]]
    targets = torch.where(known[:, None], torch.from_numpy(np.stack(dataset.targets)).float(), rule)
    weights = seen["mask"].float() / seen["mask"].sum(dim=1, keepdim=True)

    def errors(rows: torch.Tensor) -> torch.Tensor:
        mean = policy.get_distribution({key: value[rows] for key, value in seen.items()}).mean
        difference = mean[:, : targets.shape[1]] - targets[rows]
        # Only differences of scores matter.
        centred = difference - (difference * weights[rows]).sum(dim=1, keepdim=True)
        return (centred.square() * weights[rows]).sum(dim=1)

    everything = torch.arange(len(known))
    with torch.no_grad():
        before = errors(everything)[known].mean()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=RATE, weight_decay=1e-2)
    for _ in range(PASSES):
        order = torch.randperm(len(known), generator=generator)
        for rows in torch.split(order, BATCH):
            optimizer.zero_grad()
            errors(rows).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        after = errors(everything)[known].mean()
    constant = (targets.square() * weights).sum(dim=1)[known].mean()
    return {"before": float(before), "after": float(after), "constant": float(constant)}


TENSORBOARD = "tensorboard/ppo_1"

START = "signal-mean"
"""The rule that an untrained network is, and that episodes are measured against."""


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
        The actor that did best on the validation tasks, or the last one without any. `finish` writes it.

    Raises:
        RunFolderError: see `open_run`.
        UnknownNameError: no such suite or base.
        ConfigError: no such tasks, or no such device.
        AssetError: a text is not at hand.
    """
    fresh = fresh_tasks(config)
    validation = validation_tasks(config)
    everything = [*(task for suite in fresh.templates for task in suite), *validation]
    check_texts(everything)
    modules = max(len(adapted_base(task.base)[1]) for task in everything)
    stack = StackedConfig(
        config.tasks_per_stack * config.episodes_per_task,
        episodes_per_task=config.episodes_per_task,
        actions="scores",
        against=START,
        schedule=config.schedule,
        max_modules=modules,
        device=str(find_device(config.device)),
    )
    with files.open_run(folder, files.as_json(TrainConfig, config), resume=resume):
        return _train(config, folder, fresh, stack, validation, on_stage or (lambda stage: None))


def _train(
    config: TrainConfig,
    folder: Path,
    fresh: FreshTasks,
    stack: StackedConfig,
    validation: tuple[ProxyTask, ...],
    report: OnStage,
) -> LearnedPolicy:
    """Train in a folder that is this run's alone.

    Args:
        config: how.
        folder: the run's folder.
        fresh: what tasks are drawn from.
        stack: the episodes of a stack.
        validation: tasks on which the policy is measured.
        report: called as training goes on.
    """
    envs = ProxyVecEnv(fresh, stack, stacks=config.stacks, workers=config.worker_count)
    with ExitStack() as ending:
        ending.callback(envs.close)
        model = _new_model(config, envs, folder)
        ending.callback(model.logger.close)  # TensorBoard's file and its thread
        measured = Validation(validation, envs, of_suite=config.task_steps is None)
        progress = PPOProgress(folder, config, measured, report)
        begun = (folder / CHECKPOINT).exists()
        if begun:
            progress.iteration = restore(folder / CHECKPOINT, model, measured)
        rows = _progress_until(progress.iteration, folder / PROGRESS) if begun else []
        files.write_text(folder / PROGRESS, "".join(json.dumps(row) + "\n" for row in rows))
        if not begun:
            _begin(model, envs, config, progress, folder)
            write_checkpoint(folder / CHECKPOINT, model, 0, measured)
        network: RankNetwork = model.policy.network  # type: ignore[assignment]
        network.freeze_estimate()
        if progress.iteration < config.iterations:
            envs.round = progress.iteration
            model._last_obs = envs.reset()  # type: ignore[assignment]
            model._last_episode_starts = np.ones(envs.num_envs, dtype=bool)
            # A checkpoint holds the random state of the moment after its update, so nothing may be drawn before.
            rest = (config.iterations - progress.iteration) * envs.decisions * envs.num_envs
            model.learn(rest, callback=progress, reset_num_timesteps=False)
    if measured.best:
        network.load_state_dict(measured.best[1])
    return LearnedPolicy(folder.resolve().name, network.eval())


def _begin(model: PPO, envs: ProxyVecEnv, config: TrainConfig, progress: PPOProgress, folder: Path) -> None:
    """Measure the untrained policy, teach it scores, and measure again."""
    policy = model.policy
    assert isinstance(policy, RankPolicy)
    model._setup_learn(0, progress, reset_num_timesteps=False)
    progress.init_callback(model)
    row: dict[str, Any] = {"iteration": 0} | progress.validate()
    if config.warm_tasks:
        tasks = warm_draws(envs.fresh, config.warm_tasks)
        facts = warm_start(
            policy,
            envs,
            tasks,
            seed=config.seed,
            on_progress=lambda done, total: progress.report(Stage("warm start", done, total)),
        )
        row |= {f"warm_{key}": value for key, value in facts.items()}
        row |= {f"warm_{key}": value for key, value in progress.validate().items()}
    files.append_json_line(folder / PROGRESS, row)


def _new_model(config: TrainConfig, envs: ProxyVecEnv, folder: Path) -> PPO:
    """PPO as configured, which logs to TensorBoard where that is installed."""
    model = PPO(
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
        rollout_buffer_kwargs={"group": config.episodes_per_task},
        policy_kwargs={"network": config.network},
        seed=config.seed,
        device="cpu",
    )
    # Without a logger of ours, Stable-Baselines3 makes a folder for one among the temporary files.
    formats: list[KVWriter] = [TensorBoardOutputFormat(str(folder / TENSORBOARD))] if find_spec("tensorboard") else []
    model.set_logger(Logger(folder=None, output_formats=formats))
    return model


def _progress_until(iteration: int, path: Path) -> list[dict[str, Any]]:
    """The rows of an interrupted run; those after its checkpoint are repeated, as progress is written first.

    Raises:
        RunFolderError: there are none, or they are damaged.
    """
    try:
        rows = [row for row in files.read_json_lines(path) if row["iteration"] <= iteration]
        if [row["iteration"] for row in rows[:1]] != [0]:
            raise ValueError("its first line is missing")
    except (DataError, ValueError, TypeError, LookupError) as error:
        raise RunFolderError(
            f"{path} cannot be read: {first_line(error)}. Delete {CHECKPOINT} beside it to start over."
        ) from error
    return rows


def finish(folder: Path, policy: LearnedPolicy, config: TrainConfig, results: dict[str, Any] | None = None) -> Path:
    """Write the trained policy and its card into the run's folder; the run then counts as finished."""
    rows = files.read_json_lines(folder / PROGRESS)
    provenance = {
        "name": folder.resolve().name,
        "training": files.as_json(TrainConfig, config),
        "suite_version": VERSION,
        "episodes": sum(row.get("episodes", 0) for row in rows),
        "start": rows[0],
        "validation": results or {},
    }
    return save_policy(folder, policy.network, config.schedule, provenance)
