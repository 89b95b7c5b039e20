"""What plan critics choose on tasks that were held out from the trials they learned from, and what that gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...agents.evaluation.ablation import hide
from ...agents.learned.plan_value import PlanValueConfig, PlanValueEnsemble
from ...agents.learned.policy import LCB_COEFFICIENT
from ...agents.training.config import TrainConfig
from ...agents.training.fit_plan_value import MOST_GAIN, FitConfig, Lessons, fit_critics, spread_of
from ...agents.training.plan_runs import RUNS, TRIALS, lessons_of, read_trials
from ...agents.training.task_sampling import rounds_of, trial_draws
from ...allocation.observation import RUN_FEATURES
from ...common.arrays import FloatArray, IntArray
from ...common.files import read_json
from ...common.run_folder import CONFIG
from ...common.settings import from_json
from ...common.statistics import compare_pairs, estimate
from ...env.proxies.bases import find_base
from ...env.tasks.proxy_task import ProxyTask
from ...errors import ConfigError
from ...study.policy.claims import WORSE
from ..harness import Figures

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
        without: features that the critics do not see, see `agents.evaluation.ablation`, or "scores" for the actor's.
        caution: see `rankpilot.agents.learned.policy.LCB_COEFFICIENT`.
    """

    critic: PlanValueConfig = field(default_factory=PlanValueConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    tasks: float = 1.0
    without: tuple[str, ...] = ()
    caution: float = LCB_COEFFICIENT


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
    config = replace(from_json(TrainConfig, read_json(path)), device="cpu")
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
    critics = PlanValueEnsemble(setting.critic)
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


def parts_of(tried: Tried, isolated: Apart, folds: int, split: int) -> IntArray:
    """The part of each task, (tasks,)."""
    if isolated == "family":
        families = [find_base(task.base).family for task in tried.tasks]
        return np.unique(families, return_inverse=True)[1]
    shuffled = np.random.default_rng(split).permutation(int(tried.cells.max()) + 1)
    return np.asarray(shuffled[tried.cells] % folds)


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
