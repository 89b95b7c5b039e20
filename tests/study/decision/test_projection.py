"""Why ranks that were asked for are not those of the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rankpilot.allocation.log import DecisionRecord
from rankpilot.allocation.observation import Observation
from rankpilot.allocation.policy import Decision
from rankpilot.study.decision.projection import projection_of


@dataclass
class Wants:
    """A policy that wants certain ranks."""

    ranks: tuple[int, ...]
    name: str = "wants"

    def decide(self, observation: Observation) -> Decision:
        return Decision(np.array(self.ranks), np.zeros(len(self.ranks)), exact=True)


def decided(make: Callable[..., Observation], log: Callable[..., DecisionRecord], *ranks: int, **problem: Any) -> Any:
    observation = make(4, ranks=np.array([4, 4, 4, 4]), **problem)
    return log(observation, Wants(ranks))


def test_every_reason_is_told(
    make_observation: Callable[..., Observation], log_decision: Callable[..., DecisionRecord]
) -> None:
    bounds = {"high": np.array([32, 2, 32, 32]), "low": np.array([0, 0, 6, 0])}
    logged = decided(make_observation, log_decision, 5, 4, 4, 32, max_step=2, limit=1e9, **bounds)
    found = projection_of(logged)
    assert found.got.tolist() == [4, 2, 8, 12]
    assert found.reasons == (
        "the ladder has no such rank, and the next one below counts",
        "their upper bound is lower",
        "their lower bound is higher",
        "no module may move further at one decision",
    )
    assert "1 module did not get the rank asked for: their upper bound is lower." in found.sentences()


def test_pinned_modules_and_changes_by_a_person(
    make_observation: Callable[..., Observation], log_decision: Callable[..., DecisionRecord]
) -> None:
    logged = decided(make_observation, log_decision, 4, 8, 4, 4)
    edited = logged.rank_clipped.copy()
    edited[1], edited[3] = 4, 16
    found = projection_of(replace(logged, pinned=np.array([False, True, False, False]), rank_clipped=edited))
    assert found.reasons == ("", "they are pinned", "", "a person changed it in review")


def test_a_budget_lowers_and_its_rest_raises(
    make_observation: Callable[..., Observation], log_decision: Callable[..., DecisionRecord]
) -> None:
    logged = decided(make_observation, log_decision, 32, 32, 4, 4, limit=3000.0)
    found = projection_of(logged)
    assert found.lowered >= 1
    assert (found.got != found.asked).any()
    assert any("exceed the budget" in sentence for sentence in found.sentences())
    same = projection_of(decided(make_observation, log_decision, 2, 2, 2, 2))
    assert same.sentences() == ["Every module got the rank that the policy asked for."]
