"""Proposals: the rules and the actor are always among them, and the rest is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rankpilot.agents.learned.policy import BASIS, FIXED, candidate_actions
from rankpilot.agents.observation import MODULE_FEATURES, Observation, module_feature
from rankpilot.agents.policy import decision_from_scores
from rankpilot.agents.rules import find_rule
from rankpilot.common.arrays import IntArray
from rankpilot.cost.cost import ByteCost, ParameterCost, plan_cost
from rankpilot.plan.plan import SCORE_BOUND, base_depth_bias, base_rank_floor, project, uniform_ranks, uniform_window

MakeObservation = Callable[..., Observation]
Arrays = tuple[NDArray[np.float64], NDArray[np.float64]]
UNIFORM, TOP_DOWN, MEAN_SIGNALS, TOP_DOWN_MLP, ACTOR = range(FIXED)
PLACEMENT = np.array([0.7, -0.4])


def byte_cost(modules: int) -> ByteCost:
    """Going deeper holds more for the backward pass."""
    layers = -(-modules // 4)
    needs = np.arange(layers)[:, None] >= np.arange(modules)[None] // 4
    per_rank = np.random.default_rng(1).integers(50, 150, size=(1, modules)).astype(np.float64)
    return ByteCost(("backward",), np.array([1000.0]), per_rank, np.full((1, layers), 700.0), needs)


@pytest.fixture(params=["parameters", "bytes", "few bytes"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Budgets: what a problem of 16 modules is to have."""
    if request.param == "parameters":
        return {}
    cost = byte_cost(16)
    everything = float((cost.constant + cost.group_bytes.sum(axis=1)).max())
    whole = {"bytes": everything + 9.5 * cost.per_rank.sum(), "few bytes": everything + 600}
    return {"cost": cost, "limit": float(whole[request.param])}


@pytest.fixture
def seen(make_observation: MakeObservation, options: dict[str, Any]) -> Observation:
    return make_observation(16, **options)


def actor_scores(modules: int = 16) -> NDArray[np.float64]:
    return np.random.default_rng([5, 0]).normal(0.3, 0.6, size=modules)


def proposals(observation: Observation, draws: int = 0, seed: int = 0, **actor: Any) -> Arrays:
    given = {"scores": actor_scores(len(observation.modules)), "placement": PLACEMENT} | actor
    candidates = candidate_actions(observation, **given, draws=draws, generator=np.random.default_rng(seed))
    return np.stack([each.scores for each in candidates]), np.stack([each.placement for each in candidates])


def ranks_of(observation: Observation, actions: Arrays, number: int) -> IntArray:
    decision = decision_from_scores(observation, actions[0][number], actions[1][number])
    return project(observation.problem, decision.ranks, decision.scores).ranks


# The fixed ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("max_step", [None, 2], ids=["first", "later"])
def test_rules_and_the_actor_are_among_them(
    make_observation: MakeObservation, options: dict[str, Any], seed: int, max_step: int | None
) -> None:
    observation = make_observation(16, seed, max_step=max_step, **options)
    scores, placement = proposals(observation)
    for number, expected in (
        (TOP_DOWN, find_rule("top-down").decide(observation)),
        (MEAN_SIGNALS, find_rule("signal-mean").decide(observation)),
        # more rank where a rank costs more
        (TOP_DOWN_MLP, decision_from_scores(observation, module_feature(observation, "rank_cost"))),
        (ACTOR, decision_from_scores(observation, actor_scores(), PLACEMENT)),
    ):
        decision = decision_from_scores(observation, scores[number], placement[number])
        np.testing.assert_array_equal(decision.ranks, expected.ranks)
        assert (decision.rank_floor, decision.depth_bias) == (expected.rank_floor, expected.depth_bias)
        plan = project(observation.problem, expected.ranks, expected.scores)
        np.testing.assert_array_equal(ranks_of(observation, (scores, placement), number), plan.ranks)


def test_the_fixed_ones_are_different_plans(seen: Observation) -> None:
    actions = proposals(seen)
    plans = {tuple(ranks_of(seen, actions, number).tolist()) for number in range(FIXED)}
    by_parameters = isinstance(seen.problem.cost, ParameterCost)  # there top-down is uniform
    assert len(plans) == FIXED - by_parameters


def test_the_first_is_uniform_rank_up_to_what_that_leaves(seen: Observation) -> None:
    """At least uniform's rank, rounded down to the ladder; what is left may go a little deeper."""
    problem = seen.problem
    ranks, uniform = ranks_of(seen, proposals(seen), UNIFORM), uniform_ranks(problem)
    below = problem.ladder.array[problem.ladder.rung(uniform)]
    assert uniform.any()
    assert (ranks >= below).all()
    deeper = np.flatnonzero((ranks > 0) & (uniform == 0)) // 4
    assert len(set(deeper.tolist())) <= 1, "one more layer in part at most"
    assert problem.fits(ranks)


def test_the_first_is_uniform_where_not_even_the_top_layer_fits(make_observation: MakeObservation) -> None:
    cost = byte_cost(16)
    two = np.arange(16) >= 14
    observation = make_observation(16, cost=cost, limit=plan_cost(cost, two.astype(np.int64)) + 60)
    problem = observation.problem
    assert uniform_window(problem) is None
    uniform = uniform_ranks(problem)
    assert 0 < (uniform > 0).sum() < 4
    np.testing.assert_array_equal(ranks_of(observation, proposals(observation), UNIFORM), uniform)


# The drawn ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [1, 16, 300])
def test_all_are_within_the_bounds_of_actions(make_observation: MakeObservation, modules: int) -> None:
    observation = make_observation(modules)
    wild = np.where(np.arange(modules) % 3 == 0, SCORE_BOUND, -SCORE_BOUND)
    scores, placement = proposals(observation, 200, scores=wild, placement=np.array([-SCORE_BOUND, SCORE_BOUND]))
    assert np.abs(scores).max() <= SCORE_BOUND
    assert np.abs(placement).max() <= SCORE_BOUND
    for number in range(0, FIXED + 200, 20):
        assert observation.problem.fits(ranks_of(observation, (scores, placement), number))


def test_corrections_are_within_the_bounds_whatever_the_unit(seen: Observation) -> None:
    scores, placement = proposals(seen, 500)
    assert (scores.shape, placement.shape) == ((FIXED + 500, 16), (FIXED + 500, 2))
    assert np.abs(scores).max() <= SCORE_BOUND
    assert np.abs(placement).max() <= SCORE_BOUND
    floors, depth_biases = (
        base_rank_floor(seen.problem) * 2.0 ** placement[FIXED:, 0],
        base_depth_bias(seen.problem) + placement[FIXED:, 1],
    )
    assert floors.min() < 1.1, "from a floor that lets all in"
    assert floors.max() > 6, "to one that lets few in"
    assert depth_biases.min() < 0.2, "with depth biases that hardly favour upper layers, or not"
    assert depth_biases.max() > 1, "and others that do"


def test_the_same_seed_draws_the_same(seen: Observation) -> None:
    first, again, other, none = (proposals(seen, draws, seed) for draws, seed in ((20, 3), (20, 3), (20, 4), (0, 5)))
    for a, b, c, fixed in zip(first, again, other, none, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[:FIXED], fixed)
        assert (a[FIXED:] != c[FIXED:]).any(axis=1).sum() > 15


def test_what_is_drawn_does_not_depend_on_the_state(make_observation: MakeObservation) -> None:
    """Weights and corrections are the same at every decision; only what they weigh differs."""
    placement = [proposals(make_observation(modules, seed), 20)[1] for modules, seed in ((16, 0), (16, 1), (5, 2))]
    np.testing.assert_array_equal(placement[0], placement[1])
    np.testing.assert_array_equal(placement[0], placement[2])


def test_plans_differ_in_depth_and_in_order(seen: Observation) -> None:
    actions = proposals(seen, 48)
    ranks = np.stack([ranks_of(seen, actions, number) for number in range(FIXED, FIXED + 48)])
    assert len(np.unique(ranks, axis=0)) > 20
    assert len(np.unique((ranks > 0).sum(axis=1))) >= 3
    assert len(np.unique(ranks.argmax(axis=1))) >= 4


def test_scores_are_sums_of_what_can_be_read_off(make_observation: MakeObservation) -> None:
    observation, given_scores = make_observation(16), 0.1 * actor_scores(16)
    scores, _ = proposals(observation, 48, scores=given_scores)
    columns = [MODULE_FEATURES.index(name) for name in ("rank_cost", "relative_depth")]
    signals = observation.modules[:, :3].astype(np.float64).mean(axis=1)
    basis = np.stack([signals, *observation.modules[:, columns].T.astype(np.float64), given_scores], axis=1)
    basis -= basis.mean(axis=0)
    free = np.abs(scores).max(axis=1) < SCORE_BOUND
    assert free.sum() > 40
    weights, *_ = np.linalg.lstsq(basis, scores[free].T, rcond=None)
    np.testing.assert_allclose(basis @ weights, scores[free].T, atol=1e-5)
    assert np.linalg.matrix_rank(weights, tol=1e-3) == len(BASIS), "each part plays a role"
    np.testing.assert_allclose(scores[free].mean(axis=1), 0, atol=1e-6)
