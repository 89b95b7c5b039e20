"""Sweeps of the learning rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rankpilot.decide.plan.rate import RULE

from benchmarks.rates import CONSTANT, Sweep, packed, published, whole

SWEEP = Sweep("family", "name", 64, 100, 8, 2.0, 1.0, 400, {1e-3: 2.0, 1e-2: 1.0, 1e-1: 4.0})


@pytest.mark.parametrize(("rate", "regret"), [(1e-2, 0), (1e-3, 69.3), (10**-1.5, 69.3), (1e-4, 69.3)])
def test_regret_is_read_off_between_the_rates_that_were_run(rate: float, regret: float) -> None:
    assert SWEEP.regret(rate) == pytest.approx(regret, abs=0.1)
    beyond = SWEEP.regret(rate, beyond=True)
    assert beyond == SWEEP.regret(rate) if rate >= 1e-3 else beyond > 100


def test_the_rule_is_the_constant_on_published_sweeps_and_better_than_it_on_smollm2() -> None:
    sweeps = [*published()]
    assert len({sweep.name for sweep in sweeps}) == 41
    rule, usual, low = (
        np.mean([sweep.regret(rate or sweep.rate(RULE)) for sweep in sweeps]) for rate in (None, CONSTANT, 1e-4)
    )
    assert rule == pytest.approx(usual, rel=0.02)
    assert usual < low
    real = [*whole()]
    assert len(real) == 17
    rule, usual = (np.mean([sweep.regret(rate or sweep.rate(RULE)) for sweep in real]) for rate in (None, CONSTANT))
    assert rule < usual / 3
    assert all(math.isfinite(sweep.regret(sweep.rate(RULE))) for sweep in packed())
