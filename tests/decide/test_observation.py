"""What a policy sees of costs: logarithms of equal shares of the budget, alike in models of any size; and of shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.cost import ByteCost
from rankpilot.decide import observation as view
from rankpilot.decide.observation import Observation, observe
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.lora.adapters import SIGNALS
from rankpilot.lora.spec import ModuleSpec, RankLadder

LAYERS, A_LAYER = 3, 2
RANKS = (0, 1, 0, 128, 4, 8)
PER_RANK, FIXED, CONSTANT = 10.0, 500.0, 300.0


def seen(copies: int = 1, **options: Any) -> Observation:
    """Three layers of two modules; each of them `copies` times, under as many times the budget."""
    count = copies * LAYERS * A_LAYER
    blocks = np.arange(count) // (copies * A_LAYER)
    needs = np.arange(LAYERS)[:, None] >= blocks[None]
    per_rank, per_layer = np.full((1, count), PER_RANK), np.full((1, LAYERS), copies * FIXED)
    cost = ByteCost(("backward",), np.array([copies * CONSTANT]), per_rank, per_layer, needs)
    problem = AllocationProblem(
        np.repeat(RANKS, copies), np.full(count, 128), blocks, cost, copies * 4000.0, RankLadder()
    )
    return observe(
        replace(problem, **options),
        tuple(map(str, range(count))),
        np.ones((count, len(SIGNALS))),
        np.zeros(count, dtype=np.int64),
        view.ModuleShapes(np.ones(count), np.zeros(count, dtype=np.bool_), np.zeros(count)),
        view.RunState(0.0, 3, 4000.0 * copies, 1.0, (), total_steps=1000, rows=16, probe_fall=0.2, predicted=0.25),
        view.Moves(count),
    )


def column(observation: Observation, name: str) -> list[float]:
    return [float(value) for value in observation.modules[:, view.MODULE_FEATURES.index(name)]]


def share(cost: float) -> float:
    return float(np.log10(cost * LAYERS * A_LAYER / 4000))


def test_rise_is_the_cost_of_the_next_rung() -> None:
    steps = {0: 1, 1: 1, 4: 4, 8: 4}
    expected = [share(PER_RANK * steps[rank]) if rank in steps else -3 for rank in RANKS]
    assert column(seen(), "next_rung_cost") == pytest.approx(expected)


def test_release_is_what_dropping_a_module_frees() -> None:
    """The lowest adapted module takes with it what its layer, and layers below the next adapted one, hold."""
    expected = [-3, share(FIXED + PER_RANK), -3, share(128 * PER_RANK), share(4 * PER_RANK), share(8 * PER_RANK)]
    assert column(seen(), "drop_saving") == pytest.approx(expected)


def test_entry_is_what_a_module_adds_at_rank_one() -> None:
    assert column(seen(), "adapt_cost") == pytest.approx([share(PER_RANK), -3, share(PER_RANK), -3, -3, -3])
    above = seen(ranks=np.array([0, 0, 0, 0, 4, 8]))
    deepest, next_layer = share(2 * FIXED + PER_RANK), share(FIXED + PER_RANK)
    assert column(above, "adapt_cost") == pytest.approx([deepest, deepest, next_layer, next_layer, -3, -3])


def test_costs_look_alike_in_a_model_of_more_modules() -> None:
    small, large = seen(), seen(copies=5)
    expected = np.repeat(column(small, "next_rung_cost"), 5)
    np.testing.assert_allclose(column(large, "next_rung_cost"), expected, atol=1e-6)
    fresh = np.array([0, 0, 0, 0, 4, 8])
    several = seen(copies=5, ranks=np.repeat(fresh, 5))
    assert np.ptp(column(several, "adapt_cost")[:10]) == pytest.approx(0)


def test_costs_of_next_to_nothing_end_at_minus_three() -> None:
    observation = seen(limit=1e9)
    assert column(observation, "next_rung_cost") == [-3.0] * 6


@pytest.mark.parametrize("limit", [2000.0, 4000.0, 11000.0])
def test_another_limit_is_seen_as_if_it_had_been_there_from_the_start(limit: float) -> None:
    changed, expected = view.with_limit(seen(), limit), seen(limit=limit)
    np.testing.assert_array_equal(changed.modules, expected.modules)
    np.testing.assert_array_equal(changed.run, expected.run)
    assert changed.problem.limit == limit
    assert seen().problem.limit == 4000, "the observation itself stays as it is"


def test_what_the_loss_did_since_a_rank_moved_is_seen() -> None:
    moves = view.Moves(3)
    moves.interval(1.0, 0.1)
    moves.moved(np.array([1, 0, -2]))
    assert moves.features()[2].tolist() == [0, 0, 0], "nothing was measured since"
    moves.interval(0.5, 0.1)
    last, since, fall, error = moves.features()
    assert last.tolist() == [0.5, 0, -1]
    assert since.tolist() == [0.25, 3.5, 0.25]
    assert fall.tolist() == [2, 0, 2]
    assert error == pytest.approx([4 * 0.1 * 2**0.5, 0, 4 * 0.1 * 2**0.5])


# Kinds of modules by their shapes, in layers as models have them ------------------------------------------------------


SHAPES: dict[str, list[tuple[str, int, int, bool]]] = {
    "llama": [
        ("q", 64, 64, False), ("k", 64, 32, False), ("v", 64, 32, False), ("o", 64, 64, False),
        ("gate", 64, 176, True), ("up", 64, 176, True), ("down", 176, 64, True),
    ],
    "heads wider than the layer": [
        ("q", 64, 128, False), ("k", 64, 32, False), ("o", 128, 64, False),
        ("gate", 64, 192, True), ("up", 64, 192, True), ("down", 192, 64, True),
    ],
    "one product for query, key and value": [
        ("qkv", 64, 192, False), ("o", 64, 64, False), ("up", 64, 256, True), ("down", 256, 64, True),
    ],
    "attention alone": [("q", 64, 64, False), ("k", 64, 32, False), ("v", 64, 32, False)],
    "one way alone": [("q", 64, 64, False), ("v", 64, 64, False), ("up", 64, 256, False)],
    "one module": [("head", 64, 1000, False)],
}  # fmt: skip


def specs(layer: str, block: int) -> list[ModuleSpec]:
    return [ModuleSpec(f"layers.{block}.{name}", block, d_in, d_out) for name, d_in, d_out, _ in SHAPES[layer]]


@pytest.mark.parametrize("layer", SHAPES)
def test_which_modules_are_wide(layer: str) -> None:
    """Every layer by itself, whatever the others look like."""
    modules = [*specs("llama", 0), *specs(layer, 1), *specs("one product for query, key and value", 2)]
    shapes = view.ModuleShapes.of(modules)
    inside = np.array([module.block == 1 for module in modules])
    assert shapes.wide[inside].tolist() == [wide for *_, wide in SHAPES[layer]]
    assert shapes.wide[~inside].tolist() == [wide for name in ("llama", list(SHAPES)[2]) for *_, wide in SHAPES[name]]


def test_ratios_and_positions() -> None:
    shapes = view.ModuleShapes.of([*specs("llama", 0), *specs("one module", 1)])
    np.testing.assert_allclose(shapes.positions, [*np.arange(7) / 6, 0])
    np.testing.assert_allclose(shapes.ratios, [1, 0.5, 0.5, 1, 2.75, 2.75, 1 / 2.75, 1000 / 64])
