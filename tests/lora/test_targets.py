"""Target modules, and the ladder of allowed ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.lora.spec import RankLadder
from rankpilot.lora.targets import find_target_modules, other_trainable, unwrap


def test_wrapped_models_are_unwrapped(make_llama):
    model = make_llama()
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert unwrap(wrapper) is model
    assert len(find_target_modules(wrapper)) == 14
    outer = torch.nn.Module()
    outer._orig_mod = wrapper
    assert unwrap(outer) is model


def test_an_adapter_that_was_deleted_is_told(make_llama):
    model = make_llama()
    model.delete_adapter("default")
    with pytest.raises(UnknownNameError, match="Unknown adapter 'default'"):
        find_target_modules(model)


def test_what_trains_beside_the_pairs(make_bert, make_llama):
    model = make_bert()
    rest = other_trainable(model, find_target_modules(model))
    assert sorted(p.numel() for p in rest) == [3, 96]
    llama = make_llama()
    assert other_trainable(llama, find_target_modules(llama)) == []


@pytest.mark.parametrize("ranks", [(), (0,), (1, 2), (0, 2, 2), (0, 4, 2), (0, -1)])
def test_a_ladder_that_does_not_rise_from_zero_is_refused(ranks):
    with pytest.raises(ConfigError, match="must ascend strictly from 0"):
        RankLadder(ranks)


LADDERS = st.sets(st.integers(1, 100), min_size=1, max_size=9).map(lambda s: RankLadder((0, *sorted(s))))


@given(LADDERS, st.integers(0, 120), st.integers(-12, 12))
def test_steps_stay_on_the_ladder(ladder, rank, delta):
    rung = int(ladder.rung(rank))
    assert ladder.ranks[rung] <= rank, "the highest that is not above"
    assert rung == ladder.top or ladder.ranks[rung + 1] > rank
    assert ladder.step(rank, delta) == ladder.ranks[min(max(rung + delta, 0), ladder.top)]


def test_steps_of_an_array():
    assert RankLadder().rung(np.array([0, 1, 3, 8, 9, 200])).tolist() == [0, 1, 2, 4, 4, 12]
    assert RankLadder().step(np.array([8, 9, 0, 64]), np.array([2, -1, -1, 5])).tolist() == [16, 4, 0, 128]
