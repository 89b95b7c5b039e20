"""What is done after each of PPO's updates: a row of progress, validation if it is due, and a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from ...common.arrays import IntArray
from ...common.files import append_json_line
from ..learned.network import RankNetwork
from .checkpoint import CHECKPOINT, write_checkpoint
from .config import TrainConfig
from .ppo_policy import RankPolicy
from .rollout_env import ProxyVecEnv
from .validation import Validation

PROGRESS = "progress.jsonl"


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
