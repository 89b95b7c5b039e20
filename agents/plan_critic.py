"""Critics that judge plans: what a run will gain if a decision leads to these ranks.

A policy's mean action is one answer; a critic can compare many. It reads what the policy reads and a plan, and tells
by how much the held-out loss will be lower than that of other plans, in standard deviations of the log loss between
plans for the same task: what is at stake differs a hundredfold from task to task. Several critics, each fitted to its
own draw of the tasks, disagree where they have seen little, and what they disagree about is not worth a risk (the lower
bound of an ensemble, as in Ghasemipour et al., 2022, arXiv 2205.13703).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..env.observation import MODULE_FEATURES, RUN_FEATURES
from ..errors import ConfigError

PLAN_FEATURES = 4
"""Of a module in a plan: log2(1 + rank), whether it is adapted, the former less the plan's mean, and rank over 32."""

_SUMMARY = 5
_HEIGHT = MODULE_FEATURES.index("height")


@dataclass(frozen=True)
class CriticConfig:
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


class PlanCritic(nn.Module):
    """One critic.

    Args:
        config: its size.
    """

    def __init__(self, config: CriticConfig) -> None:
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
        height = plans.modules[..., _HEIGHT][:, None].expand(plans.ranks.shape)
        lowest = torch.where(adapted.squeeze(-1) > 0, height, 1.0).amin(2, keepdim=True)
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


class PlanCritics(nn.Module):
    """Several critics.

    Args:
        config: how many, and their size.
    """

    def __init__(self, config: CriticConfig | None = None) -> None:
        super().__init__()
        self.config = config or CriticConfig()
        self.critics = nn.ModuleList(PlanCritic(self.config) for _ in range(self.config.count))

    def forward(self, plans: Plans) -> torch.Tensor:
        """What each critic says, (critics, states, plans)."""
        return torch.stack([critic(plans) for critic in self.critics])


@dataclass(frozen=True, eq=False)
class Lessons:
    """What plans led to.

    Attributes:
        plans: states and one plan for each, that is ranks (states, 1, modules).
        gains: minus the log of the held-out loss at the end, (states,).
        groups: states that can be compared, of one task and one decision, have one number, int64 (states,).
        tasks: number of each state's task, int64 (states,).
    """

    plans: Plans
    gains: torch.Tensor
    groups: torch.Tensor
    tasks: torch.Tensor


EPOCHS, BATCH, RATE, DECAY = 30, 32, 2e-3, 0.05

LEAST_SPREAD = 0.02
"""Added to the standard deviation of a group's gains, in log loss: what is left below is noise."""

MOST_GAIN = 1.0
"""Gains differ from the median of their group by no more than this, in log loss."""


def fit_critics(critics: PlanCritics, lessons: Lessons, *, seed: int) -> dict[str, float]:
    """Fit critics to differences between plans for like states, each to a draw of the tasks with replacement.

    Args:
        critics: are fitted afresh; what they say of a group is compared after its mean is taken off.
        lessons: groups of several states each.
        seed: of the draws, the order of the lessons, and dropout.

    Returns:
        "explained": share of the variance inside groups that critics explain on tasks that they have not seen. Nothing
        where each has seen all of them, or all plans end alike.
    """
    groups = _groups(lessons.groups)
    targets = torch.zeros_like(lessons.gains)
    for group in groups:
        own = lessons.gains[group]
        own = (own - own.median()).clamp(-MOST_GAIN, MOST_GAIN)
        targets[group] = (own - own.mean()) / (own.std(unbiased=False) + LEAST_SPREAD)
    rows = torch.cat(groups)
    tasks = torch.unique(lessons.tasks, return_inverse=True)[1]
    said, judges = torch.zeros(len(rows)), torch.zeros(len(rows))
    for number, critic in enumerate(critics.critics):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * len(critics.critics) + number)
            count = int(tasks.max()) + 1
            drawn = torch.bincount(torch.randint(count, (count,)), minlength=count)
            _fit_one(critic, lessons.plans, targets, [g for g in groups for _ in range(int(drawn[tasks[g[0]]]))])
        unseen = drawn[tasks[rows]] == 0
        said += unseen * _said(critic, lessons.plans, groups)
        judges += unseen
    critics.eval()
    known = judges > 0
    truth = targets[rows][known]
    if not truth.any():
        return {}
    left = (said[known] / judges[known] - truth).square().sum()
    return {"explained": float(1 - left / truth.square().sum())}


def _groups(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Rows of each group of two states or more."""
    order = torch.argsort(numbers, stable=True)
    sizes = torch.unique_consecutive(numbers[order], return_counts=True)[1].tolist()
    return [group for group in torch.split(order, sizes) if len(group) > 1]


def _centred(critic: nn.Module, plans: Plans, groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a critic says of groups that follow one another, less the mean of each."""
    said = critic(plans[torch.cat(list(groups))]).squeeze(1)
    return torch.cat([part - part.mean() for part in torch.split(said, [len(group) for group in groups])])


@torch.no_grad()
def _said(critic: nn.Module, plans: Plans, groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same for many groups."""
    starts = range(0, len(groups), BATCH)
    return torch.cat([_centred(critic, plans, groups[start : start + BATCH]) for start in starts])


def _fit_one(critic: nn.Module, plans: Plans, targets: torch.Tensor, groups: Sequence[torch.Tensor]) -> None:
    for module in critic.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    optimizer = torch.optim.AdamW(critic.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(groups) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    critic.train()
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(groups)), BATCH):
            some = [groups[index] for index in chosen.tolist()]
            loss = (_centred(critic, plans, some) - targets[torch.cat(some)]).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    critic.eval()
