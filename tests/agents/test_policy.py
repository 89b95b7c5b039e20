"""Decisions of rules that people write: what is no plan and no score is one clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.observation import Observation, module_feature
from rankpilot.agents.policy import decision_from_plan, decision_from_scores
from rankpilot.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize("ranks", [[np.nan, 1.0], [-1, 2], [1.5, 2.0], [[1, 2]], ["a", "b"]])
def test_ranks_that_are_none(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="Ranks are whole numbers from 0 on, one for each module; got"):
        decision_from_plan(ranks)


def test_lists_are_taken(make_observation: Any) -> None:
    assert decision_from_plan([0, 8.0]).ranks.tolist() == [0, 8]  # type: ignore[arg-type]
    observation: Observation = make_observation(3)
    scores = decision_from_scores(observation, [0, 1, 2]).scores  # type: ignore[arg-type]
    assert scores.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("scores", [[np.nan, 0, 0], [np.inf, 0, 0], [0, 0], [[0, 0, 0]], None, ["a", "b", "c"]])
def test_scores_that_are_none(make_observation: Any, scores: Any) -> None:
    with pytest.raises(ConfigError, match="Scores are finite numbers, one for each of 3 modules; got"):
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
