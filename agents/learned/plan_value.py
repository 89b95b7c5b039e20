"""Critics that judge plans: what a run will gain if a decision leads to these ranks.

A policy's mean action is one answer; a critic can compare many. It reads what the policy reads and a plan, and tells
by how much the held-out loss will be lower than that of other plans, in standard deviations of the log loss between
plans for the same task: what is at stake differs a hundredfold from task to task. Several critics disagree where they
have seen little, and what they disagree about is not worth a risk (the lower bound of an ensemble, as in Ghasemipour et
al., 2022, arXiv 2205.13703).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...errors import ConfigError

PLAN_FEATURES = 4
"""Of a module in a plan: log2(1 + rank), whether it is adapted, the former less the plan's mean, and rank over 32."""

_SUMMARY = 5
_RELATIVE_DEPTH = MODULE_FEATURES.index("relative_depth")


@dataclass(frozen=True)
class PlanValueConfig:
    """Size of the critics.

    Attributes:
        count: how many there are.
        width: of every hidden layer.
        dropout: share of the last hidden layer that each fit's step leaves out.

    Raises:
        ConfigError: a value out of range.
    """

    count: int = 4
    width: int = 48
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.count, self.width) < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                "count and width of the plan critics are at least 1 and dropout is from 0 to below 1; got "
                f"{self.count}, {self.width} and {self.dropout}."
            )


@dataclass(frozen=True, eq=False)
class Plans:
    """States, and plans for each.

    Attributes:
        modules: (states, modules, len(MODULE_FEATURES)).
        scores: the actor's, centred, (states, modules).
        run: (states, len(RUN_FEATURES)).
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
    """One critic.

    Args:
        config: its size.
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
        """Gains in standard deviations, up to a constant for each state, (states, plans)."""
        exists = plans.mask[:, None, :, None].to(plans.modules.dtype)
        count = exists.sum(2)
        ranks = plans.ranks.to(plans.modules.dtype).unsqueeze(-1)
        logs = torch.log2(1 + ranks) * exists
        adapted = (ranks > 0) * exists
        relative = (logs - (logs.sum(2) / count).unsqueeze(2)) * exists
        own = torch.cat([logs / 3, adapted, relative / 2, ranks / 32], -1)
        seen = torch.cat([plans.modules, plans.scores.clamp(-3, 3).unsqueeze(-1)], -1)
        shape = (*plans.ranks.shape, -1)
        tokens = self.encoder(
            torch.cat([seen[:, None].expand(shape), own, plans.run[:, None, None].expand(shape)], dim=-1)
        )
        used = adapted.sum(2).clamp_min(1)
        depth = plans.modules[..., _RELATIVE_DEPTH][:, None].expand(plans.ranks.shape)
        lowest = torch.where(adapted.squeeze(-1) > 0, depth, 1.0).amin(2, keepdim=True)
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
    """Several critics.

    Args:
        config: how many, and their size.
    """

    def __init__(self, config: PlanValueConfig | None = None) -> None:
        super().__init__()
        self.config = config or PlanValueConfig()
        self.critics = nn.ModuleList(PlanValue(self.config) for _ in range(self.config.count))

    def forward(self, plans: Plans) -> torch.Tensor:
        """What each critic says, (critics, states, plans)."""
        return torch.stack([critic(plans) for critic in self.critics])
