"""The environment in which a learning rate is corrected: one and many the same, actions do what they say."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
from gymnasium.utils.env_checker import check_env
from rankpilot.decide.rate_control import CHANGES, FEATURES, KEEP, SHARES, UNDO
from rankpilot.env.run_control import (
    LENGTHS,
    OFFSETS,
    ControlledRuns,
    ControlTask,
    RunControlVectorEnv,
    control_tasks,
)
from rankpilot.errors import ConfigError, UnknownNameError

BASE = "llama-4x32"
SMALL: dict[str, Any] = {"base": BASE, "lengths": (60,)}


def small(offset: float = 0.0, **settings: Any) -> ControlTask:
    """A run that is quick to train."""
    task = replace(control_tasks(BASE, lengths=(60,))[0].task, batch_size=2, length=16, eval_rows=8)
    return ControlTask(task, offset=offset, **settings)


def alignments(runs: ControlledRuns) -> Any:
    return runs.observe()[:, list(FEATURES).index("alignment")]


def play(actions: dict[int, int], *tasks: ControlTask) -> tuple[list[Any], list[float]]:
    """What is seen before each decision of these runs, and their losses; actions are by decision, of all runs."""
    runs = ControlledRuns(BASE, len(tasks))
    runs.begin(dict(enumerate(tasks)))
    seen = []
    while not runs.over:
        seen.append(runs.observe())
        runs.step(dict.fromkeys(range(len(tasks)), actions.get(len(seen) - 1, KEEP)))
    return seen, list(runs.losses().values())


def test_tasks_cover_every_rate_on_every_text() -> None:
    tasks = control_tasks("llama-4x64")
    texts = {each.task.corpus for each in tasks}
    assert len(tasks) == len(texts) * len(OFFSETS)
    for text in texts:
        own = [each for each in tasks if each.task.corpus == text]
        assert sorted(each.offset for each in own) == list(OFFSETS)
        assert {each.task.steps for each in own} == set(LENGTHS)
        assert len({(each.part, each.warm_up) for each in own}) > 2


def test_a_run_is_the_same_whatever_runs_beside_it() -> None:
    one, other = small(-1.0, part="top half"), small(2.0, warm_up=0.1)
    together, losses = play({2: CHANGES.index(1.0), 4: UNDO}, one, other)
    for slot, task in enumerate((one, other)):
        alone, (loss,) = play({2: CHANGES.index(1.0), 4: UNDO}, task)
        assert loss == losses[slot]
        for a, b in zip(together, alone, strict=True):
            assert a[slot].tolist() == b[0].tolist()


def test_steps_go_on_at_a_low_rate_and_take_back_at_a_high_one() -> None:
    runs = ControlledRuns(BASE, 2)
    runs.begin({0: small(-3.0), 1: small(1.5)})
    found = []
    for _ in range(4):
        found.append(alignments(runs))
        runs.step({0: KEEP, 1: KEEP})
    low, high = np.mean(found, axis=0)
    assert low > 0.02
    assert high < low / 2


def test_a_change_of_the_rate_is_a_run_at_that_rate_from_there_on() -> None:
    """The rate that is taken back before the second decision has left its mark on one interval alone."""
    raised, lowered = CHANGES.index(1.0), CHANGES.index(-1.0)
    seen, losses = play({0: raised, 1: lowered}, small())
    plain, plain_losses = play({}, small())
    assert seen[0].tolist() == plain[0].tolist()
    assert seen[1].tolist() != plain[1].tolist()
    moved = list(FEATURES).index("moved")
    assert [row[0, moved] for row in seen[:3]] == [0.0, pytest.approx(1 / 3), 0.0]
    assert losses[0] != plain_losses[0]


def test_undo_goes_back_to_where_the_rate_was_last_kept() -> None:
    """Damage that a rate has done is gone: at once the loss is about that of the start."""
    seen, losses = play({1: UNDO}, small(3.0))
    _, alone = play({}, small(3.0))
    loss, noise = (list(FEATURES).index(name) for name in ("loss", "undone"))
    assert seen[1][0, loss] > seen[2][0, loss]
    assert [row[0, noise] for row in seen[:4]] == [0, 0, 1, 0]
    assert losses[0] < alone[0]


def test_one_environment_is_the_vector_of_one_and_checkers_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(rankpilot.CONTROL_ENV_ID, **SMALL)
        check_env(env.unwrapped, skip_close_check=True)
    vector = gym.make_vec(rankpilot.CONTROL_ENV_ID, 2, vectorization_mode="vector_entry_point", **SMALL)
    first, _ = vector.reset(seed=5)
    actions = np.random.default_rng(0).integers(len(CHANGES), size=(len(SHARES), 2))
    actions[:, 1] = KEEP
    stories = [vector.step(each) for each in actions]
    for slot in range(2):
        seen, _ = env.reset(seed=5 + slot)
        assert seen.tolist() == first[slot].tolist()
        for turn, each in enumerate(actions):
            seen, reward, ended, cut, info = env.step(int(each[slot]))
            there = stories[turn]
            last = turn == len(actions) - 1
            assert ended is last
            assert not cut
            assert reward == there[1][slot]
            beside = there[4]["final_obs"][slot] if last else there[0][slot]
            assert seen.tolist() == beside.tolist()
        assert info["loss"] == there[4]["final_info"]["loss"][slot]
        assert reward == pytest.approx(math.log(info["left_alone"] / info["loss"]))
    assert reward == 0, "who leaves a run alone gets nothing"


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_envs": 0}, ConfigError, "num_envs"),
        ({"lengths": (20,)}, ConfigError, "at least 60 steps"),
        ({"lengths": ()}, ConfigError, "at least 60 steps"),
        ({"base": "llama-9x9"}, UnknownNameError, "proxy base"),
        ({"split": "nothing"}, UnknownNameError, "split"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RunControlVectorEnv(**{"num_envs": 1} | settings)


def test_bad_actions() -> None:
    env = RunControlVectorEnv(2, **SMALL)
    with pytest.raises(ConfigError, match="reset"):
        env.step(np.array([0, 0]))
    env.reset(seed=0)
    for actions in ([0], [0, 8], [0, -1], [0.5, 0.0]):
        with pytest.raises(ConfigError, match="whole numbers from 0 to 7"):
            env.step(np.array(actions))
    with pytest.raises(ConfigError, match="options"):
        env.reset(options={"task": 1})
