"""The network of an agent: one set of weights shared by all groups of modules, so it can steer any model.

Each group is a token: its features concatenated with those of the run. Mean and maximum over the groups form the
context. Each group gets a score, to grow, from its token and the context; the learning-rate actions and the value of
the run are computed from the context alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..common.checks import is_count
from ..common.errors import ConfigError, shown
from ..decide.groups import GROUP_FEATURES, RATE_CHANGES
from ..decide.observation import RUN_FEATURES

MOST_WIDTH = 8192
"""Maximum width of a hidden layer: a policy's card requests it before weights are read."""


@dataclass(frozen=True)
class NetworkConfig:
    """Configuration of a network.

    Attributes:
        width: width of every hidden layer.

    Raises:
        ConfigError: a value out of range.
    """

    width: int = 64

    def __post_init__(self) -> None:
        if not is_count(self.width) or self.width > MOST_WIDTH:
            given = shown(self.width)
            raise ConfigError(f"The width of a network must be a whole number from 1 to {MOST_WIDTH}; got {given}.")


class GroupNetwork(nn.Module):
    """Compute the scores of all actions and the value of the run.

    Args:
        config: configuration of the network.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, group, run = config.width, len(GROUP_FEATURES), len(RUN_FEATURES)
        self.config = config
        self.token = nn.Sequential(nn.Linear(group + run, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.context = nn.Sequential(nn.Linear(2 * width + run, width), nn.Tanh())
        self.moves = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1))
        self.rate = nn.Linear(width, len(RATE_CHANGES))
        self.worth = nn.Sequential(nn.Linear(2 * width + run, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(
        self, groups: torch.Tensor, present: torch.Tensor, run: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (batch, 4 + groups), in the order of `GroupView`'s actions, and values (batch, 1).

        Args:
            groups: features of each group, (batch, groups, len(GROUP_FEATURES)).
            present: 1 for groups in layers, (batch, groups); the others are excluded from the context.
            run: features of the run, (batch, len(RUN_FEATURES)).
        """
        beside = run[:, None].expand(-1, groups.shape[1], -1)
        tokens = self.token(torch.cat([groups, beside], dim=2))
        there = present[:, :, None].to(tokens.dtype)
        mean = (tokens * there).sum(dim=1) / there.sum(dim=1).clamp_min(1.0)
        most = tokens.masked_fill(there == 0, -1.0).amax(dim=1)
        seen = torch.cat([mean, most, run], dim=1)
        context = self.context(seen)
        moves = self.moves(torch.cat([tokens, context[:, None].expand(-1, groups.shape[1], -1)], dim=2))
        return torch.cat([self.rate(context), moves[:, :, 0]], dim=1), self.worth(seen)
