"""The network of a learned policy, which scores modules.

`RankNetwork` has one set of weights for all modules, so that a model may have any number of them. The features of a
module and those of the run become a token; the mean and the maximum over the tokens are the context. Two parts use it:

* the *estimate*: a score for each module, from its token and the context. The warm start teaches it what modules are
  worth; before that it is 0.
* the *steering*: a gain for each direction (the signals, the relative depth, the cost of a rank, and the estimate), and
  the placement. Scores are the sum of the directions, each times its gain. PPO trains the steering alone: these are a
  dozen numbers for a decision. One number for each module changed the policy far too much in a single update
  (docs/experiments.md).

At first all that training can change is zero, and the network does what the rule signal-mean does. It explores with
correlated noise (`CorrelatedGaussian`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal

from ..decide.observation import MODULE_FEATURES, RUN_FEATURES, Inputs
from ..decide.rules import MEAN_SIGNALS
from ..decide.settings import NetworkConfig
from ..lora.adapters import SIGNALS
from ..plan.plan import PLACEMENT, SCORE_BOUND

DIRECTIONS = (*SIGNALS, "relative_depth", "rank_cost", "estimate")
"""Scores are a weighted sum of these, centred over the modules. Exploration adds one draw to each gain."""

LATER_NOISE = 0.5
"""Exploration at later decisions as a share of that at the first: they move ranks by two rungs at most."""

_COLUMNS = [MODULE_FEATURES.index(name) for name in DIRECTIONS[:-1]]


@dataclass(frozen=True, eq=False)
class Action:
    """A distribution of actions, and the expected result. An action is a score for each module, and then the placement.

    With standard normal e and z, an action is mean + std * e + factors @ z.

    Attributes:
        mean: (batch, modules + 2), zero for padding.
        std: the noise that each number has for itself, (batch, modules + 2).
        factors: the noise that the scores share, (batch, modules + 2, len(DIRECTIONS)).
        values: how much better than under the rule each critic expects the run to end, in shares of the headroom,
            (batch, critics).
        gains: of each direction in the scores, (batch, len(DIRECTIONS)).
        estimate: of what each module is worth, (batch, modules).
    """

    mean: torch.Tensor
    std: torch.Tensor
    factors: torch.Tensor
    values: torch.Tensor
    gains: torch.Tensor
    estimate: torch.Tensor


class RankNetwork(nn.Module):
    """From features to a distribution of actions, and to the expected result.

    Args:
        config: size of the network, and the policy at its start.
        inputs: the features that it reads; all by default.
    """

    config: NetworkConfig
    inputs: Inputs

    def __init__(self, config: NetworkConfig | None = None, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.config, self.inputs = config or NetworkConfig(), inputs or Inputs()
        width, run = self.config.width, self.inputs.run
        self.module_encoder: nn.Sequential = nn.Sequential(
            nn.Linear(self.inputs.modules + run, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.context_encoder: nn.Sequential = nn.Sequential(nn.Linear(2 * width + run, width), nn.Tanh())
        self.estimate_head: nn.Sequential = nn.Sequential(
            nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False)
        )
        self.steering_encoder: nn.Sequential = nn.Sequential(nn.Linear(2 * width + run, width), nn.Tanh())
        self.gain_head: nn.Linear = nn.Linear(width, len(DIRECTIONS))
        self.steering_head: nn.Linear = nn.Linear(width, len(PLACEMENT))
        self.critics: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)) for _ in range(self.config.critics)
        )
        gains = [
            self.config.signal_gain / len(MEAN_SIGNALS) if name in MEAN_SIGNALS else 0.0 for name in DIRECTIONS[:-1]
        ]
        self.gains: nn.Parameter = nn.Parameter(torch.tensor([*gains, 1.0]))
        stds = [self.config.score_std, self.config.rank_floor_std, self.config.depth_bias_std]
        self.log_std: nn.Parameter = nn.Parameter(torch.tensor(stds).log())
        self.shared_log_std: nn.Parameter = nn.Parameter(torch.full((len(DIRECTIONS),), self.config.shared_std).log())
        for head in (self.estimate_head[-1], self.gain_head, self.steering_head):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def freeze_estimate(self) -> None:
        """Let no further training change the estimate."""
        for part in (self.module_encoder, self.context_encoder, self.estimate_head):
            part.requires_grad_(False)

    def forward(self, modules: torch.Tensor, run: torch.Tensor, mask: torch.Tensor) -> Action:
        """The distribution of actions, and the expected result.

        Args:
            modules: (batch, modules, len(MODULE_FEATURES)).
            run: (batch, len(RUN_FEATURES)).
            mask: (batch, modules), 1 for modules that exist.
        """
        modules, run = modules[..., : self.inputs.modules], run[:, : self.inputs.run]
        exists = mask.unsqueeze(-1).to(modules.dtype)
        spread = run.unsqueeze(1).expand(-1, modules.shape[1], -1)
        tokens = self.module_encoder(torch.cat([modules, spread], dim=-1))
        mean = (tokens * exists).sum(1) / exists.sum(1).clamp_min(1)
        top = tokens.masked_fill(exists == 0, -torch.inf).amax(1)
        pooled = torch.cat([mean, top, run], dim=-1)
        around = self.context_encoder(pooled).unsqueeze(1).expand(-1, tokens.shape[1], -1)
        estimate = self.estimate_head(torch.cat([tokens, around], dim=-1))
        features = torch.cat([modules[..., _COLUMNS], estimate], dim=-1)
        features = (features - (features * exists).sum(1, keepdim=True) / exists.sum(1, keepdim=True)) * exists
        context = self.steering_encoder(pooled)
        gains = self.gains + self.gain_head(context)
        scores = (features @ gains.unsqueeze(-1)).squeeze(-1)
        means = torch.cat([scores, self.steering_head(context)], dim=1).clamp(-SCORE_BOUND, SCORE_BOUND)
        later = run[:, RUN_FEATURES.index("progress")] > 0
        noise = torch.where(later, LATER_NOISE, 1.0).unsqueeze(1)
        log_std = torch.cat([self.log_std[:1].expand_as(scores), self.log_std[1:].expand(len(run), -1)], dim=1)
        shared = features * (self.shared_log_std.exp() * noise).unsqueeze(1)
        factors = torch.cat([shared, shared.new_zeros(len(run), len(PLACEMENT), len(DIRECTIONS))], dim=1)
        values = torch.cat([critic(context.detach()) for critic in self.critics], dim=1)
        return Action(means, log_std.exp() * noise, factors, values, gains, estimate.squeeze(-1))


class CorrelatedGaussian:
    """The distribution of an `Action`; padding counts neither in its density nor in its entropy.

    Args:
        action: from the network, for a batch.
        mask: (batch, modules), 1 for modules that exist.
    """

    factors: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, action: Action, mask: torch.Tensor) -> None:
        placement = action.mean.shape[1] - mask.shape[1]
        self.mask: torch.Tensor = torch.cat([mask, mask.new_ones(len(mask), placement)], dim=1)
        self.mean, self.std, self.factors = action.mean, action.std, action.factors
        # Padding has a standard normal of its own, whose share is taken off again.
        self._exists, self._padding = self.mask > 0, (1 - self.mask).sum(-1)
        self._normal = LowRankMultivariateNormal(
            self.mean,
            self.factors * self.mask.unsqueeze(-1),
            torch.where(self._exists, self.std, 1.0).square(),
            validate_args=False,
        )

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability density of actions (batch, action size), shape (batch,)."""
        density: torch.Tensor = self._normal.log_prob(torch.where(self._exists, actions, self.mean))  # type: ignore[no-untyped-call]
        return density + 0.5 * math.log(2 * math.pi) * self._padding

    def entropy(self) -> torch.Tensor:
        """Entropy, shape (batch,)."""
        entropy: torch.Tensor = self._normal.entropy()  # type: ignore[no-untyped-call]
        return entropy - 0.5 * (1 + math.log(2 * math.pi)) * self._padding

    def sample(self) -> torch.Tensor:
        """Actions, (batch, action size); zero for padding.

        Noise of each number's own is drawn before the noise that is shared, unlike by torch: trainings with the same
        seed stay comparable.
        """
        alone = self.std * torch.randn_like(self.mean) * self.mask
        shared = self.factors @ torch.randn_like(self.factors[:, 0]).unsqueeze(-1)
        return self.mean + alone + shared.squeeze(-1)

    def get_actions(self, deterministic: bool = False) -> torch.Tensor:
        """The mean action, or drawn ones."""
        return self.mode() if deterministic else self.sample()

    def mode(self) -> torch.Tensor:
        """The mean action."""
        return self.mean
