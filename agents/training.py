"""Options of `train_agent.py` and the learning curve it leaves, in a module without heavy imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common import drawing
from ..common.checks import is_count
from ..common.errors import ConfigError, shown
from ..common.files import as_json
from ..common.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def learning_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw returns of episodes over an agent's training rounds, and its gain on validation tasks.

    Args:
        rows: rows of progress.jsonl. Those with "over_rule", "over_rule_p10" and "over_rule_p90" are rounds; those with
            "validation" hold the loss above the rule's, in hundredths of its log.
    """
    rounds = [row for row in rows if "over_rule" in row]
    checks = drawing.finite_points([(row["round"], -row["validation"]) for row in rows if "validation" in row])
    note = "Both panels: held-out loss below the rule's, in hundredths of its log."
    figure = drawing.new_figure(4.1, learning_sentence(rows), note)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    training = drawing.clean_axes(panels[0], "Training, on new tasks each round")
    columns = ("round", "over_rule", "over_rule_p10", "over_rule_p90")
    numbers, means, low, high = (np.array([float(row[key]) for row in rounds]) for key in columns)
    training.fill_between(numbers, low, high, color=drawing.COLORS[0], alpha=0.15, linewidth=0, label="10-90% of runs")
    training.plot(numbers, means, color=drawing.COLORS[0], linewidth=2, label="mean")
    validation = drawing.clean_axes(panels[1], "Validation tasks, which decide what is kept")
    if len(checks):
        validation.plot(*checks.T, color=drawing.COLORS[1], linewidth=2, marker="o", label="agent")
    for axes in panels:
        axes.axhline(0, color=drawing.FAINT, linewidth=0.8, zorder=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def learning_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the result of training an agent; see `learning_curve`."""
    checks = [(row["validation"], row["round"]) for row in rows if "validation" in row]
    if not checks:
        return f"An agent was trained for {plural(sum('over_rule' in row for row in rows), 'round')}"
    value, number = min(checks)
    told = f"its losses on validation tasks are {abs(value):.1f} % {'below' if value <= 0 else 'above'} the rule's"
    return f"The agent of round {number} is kept: {told}" if number else f"The copy of the rule is kept: {told}"
