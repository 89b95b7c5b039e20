"""How well plan critics choose on tasks that they have not seen, by how they are fitted and on how many trials.

`python -m rankpilot.bench.training.plan_value --help` tells what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...agents.evaluation.ablation import FEATURE_GROUPS
from ...agents.learned.plan_value import PlanValueConfig
from ...agents.training.fit_plan_value import FitConfig
from ...common.arrays import IntArray
from ...common.workers import worker_pool
from ...errors import ConfigError
from ..harness import Figures, machine_facts, make_table, run_command
from .plan_value_choices import FIXED, SCORES, Apart, Piece, Setting, figures_of, gains_of, judge, parts_of, tried_in

USUAL = Setting()

SETTINGS: dict[str, Setting] = {
    "usual": USUAL,
    "half of the tasks": replace(USUAL, tasks=0.5),
    "a quarter": replace(USUAL, tasks=0.25),
    **{f"without {name}": replace(USUAL, without=(name,)) for name in (*FEATURE_GROUPS, "modules", SCORES)},
    "one critic": replace(USUAL, critic=PlanValueConfig(count=1)),
    "caution 0": replace(USUAL, caution=0.0),
    "caution 2": replace(USUAL, caution=2.0),
    "width 24": replace(USUAL, critic=PlanValueConfig(width=24)),
    "width 96": replace(USUAL, critic=PlanValueConfig(width=96)),
    "dropout .3": replace(USUAL, critic=PlanValueConfig(dropout=0.3)),
    "15 passes": replace(USUAL, fit=FitConfig(epochs=15)),
    "60 passes": replace(USUAL, fit=FitConfig(epochs=60)),
    "decay .3": replace(USUAL, fit=FitConfig(decay=0.3)),
}

QUICK = {
    "usual": replace(USUAL, critic=PlanValueConfig(count=2), fit=FitConfig(epochs=2), tasks=0.2),
    "half of the tasks": replace(USUAL, critic=PlanValueConfig(count=2), fit=FitConfig(epochs=2), tasks=0.1),
}


@dataclass(frozen=True)
class Critics:
    """Cross-validate plan critics on the trials of a training run (`rankpilot train` with --trial-tasks).

    Tasks are split into parts; critics fitted to the others choose, at the first decision, among the 15 plans that were
    tried on each task that they have not seen. Tasks on one base with one text or placement and one kind of budget stay
    together; with --apart family whole families of models do, so that each is unknown to the critics that choose there.
    Gains are told over uniform rank, in log loss, cut at 1, and in standard deviations between the plans of a
    task; with the share of tasks on which the choice is better (a tie counts half) and on which it is 1 % worse;
    intervals are 95 %, by a bootstrap over those sets of tasks. Beside the settings stand fixed choices and the best
    plan in hindsight, which noise flatters.

    With --search, Optuna (pip install rankpilot[tune]) looks for a better setting first, by the mean gain in standard
    deviations; the best that it finds is measured on another split beside the usual one.

    The full table takes about half an hour on two cores for 9,000 trials.

    Attributes:
        run: folder of a training run.
        settings: names of what is compared; all of them if none is given.
        search: settings that Optuna tries; 0 for none.
        folds: parts of the tasks; families are one part each.
        apart: what stays together.
        quick: under a minute: few passes over a fifth of the tasks.
        json: also write the figures to this file, as flat JSON with names like "usual.better".
        workers: processes, one thread each.
    """

    run: Annotated[Path, tyro.conf.Positional]
    settings: tuple[str, ...] = ()
    search: int = 0
    folds: int = 2
    isolated: Apart = "cell"
    quick: bool = False
    json: Path | None = None
    workers: int = 2

    def chosen(self) -> dict[str, Setting]:
        """The settings that are compared.

        Raises:
            ConfigError: a value out of range, or no such setting.
        """
        if min(self.workers, self.folds - 1) < 1 or self.search < 0:
            raise ConfigError(
                f"--workers is at least 1, --folds at least 2 and --search at least 0; got {self.workers}, "
                f"{self.folds} and {self.search}."
            )
        known = QUICK if self.quick else SETTINGS
        for name in self.settings:
            if name not in known:
                raise ConfigError(f"There is no setting {name!r}; there are {', '.join(map(repr, known))}.")
        return {name: known[name] for name in self.settings or known}


def judge_all(
    options: Critics, settings: Mapping[str, Setting], split: int, console: Console
) -> dict[str, tuple[IntArray, list[float]]]:
    """The plan that each setting's critics choose for each task, (tasks,), and what they explain in each part."""
    parts = tuple(parts_of(tried_in(options.run), options.isolated, options.folds, split).tolist())
    pieces = {
        (name, fold): Piece(options.run, setting, fold, parts, split)
        for name, setting in settings.items()
        for fold in sorted(set(parts))
    }
    names = {id(piece): name for (name, _), piece in pieces.items()}
    chosen = {name: np.zeros(len(parts), dtype=np.int64) for name in settings}
    explained: dict[str, list[float]] = {name: [] for name in settings}
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar, worker_pool(options.workers) as spread:
        shown = bar.add_task("plan critics", total=len(pieces))
        for piece, found in spread(judge, list(pieces.values())):
            name = names[id(piece)]
            chosen[name][found["tasks"]] = found["chosen"]
            explained[name].append(found["explained"])
            bar.advance(shown)
    return {name: (chosen[name], explained[name]) for name in settings}


def search(options: Critics, console: Console) -> Setting:
    """The setting of which Optuna expects the most, the usual one among those that it tries.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--search needs Optuna: pip install rankpilot[tune].") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = tried_in(options.run)

    def value(trial: optuna.Trial) -> float:
        setting = Setting(
            PlanValueConfig(
                width=trial.suggest_int("width", 16, 96, log=True), dropout=trial.suggest_float("dropout", 0.0, 0.5)
            ),
            FitConfig(
                epochs=trial.suggest_int("epochs", 8, 60, log=True),
                batch=trial.suggest_int("batch", 8, 64, log=True),
                rate=trial.suggest_float("rate", 3e-4, 1e-2, log=True),
                decay=trial.suggest_float("decay", 1e-3, 1.0, log=True),
            ),
        )
        chosen, _ = judge_all(options, {"tried": setting}, 0, console)["tried"]
        found = float(gains_of(tried, chosen)[1].mean())
        console.print(f"{trial.number + 1} of {options.search}: {found:+.3f} with {trial.params}", highlight=False)
        return found

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    usual = {"width": USUAL.critic.width, "dropout": USUAL.critic.dropout}
    study.enqueue_trial(usual | {name: getattr(USUAL.fit, name) for name in ("epochs", "batch", "rate", "decay")})
    study.optimize(value, n_trials=options.search)
    best = study.best_params
    return Setting(
        PlanValueConfig(width=best.pop("width"), dropout=best.pop("dropout")),
        FitConfig(**best),
    )


def _table(title: str, rows: Mapping[str, Figures]) -> Table:
    def row(name: str, own: Figures) -> list[str]:
        explained = f"{own['explained']:.0%}" if "explained" in own else ""
        spans = [
            f"{own[key]:{form}} ({own[f'{key}_low']:{form}} to {own[f'{key}_high']:{form}})"
            for key, form in (("gain", "+.3f"), ("deviations", "+.2f"), ("better", ".0%"))
        ]
        return [name, f"{own['tasks']}", *spans, f"{own['worse']:.0%}", explained]

    columns = ("", "tasks", "log loss gained", "in deviations", "better", "1 % worse", "explained")
    return make_table(title, columns, [row(name, own) for name, own in rows.items()])


def benchmark(options: Critics, console: Console) -> Figures:
    """Fit all critics, print the tables, and return the figures.

    Raises:
        ConfigError, UnknownNameError, RunFolderError: bad options, or a folder that holds no whole trials.
    """
    settings = options.chosen()
    tried = tried_in(options.run)
    errors = Console(file=sys.stderr)
    split = 0
    if options.search:
        settings |= {"found by search": search(options, errors)}
        split = 1
    found = judge_all(options, settings, split, errors)
    everything = np.arange(len(tried.tasks))
    fixed = {name: np.full(len(everything), place) for name, place in FIXED.items() if place}
    rows = {name: figures_of(tried, chosen, everything) for name, chosen in fixed.items()}
    rows["the best in hindsight"] = figures_of(tried, tried.gains.argmax(axis=1), everything)
    for name, (chosen, explained) in found.items():
        rows[name] = figures_of(tried, chosen, everything) | {"explained": float(np.mean(explained))}
    console.print(_table("Plans for tasks that critics have not seen, against uniform rank", rows))
    kinds = np.array([f"{task.kind}, {task.price}" for task in tried.tasks])
    first = next(iter(found))
    parts = {kind: figures_of(tried, found[first][0], np.flatnonzero(kinds == kind)) for kind in np.unique(kinds)}
    console.print(_table(f"{first}, by kind of task", parts))
    figures: Figures = {**machine_facts(torch.device("cpu")), "threads": 1, "quick": options.quick}
    for prefix, group in (("", rows), (f"{first}/", parts)):
        for name, own in group.items():
            figures |= {f"{prefix}{name}.{key}": value for key, value in own.items()}
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Critics, args=arguments, prog="python -m rankpilot.bench.training.plan_value")
    return run_command(partial(benchmark, options), options.json)


if __name__ == "__main__":
    sys.exit(main())
