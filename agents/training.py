"""Options of `train_agent.py`, in a module without heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.checks import is_count
from ..common.errors import ConfigError, shown
from ..common.files import as_json

TOGETHER = 8
"""Episodes sharing a task."""

MAY_CHANGE = ("output", "rounds", "workers", "cluster", "resume")
"""Options that may change on resume: all but the rounds have no effect on the policy."""


@dataclass(frozen=True)
class Train:
    """Train an agent on short fine-tunes of small models, and save it as a folder (safetensors and JSON).

    Attributes:
        output: folder of the run; the policy is written there.
        rounds: rounds of PPO; each has `stacks` times `episodes` fine-tunes, about half a CPU second each.
        warm_rounds: rounds of behavior cloning from the rule before PPO.
        stacks: number of stacks of episodes, shared among the workers.
        episodes: episodes per stack; eight of them share a task.
        steps: optimizer steps per fine-tune; drawn from 80 to 160 if not given.
        rule: starting point of training, and baseline for rewards.
        workers: training processes; the policy is the same for any number.
        cluster: train on a Ray cluster: "local", "auto", or HOST:PORT (docs/train-policy.md).
        validate_every: rounds between validations.
        validation_tasks: validation tasks for each of four regimes.
        width: width of the network.
        seed: random seed.
        resume: continue an interrupted run, or add rounds to a finished one.
    """

    output: Path = Path("runs/policy")
    rounds: int = 40
    warm_rounds: int = 6
    stacks: int = 2
    episodes: int = 24
    steps: int | None = None
    rule: str = "union"
    workers: int = 2
    cluster: str | None = None
    validate_every: int = 10
    validation_tasks: int = 8
    width: int = 64
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "warm_rounds", "stacks", "workers", "validate_every", "validation_tasks", "width"):
            if not is_count(getattr(self, name)):
                raise ConfigError(f"{name} must be a whole number of at least 1; got {shown(getattr(self, name))}.")
        if not is_count(self.episodes) or self.episodes % TOGETHER:
            given = shown(self.episodes)
            raise ConfigError(f"episodes must be a multiple of {TOGETHER}, which share a task; got {given}.")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the trained policy, except the number of rounds, as JSON values."""
        return {name: value for name, value in as_json(Train, self).items() if name not in MAY_CHANGE}
