"""The network, correlated exploration, the policy of SB3, and the group advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rankpilot.agents.learned_policy import LearnedPolicy
from rankpilot.agents.networks import DIRECTIONS, LATER_NOISE, Action, CorrelatedGaussian, RankNetwork
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.policy import decision_from_scores
from rankpilot.decide.rules import SignalRule, find_rule, signal_mean
from rankpilot.decide.settings import NetworkConfig
from rankpilot.env.rank_allocation import action_space, observation_space
from rankpilot.plan.plan import PLACEMENT, SCORE_BOUND
from rankpilot.training.vec_env import LEAST_SPREAD, GroupRolloutBuffer, RankPolicy
from torch.distributions import MultivariateNormal

MakeObservation = Callable[..., Observation]
Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PROGRESS = RUN_FEATURES.index("progress")
ONES = torch.ones(1, 7)


def stirred(config: NetworkConfig | None = None, seed: int = 0) -> RankNetwork:
    """A network whose heads do something."""
    torch.manual_seed(seed)
    network = RankNetwork(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def arrays(modules: int, batch: int = 3, seed: int = 0) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    run = torch.randn(batch, len(RUN_FEATURES), generator=generator)
    run[:, PROGRESS] = torch.tensor([0.0, 0.18, 0.5])[torch.arange(batch) % 3]
    return torch.randn(batch, modules, len(MODULE_FEATURES), generator=generator), run, torch.ones(batch, modules)


def padded(modules: torch.Tensor, run: torch.Tensor, mask: torch.Tensor, filling: float = 2.9, by: int = 5) -> Arrays:
    """The same with modules that do not exist, full of anything."""
    batch = len(mask)
    garbage = torch.full((batch, by, len(MODULE_FEATURES)), filling)
    return torch.cat([modules, garbage], dim=1), run, torch.cat([mask, torch.zeros(batch, by)], dim=1)


def covariance(action: Action) -> torch.Tensor:
    """Of the noise, (batch, action size, action size)."""
    return torch.diag_embed(action.std.square()) + action.factors @ action.factors.mT


def part(action: Action, keep: list[int]) -> Action:
    """The action of some modules and the steering numbers."""
    placed = {name: getattr(action, name)[:, keep] for name in ("mean", "std", "factors")}
    return replace(action, **placed, estimate=action.estimate[:, keep[: -len(PLACEMENT)]])


# The network ------------------------------------------------------------------------------------------------------


def test_scores_follow_their_modules() -> None:
    network = stirred()
    modules, run, mask = arrays(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    places = [*order.tolist(), 9, 10]
    action = network(modules, run, mask)
    moved = network(modules[:, order], run, mask)
    for name in ("mean", "std", "factors"):
        torch.testing.assert_close(getattr(moved, name), getattr(action, name)[:, places])
    torch.testing.assert_close(moved.values, action.values)
    assert action.mean[:, :9].std() > 0.05, "the modules are told apart"


def test_modules_that_do_not_exist_change_nothing() -> None:
    network = stirred()
    given = arrays(6)
    action = network(*given)
    more = network(*padded(*given))
    keep = [*range(6), 11, 12]
    for kept, expected in zip(vars(part(more, keep)).values(), vars(action).values(), strict=True):
        torch.testing.assert_close(kept, expected)
    assert not more.mean[:, 6:11].any()
    assert not more.factors[:, 6:11].any()


@pytest.mark.parametrize("seed", range(2))
def test_an_untrained_network_is_the_rule(make_observation: MakeObservation, seed: int) -> None:
    torch.manual_seed(seed)
    observation = make_observation(28, seed)
    centred = observation.modules - observation.modules.mean(axis=0)  # as signals are in any real observation
    observation = replace(observation, modules=centred)
    learned = LearnedPolicy("p", RankNetwork()).decide(observation)
    rule = find_rule("signal-mean").decide(observation)
    np.testing.assert_allclose(learned.scores, rule.scores, atol=1e-6)
    np.testing.assert_array_equal(learned.ranks, rule.ranks)
    assert (learned.rank_floor, learned.depth_bias) == (rule.rank_floor, rule.depth_bias)
    other = SignalRule(gain=-0.5).decide(observation)
    assert not np.array_equal(other.ranks, rule.ranks)


@pytest.mark.parametrize("modules", [1, 2, 300])
def test_weights_fit_any_number_of_modules(make_observation: MakeObservation, modules: int) -> None:
    decision = LearnedPolicy("p", stirred()).decide(make_observation(modules))
    assert decision.ranks.shape == decision.scores.shape == (modules,)
    assert np.isfinite(decision.scores).all()
    assert np.abs(decision.scores).max() <= SCORE_BOUND


def test_what_critics_learn_stays_with_them() -> None:
    network = stirred()
    network(*arrays(6)).values.square().sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("critics."):
            assert parameter.grad is not None
            assert parameter.grad.any()
        else:
            assert parameter.grad is None, name


def test_a_frozen_estimate_stays_as_it_is() -> None:
    """Whatever else is trained; and everything else can be."""
    network = stirred()
    seen: list[torch.Tensor] = []
    network.estimate_head.register_forward_hook(lambda _, __, output: seen.append(output))
    given = arrays(6)
    network.freeze_estimate()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(2):
        action = network(*given)
        gaussian = CorrelatedGaussian(action, given[2])
        (gaussian.log_prob(torch.zeros(3, 8)).sum() + action.values.sum()).backward()
        optimizer.step()
    assert torch.equal(*seen)
    frozen = ("module_encoder.", "context_encoder.", "estimate_head.")
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_exploration_is_smaller_at_later_decisions() -> None:
    modules, run, mask = arrays(4)
    action = RankNetwork()(modules, run, mask)
    config = NetworkConfig()
    expected = torch.tensor([*[config.score_std] * 4, config.rank_floor_std, config.depth_bias_std])
    torch.testing.assert_close(action.std[0], expected)
    torch.testing.assert_close(action.std[1], LATER_NOISE * expected)
    run[:, PROGRESS] = 0
    first = RankNetwork()(modules, run, mask).factors
    torch.testing.assert_close(action.factors[1:], LATER_NOISE * first[1:])
    torch.testing.assert_close(action.factors[0], first[0])
    column = DIRECTIONS.index("relative_depth")
    height = modules[..., MODULE_FEATURES.index("relative_depth")]
    centred = height - height.mean(dim=1, keepdim=True)
    torch.testing.assert_close(first[:, :4, column], config.shared_std * centred)
    assert not first[:, 4:].any(), "steering has noise of its own alone"


# Its distribution ---------------------------------------------------------------------------------------------------


def doubles(modules: int) -> tuple[RankNetwork, Arrays]:
    modules_, run, mask = arrays(modules)
    return stirred().double(), (modules_.double(), run.double(), mask.double())


def test_density_and_entropy_are_those_of_a_normal_distribution() -> None:
    network, given = doubles(7)
    action = network(*given)
    gaussian = CorrelatedGaussian(action, given[2])
    normal = MultivariateNormal(action.mean, covariance(action))
    generator = torch.Generator().manual_seed(3)
    points = action.mean + torch.randn(3, 9, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(gaussian.log_prob(points), normal.log_prob(points))
    torch.testing.assert_close(gaussian.entropy(), normal.entropy())
    parameters = [parameter for name, parameter in network.named_parameters() if "critics" not in name]
    actual, expected = (
        torch.autograd.grad(
            each.log_prob(points).sum() + each.entropy().sum(), parameters, retain_graph=True, materialize_grads=True
        )
        for each in (gaussian, normal)
    )
    torch.testing.assert_close(actual, expected)
    off_diagonal = covariance(action)[:, :7, :7] - torch.diag_embed(action.std[:, :7].square())
    assert off_diagonal.abs().max() > 1e-3, "scores move together"


def test_samples_draw_as_they_always_did() -> None:
    action = stirred()(*arrays(5))
    torch.manual_seed(7)
    sampled = CorrelatedGaussian(action, torch.ones(3, 5)).sample()
    torch.manual_seed(7)
    alone = action.std * torch.randn(3, 7)
    shared = action.factors @ torch.randn(3, action.factors.shape[2], 1)
    assert torch.equal(sampled, action.mean + alone + shared.squeeze(-1))


def test_padding_counts_for_nothing() -> None:
    network, (modules, run, mask) = doubles(6)
    given = padded(modules, run, mask)
    action = network(*(tensor.double() for tensor in given))
    gaussian = CorrelatedGaussian(action, given[2].double())
    keep = [*range(6), 11, 12]
    real = part(action, keep)
    normal = MultivariateNormal(real.mean, covariance(real))
    points = torch.randn(3, 13, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(gaussian.log_prob(points), normal.log_prob(points[:, keep]))
    torch.testing.assert_close(gaussian.entropy(), normal.entropy())
    assert not gaussian.sample()[:, 6:11].any()
    elsewhere = points.clone()
    elsewhere[:, 6:11] = 3.3
    assert torch.equal(gaussian.log_prob(elsewhere), gaussian.log_prob(points)), "not by a bit"


def test_gradients_do_not_depend_on_what_is_in_the_padding() -> None:
    """Not by a bit, even if it is absurd."""
    points = torch.randn(3, 13, generator=torch.Generator().manual_seed(2))
    results = []
    for filling in (0.0, 2.9):
        network = stirred()
        given = padded(*arrays(6), filling=filling)
        gaussian = CorrelatedGaussian(network(*given), given[2])
        (gaussian.log_prob(points).sum() + gaussian.entropy().sum()).backward()
        results.append([p.grad for name, p in network.named_parameters() if "critics" not in name])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_scores_are_the_directions_times_their_gains(make_observation: MakeObservation) -> None:
    observation, network = make_observation(7), stirred()
    action = network(torch.from_numpy(observation.modules)[None], torch.from_numpy(observation.run)[None], ONES)
    gains, estimate = (part[0].detach().numpy() for part in (action.gains, action.estimate))
    columns = [MODULE_FEATURES.index(name) for name in DIRECTIONS[:-1]]
    parts = np.column_stack([observation.modules[:, columns], estimate])
    expected = (parts - parts.mean(axis=0)) @ gains
    scores, placement = LearnedPolicy("p", network).act(observation)
    np.testing.assert_allclose(scores, np.clip(expected, -SCORE_BOUND, SCORE_BOUND), atol=1e-5)
    np.testing.assert_allclose(placement, action.mean[0, 7:].detach())
    assert np.ptp(expected) > 0.1
    assert np.abs(estimate).max() > 0.01


@pytest.mark.parametrize("max_step", [None, 2])
def test_the_same_observation_leads_to_the_same_decision(make_observation: MakeObservation, max_step: Any) -> None:
    policy, observation = LearnedPolicy("p", stirred().eval()), make_observation(12, max_step=max_step)
    state = torch.get_rng_state()
    decision, again = (policy.decide(observation) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    scores, placement = policy.act(observation)
    expected = decision_from_scores(observation, scores, placement)
    for each in (decision, again):
        np.testing.assert_array_equal(each.ranks, expected.ranks)
        np.testing.assert_array_equal(each.scores, scores)
        assert (each.rank_floor, each.depth_bias) == (expected.rank_floor, expected.depth_bias)
    assert decision.choice is None, "it expects nothing of plans"


def test_rules(make_observation: MakeObservation) -> None:
    observation = make_observation(8)
    modules = observation.modules.copy()
    modules[:, :3] = np.linspace(-2, 2, 8)[:, None]
    observation = replace(observation, modules=modules)
    np.testing.assert_allclose(signal_mean(observation), np.linspace(-2, 2, 8), atol=1e-6)
    rungs = observation.problem.ladder.rung(SignalRule().decide(observation).ranks)
    assert (np.diff(rungs) >= -1).all(), "more signal, more rank, but for a last rung that fits a cheaper module alone"
    assert rungs[0] + 2 <= rungs[-1]


# PPO's side -----------------------------------------------------------------------------------------------------------


def test_a_policy_of_sb3_agrees_with_the_network() -> None:
    policy = RankPolicy(observation_space(4), action_space("scores", 4), lambda _: 1e-3)
    assert action_space("scores", 4).shape == (4 + len(PLACEMENT),)
    policy.network.load_state_dict(stirred().state_dict())
    modules, run, mask = arrays(4)
    mask[:, 3] = 0
    observation: Any = {"module_features": modules.flatten(1), "run_features": run, "mask": mask}
    action = policy.network(modules, run, mask)
    gaussian = CorrelatedGaussian(action, mask)
    actions, values, log_prob = policy(observation, deterministic=True)
    torch.testing.assert_close(actions, action.mean)
    torch.testing.assert_close(values, action.values.mean(dim=1, keepdim=True))
    torch.testing.assert_close(policy.predict_values(observation), values)
    torch.testing.assert_close(log_prob, gaussian.log_prob(action.mean))
    sampled, _, sampled_log_prob = policy(observation)
    assert not torch.equal(sampled, action.mean)
    _, evaluated, entropy = policy.evaluate_actions(observation, sampled)
    torch.testing.assert_close(evaluated, sampled_log_prob)
    torch.testing.assert_close(evaluated, gaussian.log_prob(sampled))
    assert entropy is not None
    torch.testing.assert_close(entropy, gaussian.entropy())
    assert {id(p) for p in policy.network.parameters()} == {
        id(p) for group in policy.optimizer.param_groups for p in group["params"]
    }


def test_each_critic_learns_from_runs_of_its_own() -> None:
    policy = RankPolicy(observation_space(4), action_space("scores", 4), lambda _: 1e-3)
    policy.network.load_state_dict(stirred().state_dict())
    modules, run, mask = (tensor[:1].expand(400, *tensor.shape[1:]) for tensor in arrays(4))
    observation: Any = {"module_features": modules.flatten(1), "run_features": run, "mask": mask}
    each = policy.network(modules[:1], run[:1], mask[:1]).values[0]
    values, _, _ = policy.evaluate_actions(observation, torch.zeros(400, 6))
    chosen = (values - each).abs().argmin(dim=1)
    torch.testing.assert_close(values[:, 0], each[chosen])
    assert (chosen.bincount(minlength=4) > 60).all()


def test_advantages_are_relative_to_the_group() -> None:
    """Two groups of two neighbours, episodes of three decisions; neither critic nor other group may matter.

    Returns of a group are made comparable with those of others by their standard deviation and a little more.
    """
    rewards = np.array([[0, 0, 1.0], [0, 0, -5.0], [0, 0, 3.0], [0, 0.5, 0]], dtype=np.float32).T
    space = spaces.Dict({"mask": spaces.MultiBinary(1)})
    buffer = GroupRolloutBuffer(3, space, spaces.Box(-1, 1, (1,)), gamma=1.0, gae_lambda=1.0, n_envs=4, group=2)
    for step, reward in enumerate(rewards):
        starts = np.full(4, float(step == 0), dtype=np.float32)
        buffer.add({"mask": np.ones((4, 1))}, np.zeros((4, 1)), reward, starts, torch.randn(4), torch.zeros(4))
    buffer.compute_returns_and_advantage(torch.randn(4), np.ones(4, dtype=bool))
    returns = [[1, 1, 1], [-5, -5, -5], [3, 3, 3], [0.5, 0.5, 0]]
    np.testing.assert_allclose(buffer.returns.T, returns, atol=1e-5)
    distance = np.array([[3, 3, 3], [-3, -3, -3], [1.25, 1.25, 1.5], [-1.25, -1.25, -1.5]])
    np.testing.assert_allclose(buffer.advantages.T, distance / (np.abs(distance) + LEAST_SPREAD), atol=1e-5)
