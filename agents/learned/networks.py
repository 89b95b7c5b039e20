"""The networks of a learned policy: one that scores modules, and those that predict the value of a plan.

`RankNetwork`, the actor, has one set of weights for all modules, so that a model may have any number of them. The
features of a module and those of the run become a token; the mean and the maximum over the tokens are the context. Two
parts use it:

* the *estimate*: a score for each module, from its token and the context. The warm start teaches it what modules are
  worth; before that it is 0.
* the *steering*: a gain for each direction (the signals, the relative depth, the cost of a rank, and the estimate), and
  the placement. Scores are the sum of the directions, each times its gain. PPO trains the steering alone: these are a
  dozen numbers for a decision. One number for each module changed the policy far too much in a single update
  (docs/experiments.md).

At first all that training can change is zero, and the network does what the rule signal-mean does. It explores with
correlated noise (`CorrelatedGaussian`).

`PlanValue` predicts how much lower the held-out loss will be under a plan than under other plans for the same task.
Losses differ a hundred times more on some tasks than on others. So the unit is either the standard deviation of the log
loss between plans for one task, or the difference to plain LoRA as a vote (`plan/goal.py`), which tells plans of any
cost apart. Several such networks make a value ensemble. They differ where they have learned from few plans, so a policy
chooses by the lower confidence bound (as in Ghasemipour et al., 2022, arXiv 2205.13703).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal
from torch.nn.functional import linear

from ...errors import ConfigError, shown
from ...lora.adapters import SIGNALS
from ...plan.plan import PLACEMENT, SCORE_BOUND
from ..observation import MODULE_FEATURES, MOST_FEATURE, RUN_FEATURES, Inputs
from ..policy import Outside, VoteUnit
from ..rules import MEAN_SIGNALS
from ..settings import MOST_NETWORKS, MOST_WIDTH, NetworkConfig

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


PLAN_FEATURES = 4
"""Features of a module in a plan: log2(1 + rank), whether it is adapted, log2(1 + rank) minus its mean, rank / 32."""

_SUMMARY = 5
"""Number of features of a plan as a whole."""

LEAST_DISTANCE = 0.05
"""A feature of the run that lies outside of its range by less is taken for inside."""

TOKENS_AT_ONCE = 2048
"""Modules, counted in each plan, that go through a value network together: so many fit into a processor's cache."""

FEW = 0.2
"""A loss that counts a smaller share of the tokens is about labels, one for each row."""

_RELATIVE_DEPTH = MODULE_FEATURES.index("relative_depth")
_PREDICTED = RUN_FEATURES.index("predicted")


def learns_labels(run: Sequence[float]) -> bool:
    """Whether a run learns classes or numbers, not texts: its loss counts less than `FEW` of the tokens.

    Args:
        run: features of the run, (len(RUN_FEATURES),).
    """
    return run[_PREDICTED] < math.log2(FEW) / 4


@dataclass(frozen=True)
class PlanValueConfig:
    """Size of a value ensemble.

    Attributes:
        count: number of networks.
        width: of every hidden layer.
        dropout: share of the last hidden layer that is left out in each step of a fit.
        unit: of values: "log loss", votes on the difference to plain LoRA; "spread", standard deviations between plans.
        doubt: what goals of cost take off votes beside the spread of the networks, at least 0; a fit finds it.
        doubt_on_labels: the same in runs that learn labels, see `learns_labels`; None for `doubt`.
        lowest, highest: of each feature of the run in what the networks have learned from, in the order of
            `RUN_FEATURES`, by the fit; empty where that is not known.

    Raises:
        ConfigError: a value out of range.
    """

    count: int = 4
    width: int = 48
    dropout: float = 0.1
    unit: VoteUnit = "spread"
    doubt: float = 0.0
    doubt_on_labels: float | None = None
    lowest: tuple[float, ...] = ()
    highest: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sized = 1 <= self.count <= MOST_NETWORKS and 1 <= self.width <= MOST_WIDTH
        if not sized or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"count of the value ensemble is from 1 to {MOST_NETWORKS}, width from 1 to {MOST_WIDTH} and dropout "
                f"from 0 to below 1; got {shown(self.count)}, {shown(self.width)} and {self.dropout}."
            )
        doubts = [self.doubt] if self.doubt_on_labels is None else [self.doubt, self.doubt_on_labels]
        if not all(0 <= doubt < math.inf for doubt in doubts):
            raise ConfigError(f"doubts of the value ensemble are at least 0 and finite; got {doubts}.")
        if self.unit not in get_args(VoteUnit):
            raise ConfigError(f"unit of the value ensemble is one of {get_args(VoteUnit)}; got {self.unit!r}.")
        paired = len(self.lowest) == len(self.highest) <= len(RUN_FEATURES)
        if not paired or not all(-MOST_FEATURE <= low <= high <= MOST_FEATURE for low, high in self.ranges):
            raise ConfigError(
                f"lowest and highest of the value ensemble are a number from {-MOST_FEATURE:g} to {MOST_FEATURE:g} for "
                f"each of at most {len(RUN_FEATURES)} features, the lowest first; got {shown(self.lowest)} and "
                f"{shown(self.highest)}."
            )

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """The lowest and the highest value of each feature of the run."""
        return tuple(zip(self.lowest, self.highest, strict=False))

    def doubt_of(self, run: Sequence[float]) -> float:
        """The doubt in a run.

        Args:
            run: features of the run, (len(RUN_FEATURES),).
        """
        return self.doubt if self.doubt_on_labels is None or not learns_labels(run) else self.doubt_on_labels

    def outside(self, run: Sequence[float]) -> dict[str, Outside]:
        """The features of a run that lie outside of what the networks have learned from; see `Deliberation.outside`.

        Args:
            run: features of the run, (len(RUN_FEATURES),).
        """
        return {
            name: (value, low, high)
            for name, (low, high), value in zip(RUN_FEATURES, self.ranges, run, strict=False)
            if max(low - value, value - high) > LEAST_DISTANCE
        }


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


@dataclass(frozen=True, eq=False)
class _Features:
    """What a network sees of plans.

    Attributes:
        of_state: of each module whatever the plan, (states, modules, inputs.modules + 1).
        of_plan: of each module in each plan, (states, plans, modules, PLAN_FEATURES).
        run: features of the run, (states, 1, inputs.run).
        weights: of each module in two means, over all modules and over adapted ones, (states, plans, 2, modules).
        absent: 0 for modules that exist and -2 for others, (states, 1, modules, 1).
        summary: of each plan as a whole, (states, plans, _SUMMARY).
    """

    of_state: torch.Tensor
    of_plan: torch.Tensor
    run: torch.Tensor
    weights: torch.Tensor
    absent: torch.Tensor
    summary: torch.Tensor

    @classmethod
    def of(cls, plans: Plans, inputs: Inputs) -> _Features:
        """The features of plans, of which a network reads these."""
        exists = plans.mask[:, None].to(plans.modules.dtype)
        count = exists.sum(2, keepdim=True)
        ranks = plans.ranks.to(plans.modules.dtype)
        logs = torch.log2(1 + ranks) * exists
        adapted = (ranks > 0) * exists
        total, used = logs.sum(2, keepdim=True), adapted.sum(2, keepdim=True).clamp_min(1)
        relative = (logs - total / count) * exists
        depth = plans.modules[:, None, :, _RELATIVE_DEPTH].expand(ranks.shape)
        lowest = torch.where(adapted > 0, depth, 1.0).amin(2, keepdim=True)
        spread = (relative.square().sum(2, keepdim=True) / count).clamp_min(1e-12).sqrt()
        weights = torch.stack([(exists / count).expand(ranks.shape), adapted / used], dim=2)
        scores = plans.scores.clamp(-MOST_FEATURE, MOST_FEATURE)
        return cls(
            torch.cat([plans.modules[..., : inputs.modules], scores.unsqueeze(-1)], -1),
            torch.stack([logs / 3, adapted, relative / 2, ranks / 32], -1),
            plans.run[:, None, : inputs.run],
            weights,
            2 * (exists - 1).unsqueeze(-1),
            # Share of adapted modules, mean log2(1 + rank) of all and of adapted ones, lowest adapted layer, spread.
            torch.cat([adapted.sum(2, keepdim=True) / count, total / count / 3, total / used / 3, lowest, spread], -1),
        )


class _Tanh(nn.Module):
    """tanh(x), from the logistic function: torch computes that one ten times as fast on a CPU."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(2 * values) - 1


class PlanValue(nn.Module):
    """A network that estimates the value of plans.

    Args:
        config: size of the network.
        inputs: the features that it reads; all by default.
    """

    def __init__(self, config: PlanValueConfig, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.inputs: Inputs = inputs or Inputs()
        width, run = config.width, self.inputs.run
        self.encoder: nn.Sequential = nn.Sequential(
            nn.Linear(self.inputs.modules + 1 + PLAN_FEATURES + run, width),
            _Tanh(),
            nn.Linear(width, width),
            _Tanh(),
        )
        self.head: nn.Sequential = nn.Sequential(
            nn.Linear(3 * width + run + _SUMMARY, width), _Tanh(), nn.Dropout(config.dropout), nn.Linear(width, 1)
        )

    def forward(self, plans: Plans, seen: _Features | None = None) -> torch.Tensor:
        """The values, (states, plans); only their differences between plans for one state have a meaning.

        Args:
            plans: what is valued.
            seen: the features of these plans, where they are known already.
        """
        seen = seen or _Features.of(plans, self.inputs)
        weight, bias = (self.encoder.get_parameter(f"0.{name}") for name in ("weight", "bias"))
        sizes = [seen.of_state.shape[-1], PLAN_FEATURES, seen.run.shape[-1]]
        of_state, of_plan, of_run = torch.split(weight, sizes, dim=1)
        # What all plans for a state have in common goes through the first layer once.
        common = linear(seen.of_state, of_state, bias) + linear(seen.run, of_run)
        tokens = self.encoder[1:](common[:, None] + linear(seen.of_plan, of_plan))
        everywhere, where_adapted = (seen.weights @ tokens).unbind(2)
        highest = (tokens + seen.absent).amax(2)
        run = seen.run.expand(-1, tokens.shape[1], -1)
        pooled = torch.cat([everywhere, highest, where_adapted, run, seen.summary], dim=-1)
        return self.head(pooled).squeeze(-1)  # type: ignore[no-any-return]


class PlanValueEnsemble(nn.Module):
    """Several networks of one kind, each of which learns from other plans.

    Args:
        config: number and size of the networks.
        inputs: the features that they read; all by default.
    """

    config: PlanValueConfig
    inputs: Inputs

    def __init__(self, config: PlanValueConfig | None = None, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.config, self.inputs = config or PlanValueConfig(), inputs or Inputs()
        self.critics: nn.ModuleList = nn.ModuleList(
            PlanValue(self.config, self.inputs) for _ in range(self.config.count)
        )

    def forward(self, plans: Plans) -> torch.Tensor:
        """The values by each network, (networks, states, plans)."""
        distinct, places = torch.unique(plans.ranks, dim=1, return_inverse=True)
        states, _, modules = distinct.shape
        values = []
        for ranks in distinct.split(max(1, TOKENS_AT_ONCE // (states * modules)), dim=1):
            part = replace(plans, ranks=ranks)
            seen = _Features.of(part, self.inputs)
            values.append(torch.stack([critic(part, seen) for critic in self.critics]))
        return torch.cat(values, dim=2)[:, :, places]
