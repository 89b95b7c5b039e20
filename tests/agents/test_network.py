"""The network, the rules, the action distribution and the group advantages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rankpilot.agents.config import NetworkConfig
from rankpilot.agents.learned import LearnedPolicy
from rankpilot.agents.network import RankNetwork
from rankpilot.agents.policy import signal_score
from rankpilot.agents.rules import RULES, FracRule, SignalRule, find_rule
from rankpilot.agents.sb3_policy import GroupRolloutBuffer, MaskedGaussian, RankPolicy, decision_index
from rankpilot.env.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.env.spaces import SCORE_BOUND
from rankpilot.errors import UnknownNameError

MakeObservation = Callable[..., Observation]


def stirred(seed: int = 0) -> RankNetwork:
    """A network whose heads do something."""
    torch.manual_seed(seed)
    network = RankNetwork()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def arrays(modules: int, batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, modules, len(MODULE_FEATURES), generator=generator),
        torch.randn(batch, len(RUN_FEATURES), generator=generator),
        torch.ones(batch, modules),
    )


def test_scores_follow_their_modules() -> None:
    network = stirred()
    modules, run, mask = arrays(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    mean, _, value = network(modules, run, mask)
    moved, _, moved_value = network(modules[:, order], run, mask)
    torch.testing.assert_close(moved[:, :9], mean[:, order])
    torch.testing.assert_close(moved[:, 9], mean[:, 9])
    torch.testing.assert_close(moved_value, value)
    assert mean[:, :9].std() > 0.05, "the modules are told apart"


def test_padding_changes_nothing() -> None:
    network = stirred()
    modules, run, mask = arrays(6)
    mean, log_std, value = network(modules, run, mask)
    garbage = torch.full((3, 5, len(MODULE_FEATURES)), 2.9)
    padded_mask = torch.cat([mask, torch.zeros(3, 5)], dim=1)
    padded_mean, padded_std, padded_value = network(torch.cat([modules, garbage], dim=1), run, padded_mask)
    torch.testing.assert_close(padded_mean[:, :6], mean[:, :6])
    torch.testing.assert_close(padded_mean[:, -1], mean[:, -1])
    torch.testing.assert_close(padded_value, value)
    assert not padded_mean[:, 6:11].any()

    action = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    padded_action = torch.cat([action[:, :6], torch.full((3, 5), 1.7), action[:, 6:]], dim=1)
    everything = torch.cat([padded_mask, torch.ones(3, 1)], dim=1)
    plain = MaskedGaussian(7).masked(mean, log_std, torch.ones(3, 7))
    padded = MaskedGaussian(12).masked(padded_mean, padded_std, everything)
    torch.testing.assert_close(padded.log_prob(padded_action), plain.log_prob(action))
    torch.testing.assert_close(padded.entropy(), plain.entropy())


def test_log_probability_by_hand() -> None:
    mean = torch.tensor([[0.5, -1.0, 2.0]])
    std = torch.tensor([[0.3, 0.3, 0.7]])
    action = torch.tensor([[0.2, 9.0, 1.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    gaussian = MaskedGaussian(3).masked(mean, std.log(), mask)
    density = [
        math.exp(-0.5 * ((a - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for a, m, s in ((0.2, 0.5, 0.3), (1.0, 2.0, 0.7))
    ]
    assert float(gaussian.log_prob(action)) == pytest.approx(math.log(density[0]) + math.log(density[1]), abs=1e-5)
    entropy = sum(0.5 + 0.5 * math.log(2 * math.pi) + math.log(s) for s in (0.3, 0.7))
    assert float(gaussian.entropy()) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("modules", [1, 2, 37, 300])
def test_any_number_of_modules(make_observation: MakeObservation, modules: int) -> None:
    observation = make_observation(modules)
    decision = LearnedPolicy("p", stirred()).decide(observation)
    assert decision.deltas.shape == decision.scores.shape == (modules,)
    assert np.isfinite(decision.scores).all()
    assert np.abs(decision.scores).max() <= SCORE_BOUND


@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_network_is_the_rule(make_observation: MakeObservation, seed: int) -> None:
    torch.manual_seed(seed)
    observation = make_observation(13, seed)
    learned = LearnedPolicy("p", RankNetwork()).decide(observation)
    rule = SignalRule(gain=0.5).decide(observation)
    np.testing.assert_allclose(learned.scores, rule.scores, atol=1e-6)
    np.testing.assert_array_equal(learned.deltas, rule.deltas)
    assert learned.floor == rule.floor
    other = SignalRule(gain=-0.5).decide(observation)
    assert not np.array_equal(other.deltas, rule.deltas)


def test_log_prob_of_a_decision_is_the_density_at_its_mean(make_observation: MakeObservation) -> None:
    config = NetworkConfig(score_std=0.2, floor_std=0.9)
    decision = LearnedPolicy("p", RankNetwork(config)).decide(make_observation(5))
    expected = -5 * math.log(0.2) - math.log(0.9) - 6 * 0.5 * math.log(2 * math.pi)
    assert decision.log_prob == pytest.approx(expected, abs=1e-4)
    assert FracRule().decide(make_observation(5)).log_prob == 0


def test_rules(make_observation: MakeObservation) -> None:
    observation = make_observation(8)
    modules = observation.modules.copy()
    modules[:, :3] = np.linspace(-2, 2, 8)[:, None]
    observation = replace(observation, modules=modules)
    np.testing.assert_allclose(signal_score(observation), np.linspace(-2, 2, 8), atol=1e-6)
    rungs = observation.problem.rungs + SignalRule().decide(observation).deltas
    assert (np.diff(rungs) >= -1).all(), "more signal, more rank, but for a last rung that fits a cheaper module alone"
    assert rungs[0] + 2 <= rungs[-1]
    assert all(RULES[name].name == name for name in RULES)
    with pytest.raises(UnknownNameError, match="Did you mean: 'heur3'"):
        find_rule("heur4")


def test_a_policy_of_sb3_agrees_with_the_network() -> None:
    space = spaces.Dict(
        {
            "module_features": spaces.Box(-3, 3, (4 * len(MODULE_FEATURES),), np.float32),
            "run_features": spaces.Box(-3, 3, (len(RUN_FEATURES),), np.float32),
            "mask": spaces.MultiBinary(4),
        }
    )
    policy = RankPolicy(space, spaces.Box(-4, 4, (5,), np.float32), lambda _: 1e-3)
    policy.network.load_state_dict(stirred().state_dict())
    modules, run, mask = arrays(4)
    mask[:, 3] = 0
    observation = {"module_features": modules.flatten(1), "run_features": run, "mask": mask}
    mean, log_std, value = policy.network(modules, run, mask)
    actions, values, log_prob = policy(observation, deterministic=True)
    torch.testing.assert_close(actions, mean)
    torch.testing.assert_close(values.squeeze(-1), value)
    torch.testing.assert_close(policy.predict_values(observation), values)
    sampled, _, sampled_log_prob = policy(observation)
    assert not torch.equal(sampled, mean)
    _, evaluated, entropy = policy.evaluate_actions(observation, sampled)
    torch.testing.assert_close(evaluated, sampled_log_prob)
    normal = torch.distributions.Normal(mean, log_std.exp())
    keep = [0, 1, 2, 4]
    torch.testing.assert_close(evaluated, normal.log_prob(sampled)[:, keep].sum(-1))
    torch.testing.assert_close(log_prob, normal.log_prob(mean)[:, keep].sum(-1))
    assert entropy is not None
    torch.testing.assert_close(entropy, normal.entropy()[:, keep].sum(-1))
    assert {id(p) for p in policy.network.parameters()} == {
        id(p) for group in policy.optimizer.param_groups for p in group["params"]
    }


def test_decision_index() -> None:
    starts = np.array([[1, 1], [0, 0], [1, 0], [0, 1], [0, 0]], dtype=np.float32)
    assert decision_index(starts).T.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]


def test_advantages_are_relative_to_the_group() -> None:
    """Two environments, episodes of three decisions; the critic's values must not matter."""
    rewards = np.array([[0, 0, 1.0, 0, 0, 3.0], [0, 0, -5.0, 0, 0.5, 0.0]], dtype=np.float32).T
    starts = np.array([[1, 0, 0, 1, 0, 0]] * 2, dtype=np.float32).T
    space = spaces.Dict({"mask": spaces.MultiBinary(1)})
    buffer = GroupRolloutBuffer(6, space, spaces.Box(-1, 1, (1,)), gamma=1.0, gae_lambda=1.0, n_envs=2)
    torch.manual_seed(0)
    for reward, start in zip(rewards, starts, strict=True):
        observation = {"mask": np.ones((2, 1))}
        buffer.add(observation, np.zeros((2, 1)), reward, start, torch.randn(2), torch.zeros(2))
    buffer.compute_returns_and_advantage(torch.randn(2), np.array([True, True]))
    expected_returns = np.array([[1, 1, 1, 3, 3, 3], [-5, -5, -5, 0.5, 0.5, 0]])
    np.testing.assert_allclose(buffer.returns.T, expected_returns, atol=1e-5)
    expected = [[-1, -1, -1, 1, 1, 1], [-2.75, -2.75, -2.5, 2.75, 2.75, 2.5]]
    np.testing.assert_allclose(buffer.advantages.T, expected, atol=1e-5)
    index = decision_index(buffer.episode_starts)
    for column in range(2):
        for decision in range(3):
            members = index[:, column] == decision
            assert buffer.advantages[members, column].mean() == pytest.approx(0, abs=1e-5)
