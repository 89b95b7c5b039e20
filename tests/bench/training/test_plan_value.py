"""The cross-validation of plan critics: on trials whose outcome follows a simple truth, and on bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.evaluation.ablation import FEATURE_GROUPS
from rankpilot.agents.learned.plan_value import Plans, PlanValueConfig, PlanValueEnsemble
from rankpilot.agents.training import plan_runs as trials
from rankpilot.agents.training.config import TrainConfig
from rankpilot.agents.training.fit_plan_value import FitConfig
from rankpilot.agents.training.plan_runs import RUNS, TRIALS, PlanRun, Stack, read_trials, run_trials
from rankpilot.agents.training.task_sampling import rounds_of, trial_draws
from rankpilot.allocation.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.bench.training import plan_value as critics
from rankpilot.bench.training import plan_value_choices as critic_choices
from rankpilot.bench.training.plan_value import Critics, main
from rankpilot.bench.training.plan_value_choices import Piece, Setting, figures_of, gains_of, judge, parts_of, tried_in
from rankpilot.common.files import write_json
from rankpilot.common.settings import as_json, from_json
from rankpilot.errors import ConfigError, RunFolderError, UnknownNameError

MODULES, DECISIONS = 6, 2
TASKS, STACKS = 60, 20
CONFIG = TrainConfig(trial_tasks=TASKS, bases=("llama-4x32",))
SMALL = Setting(PlanValueConfig(count=2, width=16), FitConfig(epochs=25, batch=8))


def invented(stack: Stack) -> PlanRun:
    """As if a stack had been flown: the more rank in all, the lower the loss."""
    generator = np.random.default_rng(stack.number)
    runs = len(stack.tasks) * RUNS
    first = generator.choice([0, 1, 2, 4, 8, 16], size=(runs, MODULES))
    run = np.zeros((DECISIONS, runs, len(RUN_FEATURES)), dtype=np.float32)
    run[1, :, RUN_FEATURES.index("progress")] = 0.2
    return PlanRun(
        generator.normal(size=(DECISIONS, runs, MODULES, len(MODULE_FEATURES))).clip(-3, 3).astype(np.float32),
        generator.normal(size=(DECISIONS, runs, MODULES)).astype(np.float32),
        run,
        np.stack([first, first]),
        np.exp(-0.02 * np.log2(1 + first).sum(axis=1)),
        np.full(runs, 2.0),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's folder."""
    folder = tmp_path_factory.mktemp("run")
    write_json(folder / "config.json", as_json(TrainConfig, CONFIG))
    draws = trial_draws(rounds_of(CONFIG), CONFIG.trial_tasks)
    actor: Any = None
    stacks = [Stack(number, number, tasks, actor, CONFIG.schedule, 0, "cpu") for number, tasks in enumerate(draws)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "fly_trial", invented)
        assert len(list(run_trials(stacks, folder / TRIALS, workers=1))) == STACKS
    return folder


def halves(run: Path) -> tuple[int, ...]:
    return tuple(parts_of(tried_in(run), "cell", 2, 0).tolist())


def test_first_decisions_are_found(run: Path) -> None:
    tried = tried_in(run)
    assert tried.rows.shape == (TASKS, RUNS)
    assert len(tried.lessons.gains) == DECISIONS * TASKS * RUNS
    flown = read_trials(run / TRIALS, STACKS)
    expected = np.concatenate([trial.gains for trial in flown]).reshape(TASKS, RUNS)
    np.testing.assert_allclose(tried.gains, expected, rtol=1e-6)
    ranks = np.concatenate([trial.ranks[0] for trial in flown])
    np.testing.assert_array_equal(tried.lessons.plans.ranks[tried.rows.reshape(-1), 0].numpy(), ranks)
    assert [task.id for task in tried.tasks] == [
        task.id for tasks in trial_draws(rounds_of(CONFIG), TASKS) for task in tasks
    ]


def test_critics_choose_well_on_tasks_that_they_have_not_seen(run: Path) -> None:
    tried = tried_in(run)
    parts = halves(run)
    found = [judge(Piece(run, SMALL, fold, parts, 0)) for fold in range(2)]
    tasks = [task for part in found for task in part["tasks"]]
    assert sorted(tasks) == list(range(TASKS))
    isolated = [{tried.cells[task] for task in part["tasks"]} for part in found]
    assert not isolated[0] & isolated[1], "like tasks stay together"
    chosen = np.zeros(TASKS, dtype=np.int64)
    for part in found:
        chosen[part["tasks"]] = part["chosen"]
        assert part["explained"] > 0.5
    own, _ = gains_of(tried, chosen)
    best, _ = gains_of(tried, tried.gains.argmax(axis=1))
    assert own.mean() > 0.7 * best.mean()
    blind = judge(Piece(run, replace(SMALL, fit=FitConfig(epochs=1, rate=1e-9)), 0, parts, 0))
    assert blind["explained"] < 0.3


def test_figures_of_choices(run: Path) -> None:
    tried = tried_in(run)
    uniform = figures_of(tried, np.zeros(TASKS, dtype=np.int64), np.arange(TASKS))
    assert uniform["gain"] == 0
    assert uniform["better"] == 0.5
    assert uniform["worse"] == 0
    worst = figures_of(tried, tried.gains.argmin(axis=1), np.arange(TASKS))
    assert worst["gain"] < 0
    assert worst["better"] < 0.5
    assert worst["worse"] > 0.5
    assert worst["deviations_low"] <= worst["deviations"] <= worst["deviations_high"]


def test_what_critics_do_not_see(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hidden is hidden from what they are taught by and from what they judge."""
    seen = []

    def forward(self: PlanValueEnsemble, plans: Plans) -> torch.Tensor:
        seen.append(plans)
        return torch.zeros(2, *plans.ranks.shape[:2])

    fitted = []
    monkeypatch.setattr(critic_choices, "fit_critics", lambda _, lessons, **options: fitted.append(lessons.plans) or {})
    monkeypatch.setattr(PlanValueEnsemble, "forward", forward)
    judge(Piece(run, replace(SMALL, without=("signals", "scores", "modules")), 0, halves(run), 0))
    for plans in (*seen, *fitted):
        for name, column in zip(MODULE_FEATURES, plans.modules.unbind(-1), strict=True):
            assert bool(column.any()) == (name not in FEATURE_GROUPS["signals"])
        assert not plans.scores.any()
    assert len(fitted) == 1
    with pytest.raises(UnknownNameError, match="colour"):
        judge(Piece(run, replace(SMALL, without=("colour",)), 0, halves(run), 0))


def test_families_apart(run: Path) -> None:
    tried = tried_in(run)
    tasks = tuple(replace(task, base="bert-4x32") if place % 3 else task for place, task in enumerate(tried.tasks))
    parts = parts_of(replace(tried, tasks=tasks), "family", 2, 0)
    assert parts.tolist() == [place % 3 == 0 for place in range(TASKS)]


def test_more_caution_moves_less(run: Path) -> None:
    """At last nothing is worth the risk."""
    found = judge(Piece(run, replace(SMALL, caution=1e9), 0, halves(run), 0))
    assert set(found["chosen"]) == {0}


def test_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critics, "QUICK", {"usual": SMALL, "rash": replace(SMALL, caution=0.0)})
    path = tmp_path / "figures.json"
    assert main([str(run), "--quick", "--workers", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    for name in ("usual", "rash", "fracrule", "actor", "the best in hindsight"):
        assert figures[f"{name}.tasks"] == TASKS
    assert figures["the best in hindsight.gain"] >= figures["usual.gain"] > figures["actor.gain"]
    assert "explained" in capsys.readouterr().out


def test_search(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(critics, "QUICK", {"usual": SMALL})
    assert main([str(run), "--quick", "--workers", "1", "--search", "2"]) == 0
    streams = capsys.readouterr()
    assert "2 of 2" in streams.err
    assert "found by search" in streams.out


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"workers": 0}, {"folds": 1}, {"search": -1}])
def test_values_out_of_range(run: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--workers is at least 1"):
        Critics(run, **options).chosen()  # type: ignore[arg-type]


def test_unknown_settings(run: Path) -> None:
    with pytest.raises(ConfigError, match="no setting 'deep'"):
        Critics(run, settings=("deep",)).chosen()


def test_folders_without_trials(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of `rankpilot train`"):
        tried_in(tmp_path)
    write_json(tmp_path / "config.json", as_json(TrainConfig, replace(CONFIG, trial_tasks=0)))
    with pytest.raises(ConfigError, match="trained without trials"):
        tried_in(tmp_path)
    write_json(tmp_path / "config.json", as_json(TrainConfig, CONFIG))
    with pytest.raises(RunFolderError, match="20 of 20 trials are not in"):
        tried_in(tmp_path)
    write_json(tmp_path / "config.json", {"steps": 3})
    with pytest.raises(ConfigError, match="unknown 'steps'"):
        tried_in(tmp_path)


def test_settings_survive_their_file(run: Path) -> None:
    assert from_json(TrainConfig, json.loads((run / "config.json").read_text())) == CONFIG
