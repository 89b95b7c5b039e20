"""The policy network: one set of weights for every module, so that any number of modules fits.

Each module's features and the run's become a token; mean and maximum over the modules give the context. Two parts use
it:

* the *estimate*: what each module is worth, a score from its token and the context. The warm start teaches it, and it
  is 0 before;
* the *steering*: a gain for each direction (the signals, relative depth, rank cost and the estimate), of which the
  scores are the weighted sum, and two numbers that correct the rank floor and the depth bias. PPO trains it alone: a
  dozen numbers for a decision, where one for each module moved the policy by dozens of nats in a single update
  (docs/experiments.md).

All corrections start at zero: an untrained network *is* the rule (top-down's placement, signal-mean's reallocation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...allocation.actions import PLACEMENT, SCORE_BOUND
from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...lora.signals import SIGNALS
from ..rules.by_signal import MEAN_SIGNALS
from .config import NetworkConfig

DIRECTIONS = (*SIGNALS, "relative_depth", "rank_cost", "estimate")
"""What scores are made of: the context sets a gain for each, and exploration shares a draw among the modules."""

LATER_NOISE = 0.5
"""Exploration at decisions after the first, as a share of that at the first: later ones move rank by two rungs."""

_COLUMNS = [MODULE_FEATURES.index(name) for name in DIRECTIONS[:-1]]


@dataclass(frozen=True, eq=False)
class Action:
    """A distribution over actions, and what it is worth; the action is a score for each module and then STEERING.

    Attributes:
        mean: (batch, modules + 2), zero for padding.
        std: of each number's own noise, the same shape.
        factors: of the noise that modules share, (batch, modules + 2, len(DIRECTIONS)): noise is std * e + factors @ z.
        values: what each critic expects of the run, in shares of the headroom over the rule, (batch, critics).
    """

    mean: torch.Tensor
    std: torch.Tensor
    factors: torch.Tensor
    values: torch.Tensor


class RankNetwork(nn.Module):
    """Scores for every module, steering numbers, and values.

    Args:
        config: its size and start.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config or NetworkConfig()
        width = self.config.width
        self.module_encoder = nn.Sequential(
            nn.Linear(len(MODULE_FEATURES) + len(RUN_FEATURES), width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.context_encoder = nn.Sequential(nn.Linear(2 * width + len(RUN_FEATURES), width), nn.Tanh())
        self.estimate_head = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        self.steering_encoder = nn.Sequential(nn.Linear(2 * width + len(RUN_FEATURES), width), nn.Tanh())
        self.gain_head = nn.Linear(width, len(DIRECTIONS))
        self.steering_head = nn.Linear(width, len(PLACEMENT))
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)) for _ in range(self.config.critics)
        )
        gains = [
            self.config.signal_gain / len(MEAN_SIGNALS) if name in MEAN_SIGNALS else 0.0 for name in DIRECTIONS[:-1]
        ]
        self.gains = nn.Parameter(torch.tensor([*gains, 1.0]))
        stds = [self.config.score_std, self.config.rank_floor_std, self.config.depth_bias_std]
        self.log_std = nn.Parameter(torch.tensor(stds).log())
        self.shared_log_std = nn.Parameter(torch.full((len(DIRECTIONS),), self.config.shared_std).log())
        for head in (self.estimate_head[-1], self.gain_head, self.steering_head):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def freeze_estimate(self) -> None:
        """Leave the estimate as it is from here on."""
        for part in (self.module_encoder, self.context_encoder, self.estimate_head):
            part.requires_grad_(False)

    def forward(self, modules: torch.Tensor, run: torch.Tensor, mask: torch.Tensor) -> Action:
        """The distribution of the action, and values.

        Args:
            modules: (batch, modules, len(MODULE_FEATURES)).
            run: (batch, len(RUN_FEATURES)).
            mask: (batch, modules), 1 for modules that exist.
        """
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
        scores = (features @ (self.gains + self.gain_head(context)).unsqueeze(-1)).squeeze(-1)
        means = torch.cat([scores, self.steering_head(context)], dim=1).clamp(-SCORE_BOUND, SCORE_BOUND)
        later = run[:, RUN_FEATURES.index("progress")] > 0
        noise = torch.where(later, LATER_NOISE, 1.0).unsqueeze(1)
        own = (
            torch.cat([self.log_std[:1].expand_as(scores), self.log_std[1:].expand(len(run), -1)], dim=1).exp() * noise
        )
        shared = features * (self.shared_log_std.exp() * noise).unsqueeze(1)
        factors = torch.cat([shared, shared.new_zeros(len(run), len(PLACEMENT), len(DIRECTIONS))], dim=1)
        values = torch.cat([critic(context.detach()) for critic in self.critics], dim=1)
        return Action(means, own, factors, values)
