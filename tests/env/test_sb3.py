"""The vector environment of Stable-Baselines3: the same wherever its stacks are trained, and whoever dies."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from rankpilot.common.errors import ConfigError, WorkerError
from rankpilot.env import sb3
from rankpilot.env.fine_tune import FineTuneVectorEnv
from rankpilot.env.sb3 import StackVecEnv
from rankpilot.env.tasks import FineTuneTask
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common import evaluation

from ..ray_nodes import Nodes

MakeTask = Callable[..., FineTuneTask]


def story(envs: StackVecEnv, rounds: int = 2, between: Callable[[int], object] = lambda turn: None) -> list[Any]:
    """All that comes out of some rounds of drawn actions."""
    draw, told, ended, turn = np.random.default_rng(1), [envs.reset()], 0, 0
    while ended < rounds:
        masks = np.stack(envs.env_method("action_masks"))
        between(turn)
        turn += 1
        seen, rewards, over, _ = envs.step(np.array([draw.choice(np.flatnonzero(mask)) for mask in masks]))
        told += [masks, seen, rewards, over, envs.rule_actions()]
        ended += bool(over.all())
    return told


@pytest.fixture
def settings(make_task: MakeTask) -> dict[str, Any]:
    return {"num_envs": 1, "stacks": 2, "seed": 5, "tasks": [make_task("text", 5)], "against": "union"}


def test_the_stacks_are_vectors_side_by_side(settings: dict[str, Any]) -> None:
    envs = StackVecEnv(**settings | {"stacks": 1, "num_envs": 2})
    seen, vector = envs.reset(), FineTuneVectorEnv(2, tasks=settings["tasks"], against="union")
    np.testing.assert_equal(seen, vector.reset(seed=envs._seed_of[0])[0])
    over = np.zeros(2)
    while not over.all():
        actions = vector.rule_actions()
        np.testing.assert_equal(envs.rule_actions(), actions)
        expected, rewards, _, _ = vector.advance(actions)
        seen, found, over, infos = envs.step(actions)
    np.testing.assert_equal(infos[1]["terminal_observation"], {name: each[1] for name, each in expected.items()})
    np.testing.assert_array_equal(found, rewards.astype(np.float32))


def test_a_stack_that_is_lost_is_played_again(settings: dict[str, Any]) -> None:
    expected = story(StackVecEnv(**settings), rounds=1)
    lost = StackVecEnv(**settings)
    told = story(lost, rounds=1, between=lambda turn: sb3._STACKS.clear() if turn in (3, 9) else None)
    np.testing.assert_equal(told, expected)


@pytest.mark.long
def test_results_do_not_depend_on_the_number_of_processes(settings: dict[str, Any]) -> None:
    expected = story(StackVecEnv(**settings))
    two = StackVecEnv(**settings, workers=2)
    np.testing.assert_equal(story(two), expected)
    assert isinstance(two._workers[0], ProcessPoolExecutor)
    for process in (two._workers[0]._processes or {}).values():
        process.kill()
    with pytest.raises(WorkerError, match="Continue with --resume"):
        story(two)
    two.close()


@pytest.mark.long
def test_training_goes_on_when_a_node_of_a_cluster_dies(settings: dict[str, Any]) -> None:
    expected = story(StackVecEnv(**settings))
    with Nodes(2) as nodes:
        envs = StackVecEnv(**settings, workers=2, cluster=nodes.address)
        told = story(envs, between=lambda turn: nodes.remove(nodes.nodes[0]) if turn == 5 else None)
        np.testing.assert_equal(told, expected)
        envs.close()


def test_rewards_may_be_scaled_by_the_kind_of_task(settings: dict[str, Any], make_task: MakeTask) -> None:
    for kind, scale in (("text", 3.0), ("planted", 20.0)):
        of_kind = settings | {"tasks": [make_task(kind, 5)]}
        plain, scaled = (story(StackVecEnv(**of_kind, scaled=each), rounds=1) for each in (False, True))
        assert plain[-3].any(), "the episodes are over"
        np.testing.assert_allclose(scale * np.sinh(scaled[-3]), plain[-3], rtol=1e-5)


def test_what_it_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="stacks and workers"):
        StackVecEnv(**settings | {"stacks": 0})
    with pytest.raises(ConfigError, match="--cluster must be 'local'"):
        StackVecEnv(**settings, cluster="nowhere")
    with pytest.raises(ConfigError, match="No answer from"):
        StackVecEnv(**settings, cluster="127.0.0.1:9")
    envs = StackVecEnv(**settings)
    for call in (envs.rule_actions, envs.get_attr("action_masks")[0], lambda: envs.step(np.array([0, 0]))):
        with pytest.raises(ConfigError, match="call reset"):
            call()
    with pytest.raises(AttributeError):
        envs.env_method("render_all")
    with pytest.raises(ConfigError, match="cannot be set"):
        envs.set_attr("task", None)
    assert envs.env_is_wrapped(object) == [False] * 2


def test_stable_baselines_evaluates_on_an_environment_that_was_not_reset(settings: dict[str, Any]) -> None:
    """Warnings are errors here: returns are found as in a `Monitor`, before they are scaled."""
    plain, scaled = (StackVecEnv(**settings, scaled=each) for each in (False, True))
    model = MaskablePPO("MultiInputPolicy", StackVecEnv(**settings), n_steps=2, batch_size=2, seed=0)
    returns, lengths = evaluate_policy(model, plain, 2, return_episode_rewards=True)
    assert (returns, lengths) == evaluate_policy(model, scaled, 2, return_episode_rewards=True)
    assert lengths == [12, 12]
    evaluated = MaskableEvalCallback(plain, n_eval_episodes=2, eval_freq=2, verbose=0)
    model.learn(4, evaluated)
    assert np.isfinite([evaluated.last_mean_reward, *evaluation.evaluate_policy(model, plain, 2)]).all()


def test_a_seed_that_is_given_later() -> None:
    """It gives the tasks, observations and rewards of an environment that was made with it."""
    drawn: dict[str, Any] = {"num_envs": 1, "stacks": 2, "base": "llama-4x32", "steps": 25}
    late, fresh = StackVecEnv(**drawn, seed=6), StackVecEnv(**drawn, seed=5)
    expected, other = story(fresh, rounds=1), story(late, rounds=1)
    assert not np.array_equal(other[0]["groups"], expected[0]["groups"])
    assert late.seed(5) == [5, 5]
    np.testing.assert_equal(story(late, rounds=1), expected)
