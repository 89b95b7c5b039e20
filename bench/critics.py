"""How well plan critics choose on tasks that they have not seen, by how they are fitted and on how many trials.

`python -m rankpilot.bench.critics --help` tells what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..agents.ablation import FEATURE_GROUPS, hide
from ..agents.config import TrainConfig, train_config
from ..agents.critic_fit import MOST_GAIN, FitConfig, Lessons, fit_critics, spread_of
from ..agents.learned import CAUTION
from ..agents.plan_critic import CriticConfig, PlanCritics
from ..agents.pool import worker_pool
from ..agents.run_folder import CONFIG
from ..agents.statistics import compare_pairs, estimate
from ..agents.training import TRIALS, rounds_of, trial_draws
from ..agents.trials import RUNS, lessons_of, read_trials
from ..env.bases import find_base
from ..env.observation import RUN_FEATURES
from ..env.tasks import ProxyTask
from ..errors import ConfigError
from ..files import read_json
from ..lora.cost import FloatArray
from ..lora.ladder import IntArray
from ..study.policy_claims import WORSE
from .harness import Figures, machine_facts, make_table, run_command

FIXED = {"uniform": 0, "fracrule": 1, "heur3": 2, "fracrule-mlp": 3, "actor": 4}
"""Places of plans that every task has tried."""

SCORES = "scores"
"""Stands for the actor's scores among the features that critics do not see."""

Apart = Literal["cell", "family"]


@dataclass(frozen=True)
class Setting:
    """One way to get critics.

    Attributes:
        critic: how many, and their size.
        fit: how they are fitted.
        tasks: share of the tasks that are not held out.
        without: features that the critics do not see, see `rankpilot.agents.ablation`, or "scores" for the actor's.
        caution: see `rankpilot.agents.learned.CAUTION`.
    """

    critic: CriticConfig = field(default_factory=CriticConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    tasks: float = 1.0
    without: tuple[str, ...] = ()
    caution: float = CAUTION


USUAL = Setting()

SETTINGS: dict[str, Setting] = {
    "usual": USUAL,
    "half of the tasks": replace(USUAL, tasks=0.5),
    "a quarter": replace(USUAL, tasks=0.25),
    **{f"without {name}": replace(USUAL, without=(name,)) for name in (*FEATURE_GROUPS, "modules", SCORES)},
    "one critic": replace(USUAL, critic=CriticConfig(count=1)),
    "caution 0": replace(USUAL, caution=0.0),
    "caution 2": replace(USUAL, caution=2.0),
    "width 24": replace(USUAL, critic=CriticConfig(width=24)),
    "width 96": replace(USUAL, critic=CriticConfig(width=96)),
    "dropout .3": replace(USUAL, critic=CriticConfig(dropout=0.3)),
    "15 passes": replace(USUAL, fit=FitConfig(epochs=15)),
    "60 passes": replace(USUAL, fit=FitConfig(epochs=60)),
    "decay .3": replace(USUAL, fit=FitConfig(decay=0.3)),
}

QUICK = {
    "usual": replace(USUAL, critic=CriticConfig(count=2), fit=FitConfig(epochs=2), tasks=0.2),
    "half of the tasks": replace(USUAL, critic=CriticConfig(count=2), fit=FitConfig(epochs=2), tasks=0.1),
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
    apart: Apart = "cell"
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


@dataclass(frozen=True)
class Piece:
    """Critics of one setting on one part of the tasks.

    Attributes:
        run: folder of the training run.
        setting: how they are fitted.
        fold: which part is held out.
        parts: number of each task's part, (tasks,).
        seed: of the fit.
    """

    run: Path
    setting: Setting
    fold: int
    parts: tuple[int, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class Tried:
    """First decisions of a training run's trials.

    Attributes:
        lessons: of all decisions.
        rows: of the first decision, by task and plan, (tasks, RUNS).
        gains: of the same, float64 (tasks, RUNS).
        tasks: which they are.
        cells: number of each one's cell, (tasks,): tasks that differ in seed, budget and rate alone share one.
    """

    lessons: Lessons
    rows: IntArray
    gains: FloatArray
    tasks: tuple[ProxyTask, ...]
    cells: IntArray


@lru_cache(maxsize=1)
def tried_in(run: Path) -> Tried:
    """What a run tried.

    Raises:
        ConfigError: no settings of training are there.
        RunFolderError: a trial is missing or damaged.
    """
    config = _config_of(run)
    draws = trial_draws(rounds_of(config), config.trial_tasks)
    lessons = lessons_of(read_trials(run / TRIALS, len(draws)))
    tasks = tuple(task for drawn in draws for task in drawn)
    first = torch.nonzero(lessons.plans.run[:, RUN_FEATURES.index("progress")] == 0).reshape(-1, RUNS)
    cells = {cell: number for number, cell in enumerate(dict.fromkeys(map(_cell, tasks)))}
    return Tried(
        lessons,
        first.numpy(),
        lessons.gains[first].double().numpy(),
        tasks,
        np.array([cells[_cell(task)] for task in tasks]),
    )


def _config_of(run: Path) -> TrainConfig:
    path = run / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run} holds no {CONFIG}, so it is no run of `rankpilot train`.")
    config = replace(train_config(read_json(path)), device="cpu")
    if not config.trial_tasks:
        raise ConfigError(f"{run} was trained without trials; `rankpilot train --trial-tasks N` flies some.")
    return config


def _cell(task: ProxyTask) -> tuple[object, ...]:
    return task.base, task.kind, task.placement, task.corpus, task.price


def judge(piece: Piece) -> dict[str, Any]:
    """Fit critics without one part of the tasks, and let them choose there.

    Returns:
        "tasks": those of the part, "chosen": the plan of each, and "explained", see `fit_critics`; 0 if unknown.
    """
    tried, setting, parts = tried_in(piece.run), piece.setting, np.array(piece.parts)
    own, others = np.flatnonzero(parts == piece.fold), np.flatnonzero(parts != piece.fold)
    others = np.random.default_rng(piece.seed).permutation(others)
    taught = torch.from_numpy(others[: max(round(setting.tasks * len(others)), 2)])
    lessons = _hidden(tried.lessons, setting.without)
    known = torch.nonzero(torch.isin(lessons.tasks, taught)).squeeze(1)
    critics = PlanCritics(setting.critic)
    facts = fit_critics(critics, lessons[known], seed=piece.seed, fit=setting.fit)
    rows = torch.from_numpy(tried.rows[own].reshape(-1))
    with torch.no_grad():
        said = torch.cat([critics(lessons.plans[some]) for some in torch.split(rows, 512)], dim=1)
    judged = said.reshape(len(said), len(own), RUNS).numpy()
    over_uniform = judged - judged[:, :, :1]
    lower = over_uniform.mean(axis=0) - setting.caution * over_uniform.std(axis=0)
    return {"tasks": own.tolist(), "chosen": lower.argmax(axis=1).tolist(), "explained": 0.0} | facts


def _hidden(lessons: Lessons, without: Sequence[str]) -> Lessons:
    """Lessons in which some features say nothing."""
    plans, names = lessons.plans, [name for name in without if name != SCORES]
    modules, run = (torch.from_numpy(part) for part in hide(names, plans.modules.numpy(), plans.run.numpy()))
    scores = torch.zeros_like(plans.scores) if SCORES in without else plans.scores
    return replace(lessons, plans=replace(plans, modules=modules, run=run, scores=scores))


def parts_of(tried: Tried, apart: Apart, folds: int, split: int) -> IntArray:
    """The part of each task, (tasks,)."""
    if apart == "family":
        families = [find_base(task.base).family for task in tried.tasks]
        return np.unique(families, return_inverse=True)[1]
    shuffled = np.random.default_rng(split).permutation(int(tried.cells.max()) + 1)
    return np.asarray(shuffled[tried.cells] % folds)


def judge_all(
    options: Critics, settings: Mapping[str, Setting], split: int, console: Console
) -> dict[str, tuple[IntArray, list[float]]]:
    """The plan that each setting's critics choose for each task, (tasks,), and what they explain in each part."""
    parts = tuple(parts_of(tried_in(options.run), options.apart, options.folds, split).tolist())
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


def gains_of(tried: Tried, chosen: IntArray) -> tuple[FloatArray, FloatArray]:
    """Gain over uniform of the plan that is chosen for each task: log loss, cut, and in standard deviations."""
    gains = tried.gains - tried.gains[:, :1]
    own = np.clip(gains[np.arange(len(gains)), chosen], -MOST_GAIN, MOST_GAIN)
    return own, own / spread_of(torch.from_numpy(tried.gains))[:, 0].numpy()


def figures_of(tried: Tried, chosen: IntArray, among: IntArray) -> Figures:
    """What choices gain over uniform on some of the tasks."""
    own, standard = (values[among] for values in gains_of(tried, chosen))
    cells = [str(number) for number in tried.cells[among]]
    gain, deviations = estimate(own, cells), estimate(standard, cells)
    better = compare_pairs(own, np.zeros(len(own)), cells).better
    return {
        "tasks": len(among),
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "deviations": deviations.value,
        "deviations_low": deviations.low,
        "deviations_high": deviations.high,
        "better": better.value,
        "better_low": better.low,
        "better_high": better.high,
        "worse": float((own < -np.log(WORSE)).mean()),
    }


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
            CriticConfig(
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
        CriticConfig(width=best.pop("width"), dropout=best.pop("dropout")),
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
    options = tyro.cli(Critics, args=arguments, prog="python -m rankpilot.bench.critics")
    return run_command(partial(benchmark, options), options.json)


if __name__ == "__main__":
    sys.exit(main())
