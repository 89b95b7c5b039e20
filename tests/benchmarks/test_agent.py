"""Constants fit and stay, and the table takes seeds of an agent together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from rankpilot.decide.observation import Observation
from rankpilot.env.evaluate import Row

from benchmarks.agent import KINDS, Constant, planted_share, table_rows


@pytest.mark.parametrize("limit", [60.0, 400.0, 5000.0])
def test_a_constant_adapts_one_kind_and_fits(make_observation: Callable[..., Observation], limit: float) -> None:
    observation = make_observation(12, limit=limit)
    KINDS["test"] = ("m1",)
    try:
        ranks = Constant("constant test").decide(observation).ranks
        later = make_observation(12, max_step=2)
        assert (Constant("constant test").decide(later).ranks == later.problem.ranks).all()
    finally:
        del KINDS["test"]
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


def test_the_share_of_what_the_oracle_gains() -> None:
    losses = {"left-alone": 1.0, "union": 0.9, "oracle": 0.81}
    rows = [row(name, "t", loss, kind="planted") for name, loss in losses.items()]
    assert planted_share(rows, "union") == pytest.approx(0.5)
