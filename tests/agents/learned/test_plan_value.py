"""Value ensembles: what they may look at, and that they learn which of many plans is the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans, PlanValueConfig, PlanValueEnsemble
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.common.arrays import FloatArray
from rankpilot.errors import ConfigError
from rankpilot.plan.goal import CAUTION, vote_of
from rankpilot.training.fit_plan_value import (
    FitConfig,
    PlanDataset,
    doubt_of,
    doubts_of,
    fit_value_ensemble,
    standardised,
    targets_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = PlanValueConfig(count=2, width=24)
IN_LOSSES = PlanValueConfig(count=2, width=24, unit="log loss")
TINY = PlanValueConfig(count=2, width=6)
RANKS = torch.tensor([0, 1, 2, 4, 8, 16, 32])
BUDGET = RUN_FEATURES.index("budget")
Truth = Callable[[Plans], torch.Tensor]


def some_plans(states: int = 5, plans: int = 3, modules: int = 7, seed: int = 0) -> Plans:
    """States at random, and for each some plans that differ in depth and in where the ranks are."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(1, 7, (states, plans, 1), generator=generator)
    rungs = level + torch.randint(-2, 3, (states, plans, modules), generator=generator)
    return Plans(
        torch.randn(states, modules, len(MODULE_FEATURES), generator=generator).clamp(-3, 3),
        torch.randn(states, modules, generator=generator),
        torch.rand(states, len(RUN_FEATURES), generator=generator),
        torch.ones(states, modules),
        RANKS[rungs.clamp(0, 6)],
    )


def padded(plans: Plans, filling: float = 2.9, by: int = 4) -> Plans:
    """The same with modules that do not exist, full of anything."""
    states = len(plans.mask)
    count = plans.ranks.shape[1]
    return Plans(
        torch.cat([plans.modules, torch.full((states, by, len(MODULE_FEATURES)), filling)], dim=1),
        torch.cat([plans.scores, torch.full((states, by), filling)], dim=1),
        plans.run,
        torch.cat([plans.mask, torch.zeros(states, by)], dim=1),
        torch.cat([plans.ranks, torch.full((states, count, by), round(8 * abs(filling)))], dim=2),
    )


def stirred(config: PlanValueConfig | None = None) -> PlanValueEnsemble:
    """Critics whose words differ, without dropout."""
    torch.manual_seed(1)
    critics = PlanValueEnsemble(config or PlanValueConfig(count=3, width=16))
    with torch.no_grad():
        for parameter in critics.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return critics.eval()


@torch.no_grad()
def estimates_of(critics: PlanValueEnsemble, plans: Plans) -> torch.Tensor:
    estimates: torch.Tensor = critics(plans)
    return estimates


# What they look at ----------------------------------------------------------------------------------------------------


def test_the_order_of_modules_does_not_matter() -> None:
    critics, plans = stirred(), some_plans()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    ranks_alone = replace(plans, ranks=plans.ranks[:, :, order])
    moved = replace(ranks_alone, **{name: getattr(plans, name)[:, order] for name in ("modules", "scores", "mask")})
    expected = estimates_of(critics, plans)
    torch.testing.assert_close(estimates_of(critics, moved), expected)
    assert (estimates_of(critics, ranks_alone) - expected).abs().max() > 1e-3, "where ranks are does"


def test_plans_of_one_state_say_what_each_says_alone() -> None:
    critics, plans = stirred(), some_plans()
    together = estimates_of(critics, plans)
    for state in range(5):
        for plan in range(3):
            of_state = plans[torch.tensor([state])]
            alone = replace(of_state, ranks=of_state.ranks[:, plan : plan + 1])
            torch.testing.assert_close(estimates_of(critics, alone)[:, 0, 0], together[:, state, plan])


@pytest.mark.parametrize("part", ["modules", "scores", "run"])
def test_everything_of_a_state_is_read(part: str) -> None:
    critics, plans = stirred(), some_plans()
    values = getattr(plans, part)
    for column in range(values.shape[-1]):
        other = values.clone()
        other[..., column] += 0.5
        moved = replace(plans, **{part: other})
        assert (estimates_of(critics, moved) - estimates_of(critics, plans)).abs().max() > 1e-4, column


@pytest.mark.parametrize("modules", [1, 2, 300])
def test_any_number_of_modules_and_any_ranks(modules: int) -> None:
    plans = some_plans(2, 3, modules)
    plans.ranks[:, 0] = 0
    plans.ranks[:, 1] = 64
    estimates = estimates_of(stirred(), plans)
    assert torch.isfinite(estimates).all()
    assert (estimates[:, :, 0] != estimates[:, :, 1]).all()


# What they learn ------------------------------------------------------------------------------------------------------


def dataset_on(truth: Truth, groups: int, runs: int, modules: int = 6, seed: int = 0) -> PlanDataset:
    """Groups of runs from one state each, with one plan a run; a task has two groups."""
    plans = some_plans(groups, runs, modules, seed)
    rows = plans[torch.arange(groups).repeat_interleave(runs)]
    rows = replace(rows, ranks=plans.ranks.reshape(groups * runs, 1, modules))
    numbers = torch.arange(groups).repeat_interleave(runs)
    gains = truth(rows)
    zero = torch.zeros_like(numbers)
    return PlanDataset(rows, gains, torch.zeros_like(gains), numbers, numbers // 2, zero, zero + 1)


def logs(plans: Plans) -> torch.Tensor:
    return torch.log2(1 + plans.ranks[:, 0].float())


def right_depth(plans: Plans) -> torch.Tensor:
    """A run feature tells how much rank is best; how much depends on the task."""
    return -0.3 * (logs(plans).mean(dim=1) - (1 + 3 * plans.run[:, BUDGET])).abs()


def right_module(plans: Plans) -> torch.Tensor:
    """Rank counts on one module alone, the one with the largest first feature."""
    best = plans.modules[:, :, 0].argmax(dim=1, keepdim=True)
    return 0.1 * (logs(plans).gather(1, best).squeeze(1) - logs(plans).mean(dim=1))


@dataclass(frozen=True)
class Fitted:
    truth: Truth
    critics: PlanValueEnsemble
    facts: dict[str, float]


@pytest.fixture(scope="module", params=[right_depth, right_module], ids=lambda truth: truth.__name__)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    """Critics that were taught one of two truths."""
    critics = PlanValueEnsemble(SMALL)
    facts = fit_value_ensemble(critics, dataset_on(request.param, groups=250, runs=10), seed=0)
    return Fitted(request.param, critics, facts)


def share_of_headroom(critics: PlanValueEnsemble, dataset: PlanDataset, runs: int) -> float:
    """What the plans that critics choose gain over the mean of all plans; 1 for the best, 0 for chance."""
    estimates = estimates_of(critics, dataset.plans).mean(dim=0).reshape(-1, runs)
    gains = dataset.gains.reshape(-1, runs)
    chosen = gains.gather(1, estimates.argmax(dim=1, keepdim=True)).squeeze(1)
    mean, best = gains.mean(dim=1), gains.amax(dim=1)
    return float((chosen - mean).sum() / (best - mean).sum())


def test_on_fresh_groups_they_choose_well(fitted: Fitted) -> None:
    fresh = dataset_on(fitted.truth, groups=60, runs=20, seed=7)
    share = share_of_headroom(fitted.critics, fresh, 20)
    assert share > 0.7
    assert 0.7 < fitted.facts["explained"] <= 1
    assert torch.equal(estimates_of(fitted.critics, fresh.plans), estimates_of(fitted.critics, fresh.plans))
    foreign = fresh.plans[torch.arange(1200).roll(200)]
    lost = replace(fresh.plans, modules=foreign.modules, run=foreign.run)
    blind = share_of_headroom(fitted.critics, replace(fresh, plans=lost), 20)
    assert blind < share - 0.3, "with what tells taken from other states, the same plans are chosen worse"


def test_noise_is_not_explained() -> None:
    def noise(plans: Plans) -> torch.Tensor:
        return 0.1 * torch.randn(len(plans.run), generator=torch.Generator().manual_seed(3))

    facts = fit_value_ensemble(PlanValueEnsemble(SMALL), dataset_on(noise, groups=40, runs=8), seed=0)
    assert facts["explained"] < 0.1


@pytest.mark.parametrize(("truth", "groups"), [(right_depth, 2), (lambda plans: 0.0 * plans.run[:, 0], 6)])
def test_one_task_or_plans_that_all_end_alike_tell_nothing(truth: Truth, groups: int) -> None:
    dataset = dataset_on(truth, groups, runs=4)
    assert fit_value_ensemble(PlanValueEnsemble(TINY), dataset, seed=0) == {}


# How they are fitted --------------------------------------------------------------------------------------------------


SHORT = FitConfig(epochs=3, batch=4)
FAST = FitConfig(epochs=12, rate=6e-3)
"""Learns as much as the usual fit does, in larger steps."""


def dyadic(plans: Plans) -> torch.Tensor:
    """Gains that can be moved by whole numbers without any rounding."""
    return (right_depth(plans) * 256).round() / 256


DATASET = dataset_on(dyadic, groups=10, runs=4)


def fit(dataset: PlanDataset, seed: int = 0, workers: int = 1) -> dict[str, torch.Tensor]:
    critics = PlanValueEnsemble(TINY)
    fit_value_ensemble(critics, dataset, seed=seed, fit=SHORT, workers=workers)
    return critics.state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


def test_a_fit_depends_on_its_seed_alone() -> None:
    """Not on the weights that critics came with, and not on the random state, which it leaves as it was."""
    weights, critics = fit(DATASET), PlanValueEnsemble(TINY)
    state = torch.get_rng_state()
    fit_value_ensemble(critics, DATASET, seed=0, fit=SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights, critics.state_dict())
    assert not same(weights, fit(DATASET, seed=7))
    assert (estimates_of(critics, DATASET.plans).std(dim=0) > 1e-4).all(), "critics have seeds of their own"
    assert same(weights, fit(DATASET, workers=2))


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"decay": -1.0}]
)
def test_bad_settings_of_a_fit(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="epochs and batch of a fit are at least 1"):
        FitConfig(**options)


def test_what_all_runs_of_a_group_have_in_common_does_not_count() -> None:
    offsets = torch.randint(-90, 90, (10,), generator=torch.Generator().manual_seed(2)).float()
    moved = replace(DATASET, gains=DATASET.gains + offsets[DATASET.groups])
    assert same(fit(DATASET), fit(moved))
    other = replace(DATASET, gains=DATASET.gains + torch.arange(40) / 64)
    assert not same(fit(DATASET), fit(other))


def test_groups_of_one_state_are_ignored() -> None:
    rows = torch.cat([torch.arange(40), torch.tensor([3, 17])])
    lonely = DATASET[rows]
    lonely.gains[40:] = torch.tensor([5.0, -8.0])
    lonely.groups[40:], lonely.tasks[40:] = torch.tensor([10, 11]), torch.tensor([0, 4])
    assert same(fit(DATASET), fit(lonely))


def test_tasks_of_more_weight_are_believed() -> None:
    """Half of the tasks say that many adapted modules help, the other half, just like them, that they harm."""
    dataset = dataset_on(lambda plans: 0.05 * (plans.ranks[:, 0] > 0).float().sum(dim=1), groups=20, runs=8)
    harmed = dataset.tasks % 2 == 1
    both = replace(dataset, gains=torch.where(harmed, -dataset.gains, dataset.gains))
    plans = some_plans(plans=2, modules=6)
    plans.ranks[:] = 8
    plans.ranks[:, 0, 1:] = 0  # and all of them under the second plan
    for weighty, sign in ((harmed, -1), (~harmed, 1)):
        ensemble = PlanValueEnsemble(SMALL)
        fit_value_ensemble(ensemble, replace(both, weights=torch.where(weighty, 9, 1)), seed=0, fit=FAST)
        values = ensemble(plans).mean(dim=0)
        assert sign * (values[:, 1] - values[:, 0]).mean() > 1


def test_the_numbers_of_groups_need_not_follow_one_another() -> None:
    """Nor do their states; only the order of groups decides."""
    order = torch.arange(40).reshape(10, 4).T.reshape(-1)
    groups, tasks = 7 * DATASET.groups[order] - 30, 5 * DATASET.tasks[order] - 11
    scattered = replace(DATASET[order], groups=groups, tasks=tasks)
    torch.testing.assert_close(fit(scattered), fit(DATASET))


def test_one_run_that_went_wrong_counts_only_so_much() -> None:
    """Beyond the most that gains may differ, it does not matter by how much."""
    fits = []
    for gain in (-2.0, -9.0):
        gains = DATASET.gains.clone()
        gains[5] = gains[4:8].median() + gain
        fits.append(fit(replace(DATASET, gains=gains)))
    assert same(*fits)
    assert not same(fits[0], fit(DATASET))


def test_a_fit_does_not_depend_on_what_is_in_the_padding() -> None:
    zeros, others = (fit(replace(DATASET, plans=padded(DATASET.plans, filling))) for filling in (0.0, 2.9))
    torch.testing.assert_close(zeros, others)
    critics, plans = stirred(), some_plans()
    torch.testing.assert_close(estimates_of(critics, padded(plans, -1e6)), estimates_of(critics, plans))


# Votes on the log loss ------------------------------------------------------------------------------------------------


def test_targets_are_votes_against_plain_lora() -> None:
    gains, reference = torch.tensor([1.0, 1.01, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    votes = torch.asinh(torch.tensor([0.0, 1.0, -50.0]))
    torch.testing.assert_close(targets_of(gains, reference, "log loss"), votes - votes.mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets_of(gains, reference, "spread"), standardised(gains))


def test_a_fit_doubts_what_unseen_tasks_did_not_keep() -> None:
    """Noise that no network can know is all doubt; what follows from the plan leaves little."""

    def with_noise(scale: float) -> PlanDataset:
        dataset = dataset_on(lambda plans: 0.01 * (plans.ranks[:, 0] > 0).float().mean(dim=1), groups=60, runs=8)
        gains = dataset.gains - dataset.gains[::8].repeat_interleave(8)  # the first of each group is the reference
        noise = scale * torch.randn(len(gains), generator=torch.Generator().manual_seed(0))
        noise[::8] = 0
        return replace(dataset, gains=gains + noise, reference_gains=torch.zeros_like(gains))

    doubts = []
    for scale in (0.0, 0.03):
        ensemble = PlanValueEnsemble(IN_LOSSES)
        facts = fit_value_ensemble(ensemble, with_noise(scale), seed=0, fit=FAST)
        assert facts["doubt"] == ensemble.config.doubt >= 0
        doubts.append(facts["doubt"])
    assert doubts[1] > 1 > doubts[0]
    assert fit_value_ensemble(PlanValueEnsemble(SMALL), with_noise(0.03), seed=0, fit=SHORT).keys() == {"explained"}


def two_families(other: float) -> PlanDataset:
    """Adapting many modules helps the first half of the tasks, and the second half, of another family, by `other`."""
    dataset = dataset_on(lambda plans: 0.01 * (plans.ranks[:, 0] > 0).float().sum(dim=1), groups=60, runs=8)
    families = (dataset.tasks >= 15).long()
    gains = dataset.gains * torch.where(families > 0, other, 1.0)
    gains = gains - gains[::8].repeat_interleave(8)  # the first of each group is the reference
    return replace(dataset, gains=gains, reference_gains=torch.zeros_like(gains), families=families)


def test_doubt_is_that_of_families_that_were_not_seen() -> None:
    """Tasks of the own family are foretold in both cases; a family in which the opposite is true is not."""
    found = []
    for other in (1.0, -1.0):
        ensemble = PlanValueEnsemble(IN_LOSSES)
        found.append(fit_value_ensemble(ensemble, two_families(other), seed=0, fit=FAST))
        assert ensemble.config.doubt == found[-1]["doubt"]
    alike, opposite = found
    assert alike["explained elsewhere"] > 0.3
    assert opposite["explained elsewhere"] < 0
    assert opposite["doubt"] > 1 > alike["doubt"]


def about_labels(dataset: PlanDataset, groups: torch.Tensor) -> PlanDataset:
    """The same; the loss of some groups counts one token in 64, and that of the others all."""
    run = dataset.plans.run.clone()
    run[:, RUN_FEATURES.index("predicted")] = torch.where(groups, -6 / 4, 0.0)
    return replace(dataset, plans=replace(dataset.plans, run=run))


def test_texts_and_labels_are_doubted_apart() -> None:
    """The family in which the opposite is true learns labels, and in the end texts like all others."""
    dataset = two_families(-1.0)
    ensemble = PlanValueEnsemble(IN_LOSSES)
    facts = fit_value_ensemble(ensemble, about_labels(dataset, dataset.families > 0), seed=0, fit=FAST)
    config = ensemble.config
    assert (config.doubt, config.doubt_on_labels) == (facts["doubt"], facts["doubt on labels"])
    texts, labels = [0.0] * len(RUN_FEATURES), [-6 / 4] * len(RUN_FEATURES)
    assert (config.doubt_of(texts), config.doubt_of(labels)) == (config.doubt, config.doubt_on_labels)
    assert replace(config, doubt_on_labels=None).doubt_of(labels) == config.doubt
    alone = PlanValueEnsemble(ensemble.config)
    texts_alone = fit_value_ensemble(alone, about_labels(dataset, dataset.groups < 0), seed=0, fit=SHORT)
    assert texts_alone["doubt on labels"] == texts_alone["doubt"], "nothing tells another one"


def expecting(too_much: torch.Tensor, targets: torch.Tensor, spread: float = 0.0) -> torch.Tensor:
    """Two networks whose votes are too high by so much in the mean, and lie `spread` to either side, (2, rows)."""
    apart = spread * torch.tensor([[-1.0], [1.0]]) * (too_much != 0)
    return (targets + too_much).unsqueeze(0) + apart


def test_what_the_spread_tells_is_not_doubted_again() -> None:
    """Plans that lose 6 % are taken for equals by networks that lie .75 to either side: the rest is left."""
    dataset = two_families(1.0)
    first = torch.arange(len(dataset.gains)) % 8 == 0
    known = replace(dataset, gains=torch.where(first, 0.0, 0.01))  # plain LoRA is the first of each group
    lost = torch.where(first, 0.0, vote_of(-0.06))
    whole = -vote_of(-0.05)
    for spread, left in ((0.0, whole), (0.75, whole - CAUTION * 0.75), (1.5, 0.0)):
        found = doubts_of(expecting(-lost, lost, spread), lost, known, [8] * 60)[0]
        assert found == pytest.approx(left, abs=0.051)
    by_one = expecting(-lost, lost, 0.75)
    by_one[0] = torch.nan  # this network has learned from these plans, and cannot be asked
    found = doubts_of(by_one, lost, known, [8] * 60)[0]
    assert found == pytest.approx(whole + 0.75, abs=0.051), "the other one alone lies .75 above, and tells no spread"


def judged(*lost: float) -> list[FloatArray]:
    """A group each with one plan that is taken for plain LoRA's equal, and loses so much."""
    return [np.array([[0.0], [vote_of(-each)]]) for each in lost]


def test_one_plan_in_five_may_lose_more() -> None:
    """And not two: then the doubt is so large that none is called sure at the tolerances that they break."""
    families = np.zeros(5, int)
    assert doubt_of(judged(0.0, 0.0, 0.0, 0.0, 0.3), families) == 0.0
    few = doubt_of(judged(0.0, 0.0, 0.0, 0.3, 0.3), families)
    assert few == pytest.approx(-vote_of(-0.01), abs=0.051), "half of the tolerances are then kept by taking none"
    assert doubt_of(judged(0.0, 0.002, 0.004, 0.003, 0.001), families) == 0.0


def test_the_cheapest_of_a_group_is_what_counts() -> None:
    """It loses 30 %, and all others nothing; where it is not called sure, the next one is taken."""
    good, bad = np.zeros((2, 3)), np.array([[0.0], [vote_of(-0.3)]])
    families = np.zeros(1, int)
    assert doubt_of([np.concatenate([good, bad], axis=1)], families) == 0.0
    assert doubt_of([np.concatenate([bad, good], axis=1)], families) > 1.3
    unsure = np.array([[-1.4], [vote_of(-0.3)]])  # within the tolerance of 2 % at most
    found = doubt_of([np.concatenate([unsure, good], axis=1)], families)
    assert found == pytest.approx(-vote_of(-0.05) - 1.4, abs=0.051)


def test_all_families_count_alike() -> None:
    """A family of one group is as much as one of 28."""
    families = np.array([0] * 28 + [1])
    groups = [*judged(*[0.0] * 28), *judged(0.3)]
    assert doubt_of(groups, 0 * families) == 0.0
    assert doubt_of(groups, families) > 0.8, "half of what is called sure, on the mean of families"
    assert doubt_of([*groups[:28], np.zeros((2, 0))], families) == 0.0
    assert doubt_of([], families[:0]) == 0.0


# What was learned from ----------------------------------------------------------------------------------------------


def test_a_fit_keeps_the_range_of_each_feature_of_the_run() -> None:
    dataset = dataset_on(lambda plans: (plans.ranks[:, 0] > 0).float().mean(dim=1), groups=8, runs=8)
    ensemble = PlanValueEnsemble(TINY)
    fit_value_ensemble(ensemble, dataset, seed=0, fit=SHORT)
    run = dataset.plans.run
    assert ensemble.config.lowest == pytest.approx(run.amin(dim=0).tolist())
    assert ensemble.config.highest == pytest.approx(run.amax(dim=0).tolist())
    assert all(not ensemble.config.outside(row.tolist()) for row in run)


def test_what_lies_outside_is_named() -> None:
    lowest, highest = [0.0] * len(RUN_FEATURES), [0.5] * len(RUN_FEATURES)
    config = PlanValueConfig(lowest=tuple(lowest), highest=tuple(highest))
    run = [0.25] * len(RUN_FEATURES)
    run[RUN_FEATURES.index("horizon")], run[RUN_FEATURES.index("rows")] = 1.5, -0.25
    assert config.outside(run) == {"horizon": (1.5, 0.0, 0.5), "rows": (-0.25, 0.0, 0.5)}
    assert config.outside([0.54] * len(RUN_FEATURES)) == {}
    assert PlanValueConfig().outside(run) == {}, "nothing is known"
    for wrong in ({"lowest": (0.0,)}, {"lowest": (1.0,), "highest": (0.0,)}, {"lowest": (-inf,), "highest": (0.0,)}):
        with pytest.raises(ConfigError, match="lowest and highest of the value ensemble"):
            PlanValueConfig(**wrong)
