"""The ladder of allowed ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.errors import ConfigError
from rankpilot.lora.spec import DEFAULT_RANKS, RankLadder

LADDERS = st.sets(st.integers(1, 100), min_size=1, max_size=9).map(lambda s: RankLadder((0, *sorted(s))))


def test_the_example_of_the_docstring():
    assert RankLadder().step(8, +2) == 16
    assert RankLadder().step(np.array([8, 9, 0, 64]), np.array([2, -1, -1, 5])).tolist() == [16, 4, 0, 64]


@pytest.mark.parametrize("ranks", [(), (0,), (1, 2), (0, 2, 2), (0, 4, 2), (0, -1)])
def test_a_ladder_that_does_not_rise_from_zero_is_refused(ranks):
    with pytest.raises(ConfigError, match="rises strictly from 0"):
        RankLadder(ranks)


@given(LADDERS, st.integers(0, 120))
def test_rung_is_the_highest_that_is_not_above(ladder, rank):
    rung = int(ladder.rung(rank))
    assert ladder.ranks[rung] <= rank
    assert rung == ladder.top or ladder.ranks[rung + 1] > rank


@given(LADDERS, st.integers(0, 120), st.integers(-12, 12))
def test_steps_stay_on_the_ladder(ladder, rank, delta):
    after = ladder.step(rank, delta)
    assert after in ladder.ranks
    wished = int(ladder.rung(rank)) + delta
    if 0 <= wished <= ladder.top:
        assert after == ladder.ranks[wished]
    else:
        assert after == (ladder.ranks[0] if wished < 0 else ladder.ranks[-1])


def test_rungs_of_an_array():
    assert RankLadder().rung(np.array([0, 1, 3, 8, 9, 200])).tolist() == [0, 1, 2, 4, 4, 10]
    assert RankLadder().top == len(DEFAULT_RANKS) - 1
    assert RankLadder().array.dtype == np.int64
