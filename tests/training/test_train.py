"""PPO training: reproducible, resumable, and able to learn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rankpilot.agents.learned_policy import LearnedPolicy
from rankpilot.agents.networks import RankNetwork
from rankpilot.agents.policy_file import CARD, WEIGHTS, load_policy
from rankpilot.common import workers
from rankpilot.common.files import read_json, read_json_lines
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.decide.settings import DecisionSchedule, NetworkConfig
from rankpilot.env.proxy_task import ProxyTask, Reference, find_tasks
from rankpilot.env.rank_allocation import action_space, observation_space
from rankpilot.errors import ConfigError, RunFolderError, UnknownNameError
from rankpilot.training import task_sampling as draws
from rankpilot.training import train as ppo_progress
from rankpilot.training import train as training
from rankpilot.training.config import TrainConfig
from rankpilot.training.task_sampling import fresh_tasks
from rankpilot.training.train import CHECKPOINT, PROGRESS, Validation, finish, is_finished, train, write_checkpoint
from rankpilot.training.vec_env import GroupRolloutBuffer, ProxyVecEnv, RankPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from ..cases import first_cases

CONFIG = TrainConfig(
    iterations=3,
    stacks=1,
    tasks_per_stack=1,
    episodes_per_task=2,
    workers=1,
    warm_tasks=2,
    suites=("planted",),
    bases=("llama-4x32",),
    task_steps=4,
    validation_tasks=2,
    validate_every=2,
    schedule=DecisionSchedule(probe_steps=1, fractions=(0.0, 0.4)),
    network=NetworkConfig(width=8),
)
BARE = dataclasses.replace(CONFIG, iterations=2, warm_tasks=0, validation_tasks=0)
BEGIN = [("validation", 0, 3), ("warm start", 0, 2), ("warm start", 2, 2), ("validation", 0, 3)]


def same_weights(left: RankNetwork, right: RankNetwork) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.items())


@dataclass
class Run:
    """A training that has ended.

    Attributes:
        folder: of the run.
        policy: what came out.
        stages: reports.
        calls: how often workers were called.
    """

    folder: Path
    policy: LearnedPolicy
    stages: list[tuple[str, int, int]] = field(default_factory=list)
    calls: int = 0

    @property
    def network(self) -> RankNetwork:
        return self.policy.network

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_json_lines(self.folder / PROGRESS)


class Killed(Exception):
    pass


def noted(config: TrainConfig, folder: Path, *, resume: bool = False, kill_at: int | None = None) -> Run:
    """Train; be killed at one of the calls of the workers."""
    stages: list[tuple[str, int, int]] = []
    calls = 0
    call = workers.Workers.call

    def counted(worker: Any, given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        return call(worker, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.Workers, "call", counted)
        policy = train(config, folder, resume=resume, on_stage=lambda stage: stages.append(dataclasses.astuple(stage)))
    return Run(folder, policy, stages, calls)


def small_tasks(*given: Any) -> tuple[ProxyTask, ...]:
    """The suites' tasks with fewer and shorter rows; the references stay."""
    sizes: dict[str, Any] = {"length": 16, "batch_size": 4, "eval_rows": 16}
    return tuple(dataclasses.replace(task, **sizes) for task in find_tasks(*given))


def with_tasks(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[tuple[ProxyTask, ...]], tuple[ProxyTask, ...]]
) -> None:
    monkeypatch.setattr(draws, "find_tasks", lambda *given: change(small_tasks(*given)))


def of_parameters(tasks: tuple[ProxyTask, ...]) -> tuple[ProxyTask, ...]:
    """The same tasks with budgets of parameters: no process needs to record steps to tell what ranks cost."""
    return tuple(dataclasses.replace(task, unit="parameters", checkpointing=False, priced_rows=None) for task in tasks)


@pytest.fixture(autouse=True, scope="module")
def _small_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "find_tasks", small_tasks)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    return noted(CONFIG, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of PPO alone; `temporary` beside it stands for the system's folder of temporary files."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SB3_LOGDIR")
        patch.setattr(tempfile, "tempdir", str(runs / "temporary"))
        return noted(BARE, runs / "bare")


# The run's folder -----------------------------------------------------------------------------------------------------


def test_stages_in_their_order(whole: Run) -> None:
    late = [("training", 1, 3), ("validation", 2, 3), ("training", 2, 3), ("validation", 3, 3), ("training", 3, 3)]
    assert whole.stages == BEGIN + late


def test_rows_of_progress(whole: Run) -> None:
    first, *rows = whole.rows
    errors = {"warm_before", "warm_after", "warm_constant"}
    measured = {"validation_over_start"}  # runs of 4 steps: the losses of uniform ranks are those after 100
    assert set(first) == {"iteration"} | errors | measured | {f"warm_{key}" for key in measured}
    assert first["iteration"] == first["validation_over_start"] == 0, "it is measured against itself"
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["episodes"] == 2
        assert row["return_p10"] <= row["return_mean"] <= row["return_p90"]
        assert row["spread_in_groups"] >= 0
        assert 0 < row["adapted"] <= 1
        assert row["adapted"] <= row["mean_rank"] <= 128
        assert len(row["tasks"]) == len(row["returns"]) == 1
        assert row["score_std"] == pytest.approx(CONFIG.network.score_std, rel=0.1)
        assert {"rank_floor_std", "depth_bias_std", "loss", "approx_kl", "value_loss"} <= set(row)
        assert (measured <= set(row)) == (row["iteration"] >= 2)
    assert len({task for row in rows for task in row["tasks"]}) == 3, "tasks are fresh"
    assert json.loads((whole.folder / PROGRESS).read_text().splitlines()[-1]) == rows[-1]


def test_the_run_folder(whole: Run, bare: Run) -> None:
    assert read_json(whole.folder / "config.json")["task_steps"] == 4
    assert not is_finished(whole.folder), "the command finishes it"
    assert not bare.network.training
    assert [row["iteration"] for row in bare.rows] == [0, 1, 2]
    assert bare.rows[0] == {"iteration": 0}
    for run, config in ((whole, CONFIG), (bare, BARE)):
        assert not same_weights(run.network, RankNetwork(config.network))
        frozen = {name.partition(".")[0] for name, value in run.network.named_parameters() if not value.requires_grad}
        assert frozen == {"module_encoder", "context_encoder", "estimate_head"}, "the warm start alone teaches these"
    assert list((bare.folder.parent / "temporary").iterdir()) == [], "nothing is left among the temporary files"


def test_a_policy_file_is_the_same_byte_for_byte(bare: Run, tmp_path: Path) -> None:
    again = noted(BARE, tmp_path / "bare")
    folders = [finish(run.folder, run.policy, BARE) for run in (again, bare)]
    for name in (WEIGHTS, CARD):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    other = noted(dataclasses.replace(BARE, seed=1), tmp_path / "other")
    assert not same_weights(other.network, bare.network)
    assert other.rows[1]["tasks"] != bare.rows[1]["tasks"]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bases = ("llama-4x32", "bert-4x32")
    with_tasks(monkeypatch, of_parameters)
    config = dataclasses.replace(CONFIG, iterations=1, stacks=2, bases=bases, warm_tasks=3, seed=3)
    one, two = (noted(dataclasses.replace(config, workers=workers), tmp_path / str(workers)) for workers in (1, 2))
    assert one.rows == two.rows
    assert same_weights(one.network, two.network)
    assert {task.split("/")[0] for row in one.rows[1:] for task in row["tasks"]} == set(bases)
    checkpoints = [torch.load(run.folder / CHECKPOINT, weights_only=True) for run in (one, two)]
    for name, value in checkpoints[0]["policy"].items():
        assert torch.equal(value, checkpoints[1]["policy"][name])
    assert torch.equal(checkpoints[0]["torch_rng"], checkpoints[1]["torch_rng"])


# Going on -------------------------------------------------------------------------------------------------------------

STARTED = 12
MOMENTS = {
    6: "in the warm start",
    20: "in the validation of the second iteration",
    STARTED: "after the start",
    17: "in the second round",
    1: "before anything",
    3: "in the first validation",
    15: "after the first round",
    27: "in the last validation",
}
"""Calls of the workers at which a run is killed."""


@pytest.mark.parametrize(
    "kill_at", first_cases(2, list(MOMENTS)), ids=[name.replace(" ", "-") for name in MOMENTS.values()]
)
def test_killed_and_resumed_is_as_if_nothing_had_happened(whole: Run, tmp_path: Path, kill_at: int) -> None:
    folder, started = tmp_path / "run", kill_at >= STARTED
    with pytest.raises(Killed):
        noted(CONFIG, folder, kill_at=kill_at)
    assert (folder / CHECKPOINT).exists() == started
    rest = noted(CONFIG, folder, resume=True)
    assert same_weights(rest.network, whole.network)
    assert rest.rows == whole.rows
    assert (rest.stages[: len(BEGIN)] == BEGIN) == (not started), "what is done is not done again"
    states = [torch.load(run / CHECKPOINT, weights_only=True) for run in (folder, whole.folder)]
    for name, value in states[0]["policy"].items():
        assert torch.equal(value, states[1]["policy"][name])
    assert torch.equal(states[0]["torch_rng"], states[1]["torch_rng"])


@pytest.mark.parametrize("iteration", first_cases(1, [1, 0, 3]))
def test_killed_between_progress_and_checkpoint(whole: Run, tmp_path: Path, iteration: int) -> None:
    write = write_checkpoint

    def kill(path: Path, model: PPO, done: int, validation: Any) -> None:
        if done == iteration:
            raise Killed
        write(path, model, done, validation)

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, ppo_progress):
            patch.setattr(module, "write_checkpoint", kill)
        with pytest.raises(Killed):
            train(CONFIG, folder)
    assert read_json_lines(folder / PROGRESS)[-1]["iteration"] == iteration
    with (folder / PROGRESS).open("a") as stream:
        stream.write('{"iteration": 4, "retu')  # and a line that was cut off
    rest = noted(CONFIG, folder, resume=True)
    assert same_weights(rest.network, whole.network)
    assert rest.rows == whole.rows


def test_a_finished_training_resumes_to_itself(bare: Run, make_observation: Callable[..., Any]) -> None:
    again = noted(BARE, bare.folder, resume=True)
    assert again.calls == 0
    assert same_weights(again.network, bare.network)
    finish(bare.folder, bare.policy, BARE, {"learned": {"improvement": 0.1}})
    assert is_finished(bare.folder)
    card = read_json(bare.folder / "card.json")
    assert card["episodes"] == 4
    assert card["start"] == {"iteration": 0}
    assert card["validation"] == {"learned": {"improvement": 0.1}}
    loaded = load_policy(bare.folder)
    observation = make_observation(9)
    np.testing.assert_array_equal(
        loaded.decide(observation).scores, LearnedPolicy("x", bare.network).decide(observation).scores
    )


def test_a_policy_in_the_present_folder_has_its_name(
    bare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(bare.folder, folder)
    monkeypatch.chdir(folder)
    finish(Path(), bare.policy, BARE)
    assert load_policy(".").name == "mine"


def test_run_folders_are_never_overwritten(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"exists already\. Pass --resume"):
        train(CONFIG, whole.folder)
    with pytest.raises(RunFolderError, match=r"other settings \(learning_rate: 0.001 there, 0.1 now\)"):
        train(dataclasses.replace(CONFIG, learning_rate=0.1), whole.folder, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run of rankpilot's"):
        train(CONFIG, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.raises(Killed):
        noted(BARE, folder, kill_at=6)
    return folder


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "other keys", "other version"])
def test_a_corrupt_checkpoint_is_named(interrupted: Path, tmp_path: Path, damage: str) -> None:
    path = interrupted / CHECKPOINT
    before, trap = path.read_bytes(), tmp_path / "ran"
    if damage == "cut":
        path.write_bytes(before[:1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other keys":
        state = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in state.items() if key != "numpy_rng"}, path)
    elif damage == "other version":
        torch.save(torch.load(path, weights_only=True) | {"schema": 1}, path)
    else:
        torch.save(_Payload(trap), path)
    rows = (interrupted / PROGRESS).read_bytes()
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt cannot be read"):
        train(BARE, interrupted, resume=True)
    assert not trap.exists()
    assert (interrupted / PROGRESS).read_bytes() == rows
    path.write_bytes(before)


@pytest.mark.parametrize("damage", ["", '{"iteration": "x"}', '{"iteration": 1}', "[]", '{"episodes": 4}'])
def test_damaged_progress_is_named_before_the_training_goes_on(interrupted: Path, damage: str) -> None:
    path = interrupted / PROGRESS
    before = path.read_text()
    path.write_text(f"{damage}\n")
    with pytest.raises(RunFolderError, match=r"progress\.jsonl cannot be read: .*Delete checkpoint\.pt beside it"):
        train(BARE, interrupted, resume=True)
    path.write_text(before)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_what_a_training_opened_is_closed_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    for kind in (Logger, ProxyVecEnv):
        monkeypatch.setattr(kind, "close", lambda self: closed.append(type(self)))

    def fails(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(training, "_begin", fails)
    with pytest.raises(Killed):
        train(BARE, tmp_path / "pilot")
    assert closed == [Logger, ProxyVecEnv]


# The best network -----------------------------------------------------------------------------------------------------


def fake_losses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[list[float]]) -> list[dict[str, torch.Tensor]]:
    """Have validations find these losses; returns the network at each."""
    given, seen = iter(losses), []
    measure = Validation.measure

    def watched(self: Any, policy: RankPolicy) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in policy.network.state_dict().items()})
        return measure(self, policy)

    monkeypatch.setattr(ProxyVecEnv, "play", lambda *_, **__: next(given))
    monkeypatch.setattr(Validation, "measure", watched)
    return seen


@pytest.mark.parametrize("best", first_cases(2, [2, 0, 1, 3]))
def test_the_best_network_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, best: int) -> None:
    """Also if the run is killed after it, and the network goes on from where it was."""
    config = dataclasses.replace(BARE, iterations=3, validation_tasks=2, validate_every=1)
    losses = [[1.0, 1.0] if index == best else [1.5, 1.5] for index in range(4)]
    seen = fake_losses(monkeypatch, losses)
    with pytest.MonkeyPatch.context() as patch:
        step = ProxyVecEnv.step_wait
        steps = itertools.count(1)

        def kill(envs: ProxyVecEnv) -> Any:
            if next(steps) == 5:
                raise Killed
            return step(envs)

        patch.setattr(ProxyVecEnv, "step_wait", kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    network = train(config, tmp_path / "run", resume=True).network
    assert len(seen) == 4
    for name, value in network.state_dict().items():
        assert torch.equal(value, seen[best][name])
    last = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["policy"]
    assert all(torch.equal(value, last[f"network.{name}"]) for name, value in seen[3].items())


@pytest.mark.parametrize(
    ("given", "over_start", "over_uniform", "best"),
    [
        (
            [[2.2, 1.1], [2.1, 1.12], [9.0, 0.0], [math.nan, 1.1]],
            *([0, (0.5 - 0.2) / 2, 0, (-1 + 0) / 2], [(0 - 1) / 2, (0.5 - 1) / 2, 0, -1], 0.15),
        ),
        # A start that failed is easily bettered, and measurements stay numbers, by which networks can be compared.
        ([[math.nan, 1.0], [math.nan, 0.95], [2.0, 1.0]], [0, 0.25, 0.5], [-0.5, -0.25, 0.5], 0.5),
    ],
)
def test_measurements_by_hand(
    given: list[list[float]], over_start: list[float], over_uniform: list[float], best: float
) -> None:
    """Headrooms are 0.2 and 0.1."""
    losses = iter(given)
    references = (Reference(3.0, 2.2, 2.0), Reference(2.0, 1.0))
    tasks = [ProxyTask("planted", seed, reference=reference) for seed, reference in enumerate(references)]
    validation = Validation(tasks, SimpleNamespace(play=lambda *_: next(losses)))  # type: ignore[arg-type]
    policy = RankPolicy(observation_space(4), action_space("scores", 4), lambda _: 1e-3)
    rows = [validation.measure(policy) for _ in given]
    assert [row["over_start"] for row in rows] == pytest.approx(over_start)
    assert [row["over_uniform"] for row in rows] == pytest.approx(over_uniform)
    assert validation.best is not None
    assert validation.best[0] == pytest.approx(best)


# Odd tasks ------------------------------------------------------------------------------------------------------------


def test_a_suite_of_one_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_tasks(monkeypatch, lambda tasks: tasks[:1])
    config = dataclasses.replace(CONFIG, iterations=1, tasks_per_stack=2, stacks=2, warm_tasks=1)
    run = noted(config, tmp_path / "run")
    assert len(set(run.rows[1]["tasks"])) == 4, "each with a seed of its own"
    assert run.rows[1]["episodes"] == 8
    assert "validation_over_start" in run.rows[1]


def test_runs_that_fail_do_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In rounds, in the warm start and in validation."""
    with_tasks(monkeypatch, lambda tasks: tuple(dataclasses.replace(task, learning_rate=1e30) for task in tasks))
    run = noted(dataclasses.replace(CONFIG, iterations=1), tmp_path / "run")
    assert all(bool(torch.isfinite(value).all()) for value in run.network.state_dict().values())
    for row in run.rows[1:]:
        assert row["return_mean"] == pytest.approx(-3, abs=0.01)
        assert row["spread_in_groups"] < 0.01
    numbers = [value for row in run.rows for value in row.values() if isinstance(value, float)]
    assert numbers
    assert all(map(math.isfinite, numbers))


def test_without_planted_tasks_there_is_nothing_to_start_from(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, iterations=1, suites=("shift",), validation_tasks=0)
    run = noted(config, tmp_path / "run")
    assert run.rows[0] == {"iteration": 0}
    assert run.stages == [("training", 1, 1)]


def test_an_absent_device_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No device 'bogus'"):
        train(dataclasses.replace(BARE, device="bogus"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_episodes_have_the_steps_that_were_asked_for() -> None:
    templates = [task for suite in fresh_tasks(CONFIG).templates for task in suite]
    assert {task.steps for task in templates} == {4}
    assert all(task.reference is not None for task in templates)


def test_bad_settings(tmp_path: Path) -> None:
    for name in ("iterations", "stacks", "tasks_per_stack", "epochs", "task_steps", "validate_every"):
        with pytest.raises(ConfigError, match="at least 1"):
            TrainConfig(**{name: 0})
    with pytest.raises(ConfigError, match="episodes_per_task at least 2"):
        TrainConfig(episodes_per_task=1)
    for name in ("workers", "validation_tasks", "warm_tasks"):
        with pytest.raises(ConfigError, match="at least 0"):
            TrainConfig(**{name: -1})
    for name in ("learning_rate", "clip_range", "target_kl"):
        for value in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ConfigError, match="learning_rate, clip_range and target_kl are above 0"):
                TrainConfig(**{name: value})
    with pytest.raises(ConfigError, match="seed is a whole number"):
        TrainConfig(seed=-1)
    with pytest.raises(UnknownNameError, match="Unknown suite 'shfit'"):
        train(dataclasses.replace(CONFIG, suites=("shfit",)), tmp_path / "run")
    with pytest.raises(UnknownNameError, match="Unknown proxy base 'llama-4x3'"):
        train(dataclasses.replace(CONFIG, bases=("llama-4x3",)), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before anything is written"


# The plumbing learns -----------------------------------------------------------------------------------------------

GROUP = 8


class Toy(gym.Env[dict[str, Any], Any]):
    """One decision whose best action is known: scores that rise with height, a floor shift of 1 and a depth bias of -1.

    Scores are compared with each other alone, so the best ones are centred.
    """

    modules = 4
    observation_space, action_space = observation_space(modules), action_space("scores", modules)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        features = np.zeros((self.modules, len(MODULE_FEATURES)), dtype=np.float32)
        features[:, MODULE_FEATURES.index("relative_depth")] = np.linspace(0, 1, self.modules)
        self.best = np.linspace(-1, 1, self.modules, dtype=np.float32)
        mask = np.ones(self.modules, dtype=np.int8)
        run = np.zeros(len(RUN_FEATURES), dtype=np.float32)
        self.observed = {"module_features": features.reshape(-1), "run_features": run, "mask": mask}
        return self.observed, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        placement = float(np.square(action[-2] - 1) + np.square(action[-1] + 1))
        miss = float(np.square(action[:-2] - self.best).mean()) + placement
        # A large offset that no action can change: what the group's mean must take away.
        return self.observed, 100.0 - miss, True, False, {}


def learner(width: int) -> PPO:
    """PPO as a training makes it, on `Toy`, with a network of this width."""
    torch.manual_seed(0)
    return PPO(
        RankPolicy,
        DummyVecEnv([Toy] * GROUP),
        **{"n_steps": 8, "batch_size": 64, "n_epochs": 6, "learning_rate": 1e-2},
        **{"gamma": 1.0, "gae_lambda": 1.0, "vf_coef": 0.1},
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={"group": GROUP},
        policy_kwargs={"network": NetworkConfig(width=width)},
        seed=0,
        device="cpu",
    )


def test_the_plumbing_learns_a_known_optimum() -> None:
    model = learner(16)
    observation, _ = Toy().reset()

    def miss() -> tuple[float, float, float]:
        action, _ = model.predict(observation, deterministic=True)
        return float(np.abs(action[:-2] - np.linspace(-1, 1, 4)).max()), abs(action[-2] - 1), abs(action[-1] + 1)

    assert miss() == pytest.approx((1.0, 1.0, 1.0)), "it starts at zero"
    model.learn(64 * 30)
    scores, rank_floor, depth_bias = miss()
    assert scores < 0.25
    assert rank_floor < 0.25
    assert depth_bias < 0.25
