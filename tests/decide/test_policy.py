"""Decisions of rules that people write, where what is no plan and no score is one clear error; and their schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rankpilot.agents.policy_file import load_policy
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.decide.observation import Observation, module_feature
from rankpilot.decide.policy import decision_from_plan, decision_from_scores
from rankpilot.decide.settings import DecisionSchedule


@pytest.mark.parametrize("ranks", [[np.nan, 1.0], [-1, 2], [1.5, 2.0], [[1, 2]], ["a", "b"]])
def test_ranks_that_are_none(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="Ranks must be whole numbers of at least 0, one per module; got"):
        decision_from_plan(ranks)


def test_lists_are_taken(make_observation: Any) -> None:
    assert decision_from_plan([0, 8.0]).ranks.tolist() == [0, 8]  # type: ignore[arg-type]
    observation: Observation = make_observation(3)
    scores = decision_from_scores(observation, [0, 1, 2]).scores  # type: ignore[arg-type]
    assert scores.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("scores", [[np.nan, 0, 0], [np.inf, 0, 0], [0, 0], [[0, 0, 0]], None, ["a", "b", "c"]])
def test_scores_that_are_none(make_observation: Any, scores: Any) -> None:
    with pytest.raises(ConfigError, match="Scores must be finite numbers, one for each of 3 modules; got"):
        decision_from_scores(make_observation(3), scores)


def test_features_that_do_not_exist(make_observation: Any) -> None:
    with pytest.raises(UnknownNameError, match="feature of modules 'sensitivty'"):
        module_feature(make_observation(3), "sensitivty")


class Nameless:
    def decide(self, observation: Observation) -> None:
        """Nothing."""


class Named(Nameless):
    name = "mine"


@pytest.mark.parametrize("policy", [Nameless(), Named, object()])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(ConfigError, match="an object with `name` and `decide`; got"):
        load_policy(policy)
    assert load_policy(named := Named()) is named


# When ranks are decided, and how far a decision may go ----------------------------------------------------------------


def test_only_the_first_decision_may_use_the_whole_ladder() -> None:
    schedule = DecisionSchedule(max_step=3)
    assert [schedule.reach(decision) for decision in range(4)] == [None, 3, 3, 3]


def test_steps_rise_and_those_that_fall_together_merge() -> None:
    schedule = DecisionSchedule(fractions=(0.0, 0.18, 0.34, 0.5))
    assert schedule.steps(200) == (0, 36, 68, 100)
    assert schedule.steps(4) == (0, 1, 2)


@pytest.mark.parametrize(
    "options",
    [{"probe_steps": 0}, {"probe_batch": 0}, {"max_step": 0}, {"fractions": (0.1, 0.5)}, {"fractions": (0.0, 1.0)}],
    ids=str,
)
def test_values_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="got"):
        DecisionSchedule(**options)
