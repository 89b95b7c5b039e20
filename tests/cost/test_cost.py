"""Costs of plans computed by hand, and which peak candidates are left out."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.cost.cost import ByteCost, ParameterCost, moment_costs, plan_cost
from rankpilot.cost.peak_candidates import UNDERESTIMATE, keep_candidates, needed_candidates
from rankpilot.lora.targets import find_target_modules

from ..decide.plan.synthetic_costs import fixed_cost, random_cost, transformer_cost


def test_parameters_are_rank_times_both_widths(make_llama):
    targets = find_target_modules(make_llama())
    ranks = np.arange(len(targets))
    expected = sum(int(r) * (t.d_in + t.d_out) for r, t in zip(ranks, targets, strict=True))
    assert plan_cost(ParameterCost.of(targets), ranks) == expected
    assert plan_cost(ParameterCost.of(targets), 0 * ranks) == 0


@pytest.fixture
def cost() -> ByteCost:
    """Two candidates, three modules; a tensor for modules 0 and 1, one for 2, and one of the first candidate only."""
    return ByteCost(
        moments=("loss", "layer 0"),
        constant=np.array([1000.0, 900.0]),
        per_rank=np.array([[10.0, 20.0, 30.0], [11.0, 22.0, 200.0]]),
        group_bytes=np.array([[100.0, 50.0, 400.0], [100.0, 50.0, 0.0]]),
        needs=np.array([[True, True, False], [False, False, True], [True, False, False]]),
    )


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((0, 0, 0), 1000),
        ((0, 3, 0), 1000 + 100 + 3 * 20),
        ((1, 1, 0), 1000 + 100 + 400 + 10 + 20),  # the shared tensor counts once
        ((2, 0, 1), 1000 + 100 + 50 + 400 + 20 + 30),
        ((0, 0, 1), 900 + 50 + 200),  # the second candidate is the higher one
        ((0, 0, 10), 900 + 50 + 2000),
    ],
)
def test_a_plan_costs_what_its_highest_moment_holds(cost, ranks, expected):
    assert plan_cost(cost, np.array(ranks)) == expected


def test_moments_that_are_never_the_peak_are_left_out_with_what_only_they_hold(cost):
    lower = ByteCost(
        (*cost.moments, "never"),
        np.append(cost.constant, 100.0),
        np.concatenate([cost.per_rank, [[1.0, 1.0, 1.0]]]),
        np.concatenate([np.pad(cost.group_bytes, [(0, 0), (0, 1)]), [[10.0, 10, 10, 10]]]),
        np.concatenate([cost.needs, [[True, False, True]]]),
    )
    kept = needed_candidates(lower, np.random.default_rng(0))
    assert kept == [0, 1]
    left = keep_candidates(lower, kept)
    assert left.moments == cost.moments
    for name in ("constant", "per_rank", "group_bytes", "needs"):
        assert np.array_equal(getattr(left, name), getattr(cost, name)), name


@pytest.mark.parametrize("seed", range(8))
def test_plans_of_all_kinds_cost_the_same_with_the_moments_left(seed):
    """The plans are not those by which the candidates were chosen."""
    generator = np.random.default_rng(seed)
    if seed % 2:
        cost, _, _ = transformer_cost(generator, 6, checkpointing=seed % 4 == 1)
    else:
        cost = random_cost(generator, np.repeat(np.arange(5), 3))
    left = keep_candidates(cost, needed_candidates(cost, np.random.default_rng(0)))
    assert len(left.moments) <= len(cost.moments)
    count = cost.per_rank.shape[1]
    lost = []
    for _ in range(300):
        ranks = generator.choice([0, 1, 3, 8, 24, 64], size=count) * (generator.random(count) < generator.random())
        lower = plan_cost(left, ranks)
        assert lower <= plan_cost(cost, ranks)
        lost.append(1 - lower / plan_cost(cost, ranks))
    assert np.quantile(lost, 0.95) <= UNDERESTIMATE
    assert max(lost) <= 0.01


def test_costs_of_several_plans_are_those_of_each():
    cost, *_ = transformer_cost(np.random.default_rng(0), 3)
    plans = np.random.default_rng(1).choice([0, 0, 1, 8], size=(20, cost.per_rank.shape[1]))
    expected = [fixed_cost(cost, ranks > 0) + cost.per_rank @ ranks for ranks in plans]
    assert np.array_equal(moment_costs(cost, plans), expected)
    assert np.array_equal([moment_costs(cost, ranks) for ranks in plans], expected)
