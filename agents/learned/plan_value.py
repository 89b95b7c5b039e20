"""The value of a plan: how much lower the held-out loss will be than with other plans for the same task.

The unit is the standard deviation of the log loss between plans for one task, because losses differ a hundred times
more on some tasks than on others. A network estimates the value from what the policy sees and the plan. Several of them
make a value ensemble. They differ where they have learned from few plans, so a policy chooses by the lower confidence
bound (as in Ghasemipour et al., 2022, arXiv 2205.13703).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...errors import ConfigError

PLAN_FEATURES = 4
"""Features of a module in a plan: log2(1 + rank), whether it is adapted, log2(1 + rank) minus its mean, rank / 32."""

_SUMMARY = 5
"""Number of features of a plan as a whole."""

_RELATIVE_DEPTH = MODULE_FEATURES.index("relative_depth")


@dataclass(frozen=True)
class PlanValueConfig:
    """Size of a value ensemble.

    Attributes:
        count: number of networks.
        width: of every hidden layer.
        dropout: share of the last hidden layer that is left out in each step of a fit.

    Raises:
        ConfigError: a value out of range.
    """

    count: int = 4
    width: int = 48
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.count, self.width) < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                "count and width of the value ensemble are at least 1 and dropout is from 0 to below 1; got "
                f"{self.count}, {self.width} and {self.dropout}."
            )


@dataclass(frozen=True, eq=False)
class Plans:
    """Plans for several states, a state being what a policy sees at a decision.

    Attributes:
        modules: features of the modules, (states, modules, len(MODULE_FEATURES)).
        scores: the actor's, minus their mean, (states, modules).
        run: features of the run, (states, len(RUN_FEATURES)).
        mask: (states, modules), 1 for modules that exist.
        ranks: (states, plans, modules).
    """

    modules: torch.Tensor
    scores: torch.Tensor
    run: torch.Tensor
    mask: torch.Tensor
    ranks: torch.Tensor

    def __getitem__(self, states: torch.Tensor) -> Plans:
        return Plans(*(getattr(self, name)[states] for name in self.__dataclass_fields__))


class PlanValue(nn.Module):
    """A network that estimates the value of plans.

    Args:
        config: size of the network.
    """

    def __init__(self, config: PlanValueConfig) -> None:
        super().__init__()
        width, run = config.width, len(RUN_FEATURES)
        self.encoder = nn.Sequential(
            nn.Linear(len(MODULE_FEATURES) + 1 + PLAN_FEATURES + run, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
        )
        self.head = nn.Sequential(
            nn.Linear(3 * width + run + _SUMMARY, width), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(width, 1)
        )

    def forward(self, plans: Plans) -> torch.Tensor:
        """The values, (states, plans); only their differences between plans for one state have a meaning."""
        exists = plans.mask[:, None, :, None].to(plans.modules.dtype)
        count = exists.sum(2)
        ranks = plans.ranks.to(plans.modules.dtype).unsqueeze(-1)
        logs = torch.log2(1 + ranks) * exists
        adapted = (ranks > 0) * exists
        relative = (logs - (logs.sum(2) / count).unsqueeze(2)) * exists
        planned = torch.cat([logs / 3, adapted, relative / 2, ranks / 32], -1)
        seen = torch.cat([plans.modules, plans.scores.clamp(-3, 3).unsqueeze(-1)], -1)
        shape = (*plans.ranks.shape, -1)
        tokens = self.encoder(
            torch.cat([seen[:, None].expand(shape), planned, plans.run[:, None, None].expand(shape)], dim=-1)
        )
        depth = plans.modules[..., _RELATIVE_DEPTH][:, None].expand(plans.ranks.shape)
        lowest = torch.where(adapted.squeeze(-1) > 0, depth, 1.0).amin(2, keepdim=True)
        # Share of adapted modules, mean log2(1 + rank) of all and of the adapted ones, lowest adapted layer, spread.
        used = adapted.sum(2).clamp_min(1)
        spread = ((relative**2).sum(2) / count).clamp_min(1e-12).sqrt()
        summary = torch.cat(
            [adapted.sum(2) / count, logs.sum(2) / count / 3, logs.sum(2) / used / 3, lowest, spread], dim=-1
        )
        pooled = torch.cat(
            [
                (tokens * exists).sum(2) / count,
                tokens.masked_fill(exists == 0, -torch.inf).amax(2),
                (tokens * adapted).sum(2) / used,
                plans.run[:, None].expand(-1, tokens.shape[1], -1),
                summary,
            ],
            dim=-1,
        )
        return self.head(pooled).squeeze(-1)  # type: ignore[no-any-return]


class PlanValueEnsemble(nn.Module):
    """Several networks of one kind, each of which learns from other plans.

    Args:
        config: number and size of the networks.
    """

    def __init__(self, config: PlanValueConfig | None = None) -> None:
        super().__init__()
        self.config = config or PlanValueConfig()
        self.critics = nn.ModuleList(PlanValue(self.config) for _ in range(self.config.count))

    def forward(self, plans: Plans) -> torch.Tensor:
        """The values by each network, (networks, states, plans)."""
        return torch.stack([critic(plans) for critic in self.critics])
