"""Fits a value ensemble to plan runs: it learns differences between plans for the same task at the same decision.

It also finds how far votes on plans for unseen models can be trusted, beside what the spread of the networks tells of
it. A goal of cost takes the cheapest plan of which it is sure: the lower confidence bound of its vote, less the doubt,
is within the tolerance. The doubt is the least at which such plans keep to it on models that networks have not learned
from: calibration on held-out data, as in conformal risk control (Angelopoulos et al., 2022, arXiv 2208.02814). It is
that of the plans that are taken, since the cheapest of many is the one of which most is promised too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..agents.learned.networks import Plans, PlanValue, PlanValueConfig, PlanValueEnsemble, learns_labels
from ..agents.policy import VoteUnit
from ..common.arrays import FloatArray
from ..common.workers import worker_pool
from ..errors import ConfigError
from ..plan.goal import CAUTION, LOSS_UNIT, vote_of


@dataclass(frozen=True, eq=False)
class PlanDataset:
    """Plans and their results.

    Attributes:
        plans: one plan for each state: ranks (states, 1, modules).
        gains: minus the log of the held-out loss at the end of the run, (states,).
        reference_gains: the same of the run with plain LoRA of the same task, (states,).
        groups: number of each state's group, int64 (states,). The states of one task at one decision are a group; their
            plans can be compared.
        tasks: number of each state's task, int64 (states,).
        families: number of the family of each state's model, int64 (states,).
        weights: how often each state's task is learned from whenever it is drawn, int64 (states,).
    """

    plans: Plans
    gains: torch.Tensor
    reference_gains: torch.Tensor
    groups: torch.Tensor
    tasks: torch.Tensor
    families: torch.Tensor
    weights: torch.Tensor

    def __getitem__(self, states: torch.Tensor) -> PlanDataset:
        return PlanDataset(*(getattr(self, name)[states] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class FitConfig:
    """How a network is fitted (AdamW, one cycle of the learning rate).

    Attributes:
        epochs: passes over the groups of the tasks that the network's draw contains.
        batch: groups a step.
        rate: the highest learning rate.
        decay: weight decay.

    Raises:
        ConfigError: a value out of range.
    """

    epochs: int = 30
    batch: int = 32
    rate: float = 2e-3
    decay: float = 0.05

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or not self.rate > 0 or not self.decay >= 0:
            raise ConfigError(
                "epochs and batch of a fit are at least 1, rate above 0 and decay at least 0; got "
                f"{self.epochs}, {self.batch}, {self.rate} and {self.decay}."
            )


ANY_COST = PlanValueConfig(unit="log loss")
"""The value ensemble of new policies: it tells plans of any cost apart."""

LEAST_SPREAD = 0.02
"""Added to the standard deviation of a group's gains, in log loss: smaller differences are noise."""

MOST_GAIN = 1.0
"""The most by which a gain may differ from the median of its group, in log loss; larger differences are clipped."""


SURE = 0.8
"""The share of fine-tunes of unseen models whose plan, if it is not plain LoRA, loses no more than is tolerated."""

TOLERANCES = (0.005, 0.01, 0.02, 0.05)
"""The doubt is right on the mean of these."""

DOUBTS = np.arange(0.0, 4.01, 0.05).round(2)
"""What a doubt may be, in votes."""


@dataclass(frozen=True, eq=False)
class _Fit:
    """The fit of one network, without tensors: those would reach another process through shared memory.

    Attributes:
        number: of the fit.
        size: of the network.
        fit: how it is fitted.
        plans: the arrays of `Plans` by name, with rows in the order of the groups.
        targets: what the network learns, (rows,).
        sizes: number of rows of each group, (groups,).
        times: how often each group is learned from in a pass, (groups,).
        seed: decides the order of groups, and dropout.
    """

    number: int
    size: PlanValueConfig
    fit: FitConfig
    plans: dict[str, NDArray[Any]]
    targets: NDArray[np.float32]
    sizes: list[int]
    times: NDArray[np.int64]
    seed: int


@dataclass(frozen=True, eq=False)
class _Fitted:
    """Weights by name, and predictions for the groups that it has not learned from, NaN for the others, (rows,)."""

    weights: dict[str, NDArray[Any]]
    unseen: NDArray[np.float32]


def fit_value_ensemble(
    ensemble: PlanValueEnsemble, dataset: PlanDataset, *, seed: int, fit: FitConfig | None = None, workers: int = 1
) -> dict[str, float]:
    """Fit each network of an ensemble to the groups of other tasks, which are drawn with replacement.

    The networks learn differences inside a group: its mean is taken off predictions and targets. The targets are in the
    unit of the ensemble's values. The range of each feature of the run becomes part of its settings. Votes on the log
    loss are then judged: for each family of models as many more networks learn from the same draws without it.

    Args:
        ensemble: its networks start anew.
        dataset: groups of several states each.
        seed: decides the draws of tasks, the order of groups, and dropout.
        fit: how each network is fitted.
        workers: number of processes; the result does not depend on it.

    Returns:
        "explained": the share of the variance inside groups that the ensemble explains on tasks that a network has not
        learned from. Empty if there are no such tasks, or if all plans of a group have the same result. For votes on
        the log loss also "doubt" and "doubt on labels", which are part of the ensemble's settings from then on, and
        with several families "explained elsewhere", the same share on families that a network has not learned from.
    """
    groups = groups_of(dataset.groups)
    rows = torch.cat(groups)
    sizes = [len(group) for group in groups]
    unit = ensemble.config.unit
    targets = torch.cat([targets_of(dataset.gains[group], dataset.reference_gains[group], unit) for group in groups])
    ordered = dataset.plans[rows]
    plans = {name: getattr(ordered, name).numpy() for name in Plans.__dataclass_fields__}
    firsts = [int(group[0]) for group in groups]
    tasks = torch.unique(dataset.tasks, return_inverse=True)[1][firsts].numpy()
    families = dataset.families[firsts].numpy()
    count = len(ensemble.critics)
    repeats = dataset.weights[firsts].numpy()
    draws = [repeats * _times(tasks, seed * count + number) for number in range(count)]
    if unit == "log loss" and len(np.unique(families)) > 1:
        draws += [_without(families == family, times) for family in np.unique(families) for times in draws[:count]]
    pieces = [
        _Fit(number, ensemble.config, fit or FitConfig(), plans, targets.numpy(), sizes, times, seed * count + number)
        for number, times in enumerate(draws)
    ]
    predicted = torch.full((len(pieces), len(rows)), torch.nan)
    with worker_pool(min(workers, len(pieces))) as pool:
        for piece, fitted in pool.spread(_fit_one, pieces, lambda piece: f"the fit of value network {piece.number}"):
            predicted[piece.number] = torch.from_numpy(fitted.unseen)
            if piece.number < count:
                weights = {name: torch.from_numpy(values) for name, values in fitted.weights.items()}
                ensemble.critics[piece.number].load_state_dict(weights)
    ensemble.eval()
    lowest, highest = (bound.tolist() for bound in torch.aminmax(dataset.plans.run, dim=0))
    ensemble.config = replace(ensemble.config, lowest=tuple(lowest), highest=tuple(highest))
    facts = _explained("explained", predicted[:count].nanmean(dim=0), targets)
    if facts and unit == "log loss":
        judged = _elsewhere(predicted, count, np.repeat(families, sizes)) if len(pieces) > count else predicted
        facts |= _explained("explained elsewhere", judged.mean(dim=0), targets) if len(pieces) > count else {}
        on_texts, on_labels = doubts_of(judged, targets, dataset[rows], sizes)
        ensemble.config = replace(ensemble.config, doubt=on_texts, doubt_on_labels=on_labels)
        facts |= {"doubt": on_texts, "doubt on labels": on_labels}
    return facts


def _elsewhere(predicted: torch.Tensor, count: int, families: NDArray[np.int64]) -> torch.Tensor:
    """What networks expect of plans for the family that they have not learned from, (count, rows).

    Args:
        predicted: by the networks of the ensemble, then by as many for each family, in the order of their numbers.
        count: of networks of the ensemble.
        families: of the rows, (rows,).
    """
    found = torch.full_like(predicted[:count], torch.nan)
    for place, family in enumerate(np.unique(families), start=1):
        rows = torch.from_numpy(families == family)
        found[:, rows] = predicted[place * count : (place + 1) * count, rows]
    return found


def _without(left_out: NDArray[np.bool_], times: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each group is learned from if some are left out, (groups,): the others once if none was drawn."""
    others = np.where(left_out, 0, times)
    return others if others.any() else (~left_out).astype(np.int64)


def _times(tasks: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """How often each group is learned from if tasks are drawn with replacement, (groups,).

    Args:
        tasks: number of each group's task, from 0 on, (groups,).
        seed: of the draw.
    """
    count = int(tasks.max()) + 1
    drawn = np.random.default_rng(seed).integers(count, size=count)
    return np.bincount(drawn, minlength=count)[tasks]


def _explained(name: str, predicted: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The share of the variance of targets that is explained where something was predicted; empty if nothing was."""
    known = ~predicted.isnan()
    truth = targets[known]
    return {name: float(1 - (predicted[known] - truth).square().sum() / truth.square().sum())} if truth.any() else {}


def groups_of(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Rows of each group of two states or more."""
    order = torch.argsort(numbers, stable=True)
    sizes = torch.unique_consecutive(numbers[order], return_counts=True)[1].tolist()
    return [group for group in torch.split(order, sizes) if len(group) > 1]


def targets_of(gains: torch.Tensor, reference: torch.Tensor, unit: VoteUnit) -> torch.Tensor:
    """What a network learns of one group, in a unit: differences between its states, centred, (states,).

    Args:
        gains: of the group, (states,).
        reference: the gain of plain LoRA, (states,).
        unit: see `PlanValueConfig`.
    """
    if unit == "spread":
        return standardised(gains)
    votes = torch.asinh((gains - reference) / LOSS_UNIT)
    return votes - votes.mean()


def standardised(gains: torch.Tensor) -> torch.Tensor:
    """The targets of a group: its gains minus their mean, in standard deviations, (states,)."""
    near = _near(gains)
    return (near - near.mean()) / spread_of(gains)


def spread_of(gains: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the gains of groups (..., states), clipped, and with `LEAST_SPREAD` added, (..., 1)."""
    return _near(gains).std(dim=-1, keepdim=True, unbiased=False) + LEAST_SPREAD


def _near(gains: torch.Tensor) -> torch.Tensor:
    return (gains - gains.median(dim=-1, keepdim=True).values).clamp(-MOST_GAIN, MOST_GAIN)


def _fit_one(piece: _Fit) -> _Fitted:
    plans = Plans(**{name: torch.from_numpy(values) for name, values in piece.plans.items()})
    groups = list(torch.split(torch.arange(len(piece.targets)), piece.sizes))
    learned = [group for group, times in zip(groups, piece.times.tolist(), strict=True) for _ in range(times)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(piece.seed)
        network = PlanValue(piece.size)
        _learn(network, plans, torch.from_numpy(piece.targets), learned, piece.fit)
    predicted = torch.full((len(piece.targets),), torch.nan)
    unseen = [group for group, times in zip(groups, piece.times.tolist(), strict=True) if not times]
    with torch.no_grad():
        for start in range(0, len(unseen), piece.fit.batch):
            batch = unseen[start : start + piece.fit.batch]
            predicted[torch.cat(batch)] = _centred(network, plans, batch)
    return _Fitted({name: value.numpy() for name, value in network.state_dict().items()}, predicted.numpy())


def _centred(network: nn.Module, plans: Plans, groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """A network's predictions for groups, minus the mean of each group."""
    predicted = network(plans[torch.cat(list(groups))]).squeeze(1)
    return torch.cat([part - part.mean() for part in torch.split(predicted, [len(group) for group in groups])])


def _learn(
    network: nn.Module, plans: Plans, targets: torch.Tensor, groups: Sequence[torch.Tensor], fit: FitConfig
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=fit.rate, weight_decay=fit.decay)
    steps = fit.epochs * -(-len(groups) // fit.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.rate, total_steps=steps)
    network.train()
    for _ in range(fit.epochs):
        for chosen in torch.split(torch.randperm(len(groups)), fit.batch):
            batch = [groups[index] for index in chosen.tolist()]
            loss = (_centred(network, plans, batch) - targets[torch.cat(batch)]).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()


# The doubt ------------------------------------------------------------------------------------------------------------


def doubts_of(
    predicted: torch.Tensor, targets: torch.Tensor, ordered: PlanDataset, sizes: Sequence[int]
) -> tuple[float, float]:
    """The doubt in runs that learn texts and in those that learn labels; one is the other's where no task tells it.

    Args:
        predicted: what each network expects of plans that it has not learned from, NaN for others, (networks, rows).
        targets: what is true, (rows,).
        ordered: the rows in the order of the groups.
        sizes: of the groups.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    families = ordered.families.numpy()[starts]
    on_labels = np.array([learns_labels(run) for run in ordered.plans.run[starts].tolist()])
    adapted = (ordered.plans.ranks[:, 0] > 0).sum(dim=1)
    judged = [
        _judged(*parts)
        for parts in zip(
            torch.split(predicted, list(sizes), dim=1),
            torch.split(targets, list(sizes)),
            torch.split(adapted, list(sizes)),
            torch.split(ordered.gains == ordered.reference_gains, list(sizes)),
            strict=True,
        )
    ]

    def doubt_in(kind: NDArray[np.bool_]) -> float:
        counted = kind if kind.any() else ~kind
        return doubt_of([each for each, counts in zip(judged, counted, strict=True) if counts], families[counted])

    return doubt_in(~on_labels), doubt_in(on_labels)


def _judged(
    predicted: torch.Tensor, targets: torch.Tensor, adapted: torch.Tensor, is_reference: torch.Tensor
) -> FloatArray:
    """A group's plans, the cheapest first: lower confidence bounds and the truth, against plain LoRA, (2, plans).

    Plans that adapt fewer modules stand for cheaper ones. (2, 0) where nothing is known.

    Args:
        predicted: by each network, (networks, rows).
        targets: (rows,).
        adapted: modules, (rows,).
        is_reference: which rows are plain LoRA, or ended like it, bool (rows,).
    """
    unseen = predicted[~predicted.isnan().any(dim=1)]
    if not len(unseen) or not is_reference.any():
        return np.zeros((2, 0))
    votes = unseen - unseen[:, is_reference].mean(dim=1, keepdim=True)
    bounds = votes.mean(dim=0) - CAUTION * votes.std(dim=0, unbiased=False)
    truth = targets - targets[is_reference].mean()
    order = adapted[~is_reference].argsort(stable=True)
    return torch.stack([bounds, truth])[:, ~is_reference][:, order].double().numpy()


def doubt_of(judged: Sequence[FloatArray], families: NDArray[np.int64]) -> float:
    """The least doubt at which the share `SURE` of the plans that are taken lose no more than is tolerated.

    All families count alike, however many tasks they have. 0 where nothing is known.

    Args:
        judged: of each group, bounds on its plans and the truth, as votes against plain LoRA, (2, plans), the cheapest
            plan first.
        families: of the groups.
    """
    known = [[judged[group] for group in np.flatnonzero(families == family).tolist()] for family in np.unique(families)]
    for doubt in DOUBTS if known else ():
        if np.mean([_kept(groups, doubt) for groups in known]) >= SURE:
            return float(doubt)
    return float(DOUBTS[-1]) if known else 0.0


def _kept(groups: Sequence[FloatArray], doubt: float) -> float:
    """The share of plans taken in a family's groups that lose no more than is tolerated, on the mean of tolerances."""
    shares = []
    for least in map(vote_of, (-tolerance for tolerance in TOLERANCES)):
        sure = [(bounds - doubt >= least, truth) for bounds, truth in groups]
        taken = [truth[fits.argmax()] for fits, truth in sure if fits.any()]
        shares.append(float((np.array(taken) >= least).mean()) if taken else 1.0)
    return float(np.mean(shares))
