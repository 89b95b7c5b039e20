"""Which lanes of a race leave: judged on made-up losses, and on stored ones of real fine-tunes."""

from __future__ import annotations

from itertools import product

import numpy as np
from rankpilot.decide.rate_control import LEAST_WARM_UP, MOST_TIME, RaceLength, staying

from benchmarks.race import SWEPT, Run, race, regrets, stored_rows

WARM_UP, STEPS = 40, 400
LENGTH = RaceLength.of(WARM_UP, STEPS, 3)


def losses(*lanes: float, steps: int = LENGTH.last, noise: float = 0.02, own: float = 0.002) -> np.ndarray:
    """Losses of lanes at these distances, on batches whose difficulty they share."""
    rng = np.random.default_rng(0)
    shared = 2.0 + noise * rng.standard_normal(steps)
    return np.array([shared + lane + own * rng.standard_normal(steps) for lane in lanes])


def test_a_race_ends_at_twice_the_warm_up() -> None:
    assert (LENGTH.warm_up, LENGTH.first, LENGTH.last) == (WARM_UP, WARM_UP + LEAST_WARM_UP, 2 * WARM_UP)
    assert [step for step in range(1, 81) if LENGTH.looks(step)] == [52, 57, 62, 67, 72, 77, 80]


def test_a_race_never_takes_more_time_than_told() -> None:
    for warm_up, lanes, total in product([1, 12, 40, 400], [2, 3, 7], [60, 400, 10_000]):
        length = RaceLength.of(warm_up, total, lanes)
        assert (lanes - 1) * length.last <= MOST_TIME * total, (warm_up, lanes, total)
        assert 1 <= length.first <= length.last, (warm_up, lanes, total)
        assert length.looks(length.last), (warm_up, lanes, total)


def test_a_lane_surely_behind_leaves_at_once() -> None:
    assert staying(losses(0.0, 0.001, 0.2, steps=LENGTH.first), 1, LENGTH) == [0, 1]


def test_a_lower_rate_that_catches_up_stays_and_a_higher_one_does_not() -> None:
    steps = LENGTH.first
    closing = np.zeros((3, steps))
    closing[0, WARM_UP:] = np.linspace(0.2, 0.001, steps - WARM_UP)
    closing[2] = closing[0]
    assert staying(losses(0.0, 0.0, 0.0, steps=steps) + closing, 1, LENGTH) == [0, 1]


def test_without_evidence_the_start_goes_on() -> None:
    noise = losses(-0.001, 0.0, -0.001, own=0.5)
    assert staying(noise, 1, LENGTH) == [1]
    assert staying(losses(-0.02, 0.0, 0.0), 1, LENGTH) == [0], "a sure lead counts, however small"


def test_a_schedule_without_decay_goes_on_one_lane_lower() -> None:
    seen = losses(0.05, 0.0, 0.05)
    assert staying(seen, 1, LENGTH) == [1]
    assert staying(seen, 1, LENGTH, decays=False) == [0]
    assert staying(seen[:, : LENGTH.first], 1, LENGTH, decays=False) == [0, 1]
    assert staying(losses(0.0, 0.05, 0.1), 1, LENGTH, decays=False) == [0], "there is none below the lowest"


def test_broken_losses_are_behind() -> None:
    seen = losses(0.0, 0.0, 0.0)
    seen[2, 50:], seen[1, 60:] = np.nan, np.inf
    assert staying(seen, 1, LENGTH) == [0]


def test_races_on_stored_sweeps_choose_a_good_rate() -> None:
    rows = stored_rows()
    found = regrets(rows)
    assert len(found) >= 6, "sweeps of models and texts that nothing was fitted on"
    assert np.mean([each["race"] for each in found.values()]) <= 0.5
    assert max(each["further"] for each in found.values()) <= MOST_TIME
    for cell in found:
        own = {run.factor: row["losses"] for run, row in rows.items() if run == Run(*cell, run.factor) and run.factor}
        chosen, further = race(own, cell[2], 1.0)
        assert chosen in SWEPT
        assert 0 < further <= MOST_TIME
