"""Constants fit and stay, and the table takes seeds of an agent together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from rankpilot.agents.policy_file import LearnedPolicy, load_policy
from rankpilot.decide.groups import GroupView
from rankpilot.decide.observation import Observation
from rankpilot.env.evaluate import Row

from benchmarks.agent import KINDS, WAYS, Constant, Crippled, Random, planted_share, table_rows


@pytest.mark.parametrize("limit", [60.0, 400.0, 5000.0])
def test_a_constant_adapts_one_kind_and_fits(make_observation, monkeypatch, limit):
    observation, later = make_observation(12, limit=limit), make_observation(12, max_step=2)
    monkeypatch.setitem(KINDS, "test", ("m1",))
    ranks = Constant("constant test").decide(observation).ranks
    assert (Constant("constant test").decide(later).ranks == later.problem.ranks).all()
    assert ranks.any()
    assert limit == 60.0 or (observation.problem.fits(ranks) and {*np.flatnonzero(ranks) % 4} == {1})


def row(policy: str, task: str, loss: float, regime: str = "rate", kind: str = "text") -> Row:
    return Row(policy, f"b/{kind}/rank 1/{task}", regime, kind, "b", loss)


def test_seeds_are_one_row_and_of_constants_the_best_counts() -> None:
    losses = {"union": 1.0, "agent 0": 0.9, "agent 1": 1.1, "constant down": 1.5, "constant value": 1.2}
    found = dict(table_rows([row(name, task, loss) for name, loss in losses.items() for task in ("s", "t")]))
    assert {*found} == {"agent, 2 trainings", "best constant"}
    assert found["agent, 2 trainings"]["rate"].value == pytest.approx(50 * np.log(0.99))
    assert found["best constant"]["rate"].value == pytest.approx(100 * np.log(1.2))


def test_a_crippled_agent_sees_or_does_less(make_observation: Callable[..., Observation]) -> None:
    policy = load_policy("agent")
    assert isinstance(policy, LearnedPolicy)
    views = [GroupView.of(make_observation(24, seed, max_step=2)) for seed in range(40)]
    whole = [policy.act(view) for view in views]
    ranks, rates, permuted, clock = ([Crippled(policy, how).act(view) for view in views] for how in WAYS)
    assert (ranks, rates) == ([act * (act > 3) for act in whole], [act * (act <= 3) for act in whole])
    assert whole not in (permuted, clock)
    assert all(view.allowed[Random().act(view)] for view in views)


def test_the_share_of_what_the_oracle_gains() -> None:
    losses = {"left-alone": 1.0, "union": 0.9, "oracle": 0.81}
    rows = [row(name, "t", loss, kind="planted") for name, loss in losses.items()]
    assert planted_share(rows, "union") == pytest.approx(0.5)
