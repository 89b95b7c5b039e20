"""PPO beside other learners, and beside itself without its parts, on a fine-tune whose best ranks are known.

`python -m rankpilot.bench.training.learners --help` tells what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track

from ...agents.learned.network import RankNetwork
from ...common.workers import isolated, worker_pool
from ...errors import ConfigError
from ..harness import Figures, machine_facts, make_table, run_command
from .closed_form import reached
from .learning import ROUND, SETTINGS, Piece, learn


@dataclass(frozen=True)
class Learners:
    """Compare learners on a fine-tune with a closed-form loss: 12 modules, whose worths one signal shows.

    The whole chain is real but the training of adapters: observation, decoder, plan, budget. The network starts with a
    sixth of the weight on that signal that would be right. Told is how far the mean action comes on the way from
    uniform rank (0) to the best ranks (1), on 30 tasks that are never drawn; a round is 8 episodes of 8 tasks.

    The full table takes about four minutes on two cores.

    Attributes:
        settings: names of what is compared; all of them if none is given.
        rounds: of the longest training; figures are told after a quarter, a half and all of them.
        seeds: trainings of each setting.
        quick: under a minute: 4 rounds of one seed.
        json: also write the figures to this file, as flat JSON with names like "ppo.share_2560".
        workers: processes, one thread each.
    """

    settings: tuple[str, ...] = ()
    rounds: int = 40
    seeds: int = 3
    quick: bool = False
    json: Path | None = None
    workers: int = 2

    def chosen(self) -> tuple[str, ...]:
        """Names of the settings that are compared.

        Raises:
            ConfigError: a value out of range, or no such setting.
        """
        if self.rounds < 4 or min(self.seeds, self.workers) < 1:
            raise ConfigError(
                f"--rounds is at least 4, --seeds and --workers at least 1; got {self.rounds}, {self.seeds} and "
                f"{self.workers}."
            )
        for name in self.settings:
            if name not in SETTINGS:
                raise ConfigError(f"There is no setting {name!r}; there are {', '.join(map(repr, SETTINGS))}.")
        return self.settings or tuple(SETTINGS)


def benchmark(options: Learners, console: Console) -> Figures:
    """Train all settings, print the table, and return the figures.

    Raises:
        ConfigError: see `Learners.chosen`.
    """
    names = options.chosen()
    rounds, seeds = (4, 1) if options.quick else (options.rounds, options.seeds)
    told = tuple(dict.fromkeys((rounds // 4, rounds // 2, rounds)))
    pieces = [Piece(name, seed, rounds, told) for name in names for seed in range(seeds)]
    with isolated(), worker_pool(options.workers) as spread:
        found = dict(
            track(
                spread(learn, pieces),
                "trainings",
                total=len(pieces),
                console=Console(stderr=True),
                transient=True,
            )
        )
        before = reached(RankNetwork())  # the rule, whatever its size
    figures: Figures = {**machine_facts(torch.device("cpu")), "threads": 1, "quick": options.quick, "seeds": seeds}
    rows = []
    for name in names:
        figures[f"{name}.share_0"] = before
        row = [f"{before:.3f}"]
        for round_ in told:
            shares = np.array([found[piece][round_] for piece in pieces if piece.name == name])
            figures[f"{name}.share_{round_ * ROUND}"] = float(shares.mean())
            figures[f"{name}.least_{round_ * ROUND}"] = float(shares.min())
            row.append(f"{shares.mean():.3f} ({shares.min():.3f})")
        rows.append([name, *row])
    columns = (
        "share of the optimum (worst seed)",
        "at first",
        *(f"{ROUND * round_:,} episodes" for round_ in told),
    )
    console.print(make_table("Learners on a closed-form fine-tune, tasks that were never drawn", columns, rows))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Learners, args=arguments, prog="python -m rankpilot.bench.training.learners")
    return run_command(partial(benchmark, options), options.json)


if __name__ == "__main__":
    sys.exit(main())
