"""Noise on the signals: none changes nothing, and what does not read signals is sure."""

from __future__ import annotations

import pytest
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.log import DecisionRecord
from rankpilot.agents.rules import find_rule
from rankpilot.errors import ConfigError
from rankpilot.study.what_if import stability

from .conftest import Decide, Observe


def test_more_noise_moves_more(make_observation: Observe, log_decision: Decide) -> None:
    rule = find_rule("signal-mean")
    logged = log_decision(make_observation(16), rule)
    calm, windy = (stability(logged, rule, noise, draws=20) for noise in (0.001, 1.0))
    assert calm.same == 1
    assert calm.sure.all()
    assert windy.same == 0
    assert not windy.sure.all()
    assert windy.near.min() < calm.near.min()
    told = windy.to_json()
    assert told == {"same": 0.0, "noise": 1.0, "sure": windy.sure.tolist()}
    assert f"{windy.sure.sum()} of 16 modules" in windy.sentence()
    assert stability(logged, rule, 1.0, draws=20).near.tolist() == windy.near.tolist(), "the draws are the same"


def test_a_rule_that_reads_no_signals_is_sure(make_observation: Observe, log_decision: Decide) -> None:
    logged = log_decision(make_observation(12), find_rule("top-down"))
    found = stability(logged, find_rule("top-down"), noise=1.0, draws=5)
    assert (found.same, found.sure.all()) == (1.0, True)


@pytest.mark.parametrize(("noise", "draws"), [(-0.1, 5), (float("nan"), 5), (0.1, 0)])
def test_out_of_range(decisions: list[DecisionRecord], policy: LearnedPolicy, noise: float, draws: int) -> None:
    with pytest.raises(ConfigError, match="noise is at least 0 and draws are at least 1"):
        stability(decisions[0], policy, noise, draws)
