"""`rankpilot policy train`: the same as `python train_agent.py`, plus a picture of the learning curve."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from ..agents.training import Train
from .progress import tell


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    train_command(tyro.cli(Train, args=arguments, prog="rankpilot policy train"))


def train_command(options: Train) -> None:
    """Train an agent, and draw its learning curve."""
    from ..agents.policy_file import load_policy
    from ..agents.training import learning_curve, learning_sentence
    from ..common.drawing import save_figure
    from ..common.files import read_json_lines
    from ..train_agent import PROGRESS, train

    folder = train(options, tell=tell)
    load_policy(folder)  # check that it is complete, even if written by an earlier run
    rows = read_json_lines(folder / PROGRESS)
    save_figure(learning_curve(rows), folder / "learning_curve.png")
    tell(f"{learning_sentence(rows)}.")
    tell(f"Policy saved to {folder}. To use it: rankpilot finetune MODEL DATA --policy {folder}")
