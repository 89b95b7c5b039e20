"""Groups and actions: what is allowed fits, and does what it says; rules act on what they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.common.errors import ConfigError
from rankpilot.cost.cost import plan_cost
from rankpilot.decide.groups import (
    DOUBLE,
    GO_BACK,
    GROUP_RULES,
    HALVE,
    NOTHING,
    STEERING,
    GroupView,
    Halving,
    Steering,
    SteerRate,
    what_stays,
)
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.policy import decided_plan
from rankpilot.decide.rate_control import CHANGES, KEEP, UNDO

MakeObservation = Callable[..., Observation]


@pytest.fixture
def view(make_observation: MakeObservation) -> GroupView:
    return GroupView.of(make_observation(24, 1, max_step=2))


def test_a_group_is_a_kind_in_a_third_of_the_depth(make_observation: MakeObservation) -> None:
    groups = GroupView.of(make_observation(24)).groups
    assert len(groups.names) == 4 * 3
    assert groups.names[0] == "m0, lower third"
    assert groups.member.tolist() == [4 * (layer // 2) + kind for layer in range(6) for kind in range(4)]


def test_modules_outside_the_layers_are_no_third_and_never_grow(make_observation: MakeObservation) -> None:
    without = GroupView.of(make_observation(24)).groups
    observation = make_observation(25)
    problem = replace(observation.problem, limit=float(observation.problem.limit) * 100)
    observation = replace(observation, names=(*observation.names[:24], "pooler.dense"), problem=problem)
    view = GroupView.of(observation)
    assert view.groups.names == (*without.names, "dense"), "it shifts no third"
    assert view.groups.member.tolist() == [*without.member.tolist(), 12]
    grows = view.allowed[view.grow(0) :]
    assert grows[:-1].all()
    assert not grows[-1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("step", [None, 2])
def test_each_action_that_is_allowed_changes_its_group_and_fits(make_observation, seed, step):
    observation = make_observation(24, seed, max_step=step)
    observation = replace(observation, problem=replace(observation.problem, limit=float(seed + 1) * 2400))
    view = GroupView.of(observation)
    assert view.allowed[NOTHING]
    assert view.allowed[DOUBLE] == (step is not None)
    for action in np.flatnonzero(view.allowed).tolist():
        decision = view.decision(action)
        plan = decided_plan(observation.problem, decision)
        assert observation.problem.fits(plan.ranks)
        if action < 4:
            assert decision.change == {NOTHING: KEEP, HALVE: 2, DOUBLE: 5, GO_BACK: UNDO}[action]
            continue
        own = view.groups.member == action - 4
        moved = np.sign(decision.ranks - view.ranks)
        assert (moved[~own] == 0).all()
        assert set(moved[own].tolist()) <= {0, 1}
        assert moved.any()
        assert decision.change == KEEP
        if observation.problem.fits(view.ranks):
            assert plan.ranks[own].sum() > view.ranks[own].sum(), "room is made by the others"
    for action in np.flatnonzero(~view.allowed).tolist():
        np.testing.assert_array_equal(view.decision(action).ranks, view.decision(NOTHING).ranks)


def test_features_are_means_over_the_modules_of_a_group(view: GroupView) -> None:
    member, modules = view.groups.member, view.observation.modules
    for at in range(len(view.groups.names)):
        np.testing.assert_allclose(view.features[at, :-2], modules[member == at].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(view.features[:, -2].sum(), 1, rtol=1e-6)


def test_what_growing_a_group_takes_from_others(make_observation: MakeObservation) -> None:
    observation = make_observation(24, max_step=2)
    problem, limit = observation.problem, 1.05 * plan_cost(observation.problem.cost, observation.problem.ranks)
    view = GroupView.of(replace(observation, problem=replace(problem, limit=limit)))
    grown = [np.minimum(problem.rungs + (view.groups.member == group), problem.tops) for group in range(12)]
    costs = np.array([plan_cost(problem.cost, problem.ladder.array[rungs]) for rungs in grown])
    np.testing.assert_allclose(view.features[:, -1], np.maximum(costs / limit - 1, 0), rtol=1e-5)
    assert min(costs) < limit < max(costs)


def test_under_a_roomy_budget_no_group_grows(make_observation: MakeObservation) -> None:
    tight, roomy = (GroupView.of(with_run(make_observation(24), budget=budget)) for budget in (0.9, 1.0))
    assert tight.allowed[4:].any()
    assert not roomy.allowed[4:].any()
    assert not what_stays(tight.observation)
    assert "ranks" in what_stays(roomy.observation)
    assert "labels" in what_stays(with_run(make_observation(24), predicted=-1.5))


def test_on_labels_the_rate_stays(make_observation: MakeObservation) -> None:
    observation = make_observation(24, max_step=2)
    rates = [HALVE, DOUBLE, GO_BACK]
    assert GroupView.of(with_run(observation, steps_loss=0.5, horizon=1.0)).allowed[rates].all()
    assert not GroupView.of(with_run(observation, steps_loss=0.5, horizon=1.0, predicted=-1.5)).allowed[rates].any()


def test_an_action_that_there_is_not(view: GroupView) -> None:
    with pytest.raises(ConfigError, match="Actions must be from 0 to 15"):
        view.decision(16)


def with_run(observation: Observation, **features: float) -> Observation:
    run = np.zeros_like(observation.run)
    for name, value in features.items():
        run[RUN_FEATURES.index(name)] = value
    return replace(observation, run=run)


SEEN = {"steps_time": 0.2, "steps_spread_of_the_alignment": 0.4, "steps_steps": 1.0}


@pytest.mark.parametrize(
    ("steps", "action"),
    [
        (SEEN | {"steps_alignment": 1.0, "steps_alignment_over_the_first": 1.0, "steps_evidence": 2.0}, DOUBLE),
        (SEEN | {"steps_alignment": -1.0, "steps_alignment_over_the_first": -1.0, "steps_evidence": -2.0}, HALVE),
        (SEEN | {"steps_alignment": -1.0, "steps_loss": 2.0}, GO_BACK),
        (SEEN | {"steps_alignment": 0.01, "steps_noise": 0.1}, NOTHING),
        ({}, NOTHING),
    ],
)
def test_the_rate_follows_the_steps(make_observation: MakeObservation, steps: dict[str, Any], action: int) -> None:
    view = GroupView.of(with_run(make_observation(24, max_step=2), **steps))
    assert SteerRate().act(view) == action


def test_halving_moves_rank_to_what_signals_say_and_only_early(make_observation: MakeObservation) -> None:
    observation = make_observation(24, 2, ranks=np.ones(24, dtype=np.int64), max_step=2)
    modules = observation.modules.copy()
    signals = [MODULE_FEATURES.index(name) for name in ("sensitivity", "snr", "relative_change")]
    modules[:, signals] = -1.0
    modules[np.ix_([1, 5], signals)] = 3.0
    seen = replace(observation, modules=modules)
    view = GroupView.of(with_run(seen, progress=0.1))
    assert Halving(margin=0.1).act(view) == view.grow(int(view.groups.member[5]))
    late = GroupView.of(with_run(seen, progress=0.9))
    assert Halving(margin=0.1).act(late) == NOTHING


@pytest.mark.parametrize("name", GROUP_RULES)
@pytest.mark.parametrize("seed", range(4))
def test_rules_take_allowed_actions_the_same_each_time(make_observation: MakeObservation, name: str, seed: int) -> None:
    rule = GROUP_RULES[name]
    assert isinstance(rule, Steering)
    for step in (None, 2):
        observation = make_observation(24, seed, max_step=step)
        view = GroupView.of(observation)
        assert view.allowed[rule.actor.act(view)]
        one, two = (rule.decide(observation) for _ in range(2))
        np.testing.assert_array_equal(one.ranks, two.ranks)
        assert one.change == two.change


def test_twelve_decisions_denser_early() -> None:
    steps = STEERING.steps(100)
    assert len(steps) == 12
    assert (np.diff(np.diff(steps)) >= 0).mean() > 0.8
    assert CHANGES[UNDO] < 0
