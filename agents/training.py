"""Train a policy with PPO on proxy fine-tunes (Stable-Baselines3).

Each iteration, every worker process runs a group of episodes of one task; PPO (Schulman et al., 2017,
arXiv 1707.06347) updates the network on all of them, with advantages relative to the group. A checkpoint after each
iteration makes the run resumable: weights, optimiser, random state and task sequence go on as if nothing had happened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from ..env.rank_allocation import RankAllocationEnv
from ..env.score_actions import ScoreActions
from ..env.suites import find_tasks
from ..env.task_data import check_texts
from ..errors import RunFolderError
from ..files import append_json_line, atomic_path, read_json_lines, write_text
from .config import TrainConfig, as_json
from .network import RankNetwork
from .policy_file import CARD, save_policy
from .run_folder import open_run
from .sb3_policy import GroupRolloutBuffer, RankPolicy

CHECKPOINT, PROGRESS = "checkpoint.pt", "progress.jsonl"


class _Worker:
    """Makes one worker's environment; a class, because it has to be pickled to the worker process."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __call__(self) -> gym.Env[Any, Any]:
        if self.config.worker_count > 1:
            torch.set_num_threads(1)
        env = RankAllocationEnv(
            suites=self.config.suites,
            bases=self.config.bases,
            episodes_per_task=self.config.group,
            schedule=self.config.schedule,
            task_overrides=self.config.task_overrides,
        )
        return ScoreActions(env)


def _make_workers(config: TrainConfig) -> VecEnv:
    makers: list[Callable[[], gym.Env[Any, Any]]] = [_Worker(config)] * config.worker_count
    return DummyVecEnv(makers) if len(makers) == 1 else SubprocVecEnv(makers, start_method="spawn")


class _Checkpoint(BaseCallback):
    """Writes progress and a checkpoint after each update, and tells the caller about every decision."""

    def __init__(self, folder: Path, iteration: int, on_decision: Callable[[int], None]) -> None:
        super().__init__()
        self.folder, self.iteration, self.on_decision = folder, iteration, on_decision
        self._collected = False

    def _on_step(self) -> bool:
        self.on_decision(self.training_env.num_envs)
        return True

    def _on_rollout_start(self) -> None:
        """The update of the iteration before is done."""
        self._save()

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        ended = np.ones_like(buffer.episode_starts, dtype=bool)
        ended[:-1] = buffer.episode_starts[1:] > 0
        self.returns = buffer.rewards[ended]
        self._collected = True

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        if not self._collected:
            return
        self._collected = False
        self.iteration += 1
        assert isinstance(self.model, PPO)
        network: RankNetwork = self.model.policy.network  # type: ignore[assignment]
        row = {
            "iteration": self.iteration,
            "episodes": int(self.returns.size),
            "return_mean": float(self.returns.mean()),
            "return_p10": float(np.quantile(self.returns, 0.1)),
            "return_p90": float(np.quantile(self.returns, 0.9)),
            "signal_gain": float(network.signal_gain.detach()),
            "score_std": float(network.log_std[0].exp().detach()),
            "floor_std": float(network.log_std[1].exp().detach()),
            **{
                key.removeprefix("train/"): float(value)
                for key, value in self.logger.name_to_value.items()
                if key in ("train/approx_kl", "train/clip_fraction", "train/loss")
            },
        }
        append_json_line(self.folder / PROGRESS, row)
        _write_checkpoint(self.folder / CHECKPOINT, self.model, self.iteration)


def _write_checkpoint(path: Path, model: PPO, iteration: int) -> None:
    """Tensors and numbers only, so that reading it back never unpickles code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (SB3 shuffles with it)
    state = {
        "iteration": iteration,
        "timesteps": model.num_timesteps,
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
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


def _restore(path: Path, model: PPO) -> int:
    """Go on from a checkpoint; returns the iterations done."""
    try:
        state = torch.load(path, weights_only=True)
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        model.num_timesteps = int(state["timesteps"])
        torch.set_rng_state(state["torch_rng"])
        kind, keys, position, has_gauss, gauss = state["numpy_rng"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        return int(state["iteration"])
    except Exception as error:  # whatever torch makes of a damaged file
        raise RunFolderError(f"The checkpoint {path} cannot be read ({error}). Delete it to start over.") from error


def is_finished(folder: Path) -> bool:
    """Whether a training run has written its policy."""
    return (folder / CARD).exists()


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_decision: Callable[[int, int], None] | None = None,
) -> RankNetwork:
    """Train a policy; the run's progress and checkpoint are in `folder`.

    Args:
        config: how.
        folder: the run's folder.
        resume: go on with an interrupted run.
        on_decision: called with (decisions done, decisions in all) as training goes on.

    Returns:
        The trained network. `finish` writes it as a policy.

    Raises:
        RunFolderError: see `open_run`.
        UnknownNameError: no such suite or base.
        AssetError: a text is not at hand.
    """
    check_texts(find_tasks(config.suites, "train", config.bases))
    open_run(folder, as_json(config), resume=resume)
    total = config.iterations * config.rollout_steps * config.worker_count
    workers = _make_workers(config)
    try:
        model = _new_model(config, workers)
        done = _restore(folder / CHECKPOINT, model) if (folder / CHECKPOINT).exists() else 0
        # Progress is written before the checkpoint: a run that was killed in between repeats an iteration.
        rows = [row for row in read_json_lines(folder / PROGRESS) if row["iteration"] <= done]
        write_text(folder / PROGRESS, "".join(json.dumps(row) + "\n" for row in rows))
        if done < config.iterations:
            workers.seed(config.seed)
            workers.set_options({"skip_tasks": done})
            model._last_obs = workers.reset()  # type: ignore[assignment]
            model._last_episode_starts = np.ones(workers.num_envs, dtype=bool)

            def report(count: int) -> None:
                if on_decision:
                    on_decision(model.num_timesteps, total)

            # A checkpoint holds the random state of the moment after its update, so nothing may be drawn before.
            rest = total - model.num_timesteps
            model.learn(rest, callback=_Checkpoint(folder, done, report), reset_num_timesteps=False)
    finally:
        workers.close()
    network: RankNetwork = model.policy.network  # type: ignore[assignment]
    return network.cpu().eval()


def _new_model(config: TrainConfig, workers: VecEnv) -> PPO:
    return PPO(
        RankPolicy,
        workers,
        n_steps=config.rollout_steps,
        batch_size=config.rollout_steps * config.worker_count,
        n_epochs=config.epochs,
        learning_rate=config.learning_rate,
        clip_range=config.clip_range,
        gamma=1.0,
        gae_lambda=1.0,
        vf_coef=0.1,
        rollout_buffer_class=GroupRolloutBuffer,
        policy_kwargs={"network": config.network},
        seed=config.seed,
        device="cpu",
    )


def finish(folder: Path, network: RankNetwork, config: TrainConfig, results: dict[str, Any] | None = None) -> Path:
    """Write the trained policy and its card into the run's folder; the run then counts as finished."""
    provenance = {
        "name": folder.name,
        "training": as_json(config),
        "episodes": sum(row["episodes"] for row in read_json_lines(folder / PROGRESS)),
        "validation": results or {},
    }
    return save_policy(folder, network, config.schedule, provenance)
