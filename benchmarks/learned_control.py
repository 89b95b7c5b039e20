"""Trains appliers of the learning rate on `rankpilot/RunControl-v2` with PPO, or with a value method, DQN.

Both begin at a rule: PPO's policy learns to do what the rule does, and DQN's memory is filled with the rule's runs, a
part of their actions drawn. Rewards are not discounted. Rounds take turns between the proxy bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rankpilot.common.arrays import FloatArray
from rankpilot.decide.rate_control import CHANGES, FEATURES, RATE_CONTROLS, RateControl
from rankpilot.env.run_control import LENGTHS, RunControlVectorEnv
from rankpilot.errors import DataError
from rankpilot.training.vec_env import GymnasiumVecEnv
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

Learner = Literal["ppo", "dqn"]

SCHEMA = 2
"""Version of the files of appliers."""

DECISIONS = 8
"""Decisions of an episode."""

EXPLORED = (0.3, 0.05), (0.0, 0.6)
"""Share of DQN's actions that are drawn, falling evenly between these shares of the rounds."""

SYNCS = 32
"""How often the target network of DQN follows while it learns from the rule's runs: a value is told on decision by
decision, from the last one to the first."""


@dataclass(frozen=True)
class ControlConfig:
    """How a control is trained.

    Attributes:
        learner: "ppo" or "dqn".
        bases: proxy bases, in turn.
        rounds: of episodes.
        episodes: of a round, trained together.
        lengths: of the runs, in optimizer steps.
        warm_rounds: rounds of the rule at the start.
        rule: the name of the rule.
        drawn: share of the actions of the rule's rounds that are drawn, so that others are seen too.
        width: of the two hidden layers.
        seed: of tasks, actions and weights.
    """

    learner: Learner = "ppo"
    bases: tuple[str, ...] = ("llama-4x64", "bert-4x64", "llama-4x32", "bert-4x32")
    rounds: int = 60
    episodes: int = 16
    lengths: tuple[int, ...] = LENGTHS
    warm_rounds: int = 8
    rule: str = "alignment"
    drawn: float = 0.2
    width: int = 32
    seed: int = 0


@dataclass(frozen=True, eq=False)
class LearnedRateControl:
    """A small network that scores actions: a policy's preferences, or the values of a value method.

    Attributes:
        layers: weight (outputs, inputs) and bias (outputs,) of each, from the features to the actions.
        activation: between them, "tanh" or "relu".
    """

    layers: tuple[tuple[FloatArray, FloatArray], ...]
    activation: str = "tanh"

    def act(self, observations: FloatArray) -> Sequence[int]:
        """See `RateControl`; the action of the highest score."""
        values = np.asarray(observations, dtype=np.float64)
        for number, (weight, bias) in enumerate(self.layers):
            values = values @ weight.T + bias
            if number < len(self.layers) - 1:
                values = np.tanh(values) if self.activation == "tanh" else np.maximum(values, 0)
        return [int(action) for action in values.argmax(axis=1)]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        layers = [{"weight": weight.tolist(), "bias": bias.tolist()} for weight, bias in self.layers]
        return {"schema": SCHEMA, "features": list(FEATURES), "activation": self.activation, "layers": layers}

    @classmethod
    def from_json(cls, state: Any) -> LearnedRateControl:
        """What `to_json` gave.

        Raises:
            DataError: it is one of another version.
        """
        if (state["schema"], state["features"]) != (SCHEMA, list(FEATURES)):
            raise DataError(f"This is no control of schema {SCHEMA} with this version's features.")
        layers = ((np.array(each["weight"], float), np.array(each["bias"], float)) for each in state["layers"])
        return cls(tuple(layers), state["activation"])


@dataclass(frozen=True, eq=False)
class Steps:
    """The decisions of one round under the rule; N = decisions times episodes.

    Attributes:
        seen: before each, (N, features).
        after: what was seen next, (N, features).
        ruled: what the rule does, int (N,).
        taken: what was done, int (N,).
        rewards: (N,).
        ended: whether the episode was over, bool (N,).
    """

    seen: FloatArray
    after: FloatArray
    ruled: Any
    taken: Any
    rewards: FloatArray
    ended: Any


def rule_steps(
    env: RunControlVectorEnv, rule: RateControl, drawn: float, generator: np.random.Generator, seed: int
) -> Iterator[Steps]:
    """One round of episodes, decision by decision.

    Args:
        env: that runs them.
        rule: what decides.
        drawn: share of the actions that are drawn.
        generator: draws.
        seed: of the tasks.
    """
    seen, _ = env.reset(seed=seed)
    for _ in range(DECISIONS):
        ruled = np.array(rule.act(seen))
        other = generator.integers(len(CHANGES), size=len(ruled))
        taken = np.where(generator.random(len(ruled)) < drawn, other, ruled)
        after, rewards, ended, _, infos = env.step(taken)
        last = np.stack(infos["final_obs"].tolist()) if ended.all() else after
        yield Steps(seen, last, ruled, taken, rewards, ended)
        seen = after


def imitate(policy: Any, seen: FloatArray, actions: Any, *, epochs: int = 200) -> float:
    """Let a policy of PPO learn to do what was done; returns the share in which it does."""
    observations = torch.as_tensor(np.asarray(seen), dtype=torch.float32)
    wanted = torch.as_tensor(np.asarray(actions))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(epochs):
        _, log_prob, _ = policy.evaluate_actions(observations, wanted)
        loss = -log_prob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((policy.get_distribution(observations).mode() == wanted).float().mean())


def _ppo(config: ControlConfig, env: GymnasiumVecEnv) -> PPO:
    return PPO(
        "MlpPolicy", env, n_steps=DECISIONS, batch_size=DECISIONS * config.episodes // 2, n_epochs=6, gamma=1.0,
        gae_lambda=0.95, learning_rate=5e-4, ent_coef=3e-3, policy_kwargs={"net_arch": [config.width] * 2},
        seed=config.seed, device="cpu",
    )  # fmt: skip


def _dqn(config: ControlConfig, env: GymnasiumVecEnv) -> DQN:
    return DQN(
        "MlpPolicy", env, gamma=1.0, learning_rate=1e-3, buffer_size=50_000, learning_starts=0, batch_size=128,
        train_freq=1, gradient_steps=8, target_update_interval=16 * config.episodes,
        policy_kwargs={"net_arch": [config.width] * 2}, seed=config.seed, device="cpu",
    )  # fmt: skip


def train_rate_control(
    config: ControlConfig, on_round: Callable[[int, LearnedRateControl, float], None] = lambda *_: None
) -> LearnedRateControl:
    """Train a control; see the module.

    Args:
        config: how.
        on_round: called after each round with its number, the control so far, and the mean reward of the round.
    """
    torch.manual_seed(config.seed)
    envs = {base: RunControlVectorEnv(config.episodes, base=base, lengths=config.lengths) for base in config.bases}
    vectors = {base: GymnasiumVecEnv(env) for base, env in envs.items()}
    model = (_ppo if config.learner == "ppo" else _dqn)(config, next(iter(vectors.values())))
    generator, found = np.random.default_rng([config.seed, 44]), list[Steps]()
    for number in range(config.warm_rounds):
        env = envs[config.bases[number % len(config.bases)]]
        found += rule_steps(
            env, RATE_CONTROLS[config.rule], config.drawn, generator, 1000 * config.seed + number * config.episodes
        )
    _warm(model, found)
    for number in range(config.rounds):
        vector = vectors[config.bases[number % len(config.bases)]]
        vector.seed(1_000_000 + 1000 * config.seed + number * config.episodes)
        model.set_env(vector)  # which begins new episodes
        if isinstance(model, DQN):  # whose own schedule ends with each call of `learn`
            model.exploration_schedule = ConstantSchedule(np.interp(number / config.rounds, EXPLORED[1], EXPLORED[0]))
        rewards = _Rewards()
        model.learn(DECISIONS * config.episodes, callback=rewards, reset_num_timesteps=False)
        on_round(number, applier_of(model), float(np.mean(rewards.found)))
    return applier_of(model)


class _Rewards(BaseCallback):
    """Notes the rewards of the episodes that end."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def _on_step(self) -> bool:
        self.found += np.asarray(self.locals["rewards"])[self.locals["dones"]].tolist()
        return True


def _warm(model: BaseAlgorithm, found: Sequence[Steps]) -> None:
    """Begin at the rule."""
    if isinstance(model, PPO):
        imitate(model.policy, np.concatenate([s.seen for s in found]), np.concatenate([s.ruled for s in found]))
        return
    assert isinstance(model, DQN)
    assert model.replay_buffer is not None
    for steps in found:
        infos: list[dict[str, Any]] = [{} for _ in steps.taken]
        model.replay_buffer.add(steps.seen, steps.after, steps.taken, steps.rewards, steps.ended, infos)
    model._setup_learn(0)
    for _ in range(SYNCS):
        model.train(gradient_steps=max(1, 2 * sum(len(steps.taken) for steps in found) // SYNCS), batch_size=128)
        model.q_net_target.load_state_dict(model.q_net.state_dict())


def applier_of(model: BaseAlgorithm) -> LearnedRateControl:
    """The network of a model that chooses its actions."""
    policy: Any = model.policy
    if isinstance(model, PPO):
        modules, activation = [*policy.mlp_extractor.policy_net, policy.action_net], "tanh"
    else:
        modules, activation = list(policy.q_net.q_net), "relu"
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    with torch.no_grad():
        arrays = tuple((layer.weight.double().numpy().copy(), layer.bias.double().numpy().copy()) for layer in layers)
    return LearnedRateControl(arrays, activation)
