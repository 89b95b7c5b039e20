"""Train an agent to steer ranks and learning rate during fine-tunes: `python train_agent.py --help`.

The agent starts as a clone of a hand-written rule, and MaskablePPO improves on it. The reward is the reduction in
held-out loss relative to the rule, on the same task, seed and batches. The best policy on validation tasks is saved as
a folder of safetensors and JSON, for `rankpilot.attach(trainer, policy="runs/policy")`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import tyro
from rankpilot.agents.policy_file import CARD, LearnedPolicy, read_card, save_policy
from rankpilot.agents.sb3_policy import GroupPolicy, clone, read_checkpoint, write_checkpoint
from rankpilot.agents.training import TOGETHER, Train
from rankpilot.common import files
from rankpilot.common.errors import RankPilotError
from rankpilot.decide.groups import GROUP_RULES, STEERING
from rankpilot.env.evaluate import Row, beside, compare, evaluation_tasks
from rankpilot.env.fine_tune import FineTuneConfig
from rankpilot.env.sb3 import StackVecEnv
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed

SOFT = 5.0
"""Scale of an arcsinh that limits outliers in the mean over validation tasks, in hundredths of the log loss."""

CHECKPOINT, PROGRESS = "checkpoint.pt", "progress.jsonl"


class Progress(BaseCallback):
    """After each round's update, validate if due, append a row to progress.jsonl, and write a checkpoint."""

    def __init__(self, options: Train, tell: Callable[[str], object]) -> None:
        super().__init__()
        self.options, self.tell, self.done = options, tell, 0
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None
        self._tasks = evaluation_tasks(options.validation_tasks, split="train", seed=options.seed + 1)
        self._ruled, self._returns = list[Row](), np.zeros(0)

    def _on_step(self) -> bool:
        self._returns = np.array([info["episode"]["r"] for info in self.locals["infos"] if "episode" in info])
        return True

    def _on_rollout_start(self) -> None:
        self._on_training_end()
        set_random_seed(1000 * self.options.seed + self.done)  # so that a resumed run draws the same

    def _on_training_end(self) -> None:
        if len(self._returns):  # the update is done
            self.done += 1
            self.logger.record("over_rule", self._returns.mean())
            for at in (10, 50, 90):
                self.logger.record(f"over_rule_p{at}", np.percentile(self._returns, at))
            if self.done % self.options.validate_every == 0:
                self.logger.record("validation", self.validate())
            recorded = {name: float(value) for name, value in self.logger.name_to_value.items()}
            self.write({"round": self.done, "episodes": len(self._returns), **recorded})
            self.logger.dump(self.num_timesteps)
        more = {"done": self.done, "best": self.best}
        write_checkpoint(self.options.output / CHECKPOINT, cast(MaskablePPO, self.model), more)

    def validate(self) -> float:
        """Held-out loss relative to the rule on validation tasks, in % above it; keeps the best network."""
        network: Any = self.model.policy.network
        self._ruled = self._ruled or list(compare({"rule": GROUP_RULES[self.options.rule]}, self._tasks))
        rows = list(compare({"agent": LearnedPolicy("agent", network, STEERING)}, self._tasks))
        changes = np.array(list(beside([*self._ruled, *rows], "agent", "rule").values()))
        score = SOFT * float(np.sinh(np.arcsinh(changes / SOFT).mean()))
        if self.best is None or score <= self.best[0]:
            self.best = score, {name: value.clone() for name, value in network.state_dict().items()}
        return score

    def write(self, row: dict[str, Any]) -> None:
        """Write and report a row."""
        files.append_json_line(self.options.output / PROGRESS, row)
        numbers = (f"{name} {value:.3g}" for name, value in row.items() if not name.startswith(("round", "train/")))
        self.tell(f"round {row['round']} of {self.options.rounds}: {', '.join(numbers)}")


def train(options: Train, tell: Callable[[str], object] = lambda line: None) -> Path:
    """Train, and save the best policy on validation tasks; return its folder.

    Args:
        options: options of the training.
        tell: called with a line of text after each round.
    """
    torch.set_num_threads(1)
    FineTuneConfig(steps=options.steps, against=options.rule)  # refuses invalid settings before a folder is made
    settings = options.settings
    with files.open_run(options.output, settings, resume=options.resume):
        if (options.output / CARD).exists() and (had := read_card(options.output).get("rounds", 0)) >= options.rounds:
            tell(f"It has completed {had} rounds. Pass more --rounds to continue.")
            return options.output
        envs = StackVecEnv(
            options.episodes, stacks=options.stacks, workers=options.workers, cluster=options.cluster,
            seed=options.seed, scaled=True, against=options.rule, episodes_per_task=TOGETHER, steps=options.steps,
        )  # fmt: skip
        model = MaskablePPO(
            GroupPolicy, envs, n_steps=len(STEERING.fractions), batch_size=192, n_epochs=4, learning_rate=3e-4,
            gamma=1.0, gae_lambda=0.95, ent_coef=1e-3, target_kl=0.03, policy_kwargs={"width": options.width},
            seed=options.seed, device="cpu",
        )  # fmt: skip
        board = ["tensorboard"] if find_spec("tensorboard") else []
        model.set_logger(configure(str(options.output / "tensorboard"), board))
        policy: Any = model.policy
        progress, checkpoint = Progress(options, tell), options.output / CHECKPOINT
        if checkpoint.exists():
            more = read_checkpoint(checkpoint, model)
            progress.best, progress.done = more["best"], more["done"]
            envs.round = options.warm_rounds + 1 + progress.done
        else:
            agrees = clone(model, envs, options.warm_rounds, options.seed)
            progress.init_callback(model)
            progress.write({"round": 0, "agrees": agrees, "validation": progress.validate()})
        steps = (options.rounds - progress.done) * model.n_steps * envs.num_envs
        if steps > 0:
            model.learn(steps, progress, reset_num_timesteps=False)
        envs.close()
        score, weights = progress.best or (0.0, policy.network.state_dict())
        policy.network.load_state_dict(weights)
        card = {"training": settings, "above_rule": score, "rounds": progress.done}
        return save_policy(options.output, policy.network, STEERING, card)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run training with command-line options."""
    try:
        train(tyro.cli(Train, args=arguments), lambda line: sys.stdout.write(f"{line}\n"))
    except RankPilotError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
