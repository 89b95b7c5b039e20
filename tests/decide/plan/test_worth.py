"""What plans are worth: features by hand, 0 for plain LoRA, and a spread that grows with the distance from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.common.errors import DataError
from rankpilot.decide.plan.worth import FEATURES, Modules, PlanWorth, distance, packaged_worth
from rankpilot.lora.spec import DEFAULT_RANKS

LAYERS = 4
WIDE = np.tile([False, True], LAYERS)
DEPTH = np.repeat(np.arange(LAYERS) / (LAYERS - 1), 2)
NAMES = list(FEATURES)
PLAIN = np.full((1, len(WIDE)), 8)


def model(width: float = 512.0, **changes: Any) -> Modules:
    """Four layers of an attention module and an MLP module."""
    return Modules(**{"wide": WIDE, "depth": DEPTH, "width": width} | changes)


def told(features: np.ndarray) -> dict[str, float]:
    """The features of one plan that are not 0."""
    return {name: value for name, value in zip(NAMES, features[0].tolist(), strict=True) if value}


RANKS = st.lists(st.sampled_from(DEFAULT_RANKS), min_size=len(WIDE), max_size=len(WIDE)).map(np.array)


@pytest.mark.parametrize(
    "changes",
    [
        {"plain": np.minimum(8, np.arange(1, 9))},
        {"wide": np.zeros(8, dtype=np.bool_), "depth": np.zeros(8)},
        {"wide": np.ones(8, dtype=np.bool_)},
    ],
    ids=["narrow modules", "one layer of attention", "MLPs alone"],
)
def test_plain_lora_of_any_model_has_no_feature(changes: dict[str, Any]) -> None:
    modules = model(**changes)
    plain = np.broadcast_to(modules.plain, (1, 8))
    assert not modules.features(plain).any()
    fewer = plain.copy()
    fewer[0, 0] = 0
    assert np.isfinite(modules.features(fewer)).all()
    assert distance(modules.features(fewer))[0] > 0


def test_features_by_hand() -> None:
    """The bottom layer has no adapter, the next rank 32, the third its MLP at rank 2, and the top layer rank 8."""
    ranks = np.array([[0, 0, 32, 32, 0, 2, 8, 8]])
    assert told(model(2048.0).features(ranks)) == pytest.approx(
        {
            "MLP modules without adapter, lower half": 1 / 2,
            "attention modules without adapter, lower half": 1 / 2,
            "attention modules without adapter, upper half": 1 / 2,
            "few modules": (3 / 8) ** 2,
            "layers without adapter at the bottom": 1 / 3,
            "rank of attention modules": 2 / 4,
            "other ranks than 8": (2 + 2 + 2) / 8,
            "rank in a wide model": (2 + 2 - 2) / 8 * (2 / 4),
            "lower layers of a wide model": 1 / 2 * (2 / 4),
            "layers at the bottom of a wide model": 1 / 3 * (2 / 4),
        }
    ), "the ranks 32 and 2 of MLPs cancel"
    half = model().features(np.full((1, 8), 16))
    assert told(half) == {"rank of MLP modules": 1, "rank of attention modules": 1, "other ranks than 8": 1}


def test_distances_by_hand() -> None:
    plans = np.array([[8] * 8, [16] * 8, [128] * 8, [8, 0] * 4, [0] * 4 + [8] * 4, [1] * 8, [0] * 8])
    assert distance(model().features(plans)).tolist() == [0, 0.25, 1, 0.5, 0.5, 0.75, 1]


@given(RANKS, st.permutations(range(len(WIDE))))
def test_the_order_of_modules_plays_no_part(ranks: np.ndarray, order: list[int]) -> None:
    there = model(wide=WIDE[order], depth=DEPTH[order])
    np.testing.assert_allclose(there.features(ranks[None, order]), model().features(ranks[None]), atol=1e-12)


@given(st.sets(st.integers(0, 7)), st.integers(0, 7))
def test_a_plan_that_adapts_fewer_modules_at_rank_8_is_further_away(dropped: set[int], also: int) -> None:
    one, fewer = (np.where(np.isin(np.arange(8), list(gone)), 0, 8) for gone in (dropped, dropped | {also}))
    near, far = distance(model().features(np.stack([one, fewer])))
    assert (near < far) == (also not in dropped)


@given(RANKS, st.floats(0, 1))
def test_the_spread_grows_with_the_distance(ranks: np.ndarray, share: float) -> None:
    """Whatever the covariance is: along one direction, and by the noise alone."""
    worth, features = packaged_worth(), model().features(ranks[None])
    assert worth.spread(share * features)[0] <= worth.spread(features)[0] + 1e-12
    alone = PlanWorth(np.zeros(len(FEATURES)), np.zeros((len(FEATURES), len(FEATURES))), 0.03)
    np.testing.assert_allclose(alone.spread(features), 0.03 * np.sqrt(distance(features)))


def test_spread_by_hand() -> None:
    covariance = np.zeros((len(FEATURES), len(FEATURES)))
    of_mlp, of_attention = NAMES.index("rank of MLP modules"), NAMES.index("rank of attention modules")
    covariance[of_mlp, of_mlp], covariance[of_attention, of_attention] = 0.04, 0.01
    covariance[of_mlp, of_attention] = covariance[of_attention, of_mlp] = 0.01
    worth = PlanWorth(np.zeros(len(FEATURES)), covariance, 0.2)
    plans = np.array([[16, 8] * 4, [16, 16] * 4])
    expected = [0.01 + 0.04 / 8, 0.04 + 0.01 + 2 * 0.01 + 0.04 / 4]
    np.testing.assert_allclose(worth.spread(model().features(plans)) ** 2, expected)


# The fit that ships ---------------------------------------------------------------------------------------------------


def test_the_fit_that_ships_says_what_was_measured() -> None:
    """Adapters on MLPs matter more than those on attention; one adapter is next to none."""
    worth, modules = packaged_worth(), model(576.0)
    plans = np.array([[8, 0] * 4, [0, 8] * 4, [0] * 7 + [1]])
    without_mlps, without_attention, one = worth.parts(modules.features(plans)).sum(axis=1)
    assert 0 < without_attention < min(without_mlps, one)


def test_it_is_written_and_read() -> None:
    worth = packaged_worth()
    again = PlanWorth.from_json(json.loads(json.dumps(worth.to_json())))
    np.testing.assert_array_equal(again.effects, worth.effects)
    np.testing.assert_array_equal(again.covariance, worth.covariance)
    assert again.noise == worth.noise


@pytest.mark.parametrize(
    "change",
    [
        lambda effects: effects | {"another": 0.0},
        lambda effects: {name: effects[name] for name in NAMES[1:]},
        lambda effects: {name: effects[name] for name in reversed(NAMES)},
    ],
    ids=["more", "fewer", "another order"],
)
def test_effects_of_other_features_are_refused(change: Callable[[dict[str, float]], dict[str, float]]) -> None:
    state = packaged_worth().to_json()
    with pytest.raises(DataError, match="These effects are of the features"):
        PlanWorth.from_json(state | {"effects": change(state["effects"])})
