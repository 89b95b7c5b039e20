"""What is done after each of PPO's updates: a row of progress, validation if it is due, and a checkpoint.

A run that goes on from a checkpoint is the same as a run that was not interrupted. Checkpoints hold tensors and numbers
only, so reading one never unpickles code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from ..agents.learned.network import RankNetwork
from ..agents.learned.policy_file import SCHEMA
from ..common.arrays import Arrays, IntArray
from ..common.files import append_json_line, atomic_path, load_archive
from ..env.episode_record import Comparison
from ..env.proxy_task import ProxyTask
from ..errors import RunFolderError
from .config import TrainConfig
from .ppo_policy import RankPolicy
from .vec_env import ProxyVecEnv

PROGRESS, CHECKPOINT = "progress.jsonl", "checkpoint.pt"

BOUND = 1.0
"""Improvements on one task count from minus to plus this, so that no task alone decides which network is best."""


@dataclass(frozen=True)
class Stage:
    """How far training has come, for progress bars.

    Attributes:
        name: "warm start", "training", "validation", "plan runs" or "value ensemble".
        done: iterations done; of the warm start tasks, of plan runs stacks of them.
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

    Attributes:
        best: state of the best network so far, and its score.
    """

    def __init__(self, tasks: Sequence[ProxyTask], envs: ProxyVecEnv) -> None:
        self._tasks, self._envs = tasks, envs
        self._start: list[float] = []
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None

    def measure(self, policy: RankPolicy) -> dict[str, float]:
        """Run the tasks; improvements over the untrained policy and over uniform, in shares of the headroom."""
        losses = self._envs.play(self._tasks, greedy(policy))
        self._start = self._start or losses
        headrooms = [task.reference.headroom for task in self._tasks if task.reference]
        uniform = [task.reference.uniform for task in self._tasks if task.reference]
        row = {}
        for name, baseline in (("over_start", self._start), ("over_uniform", uniform)):
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
        append_json_line(self._folder / PROGRESS, row)
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
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def restore(path: Path, model: PPO, validation: Validation) -> int:
    """Go on from a checkpoint; returns the iterations done."""
    try:
        state = load_archive(path)
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
