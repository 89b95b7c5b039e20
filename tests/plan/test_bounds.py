"""Bounds on ranks, where several entries name one module."""

from __future__ import annotations

from rankpilot.lora.spec import ModuleSpec
from rankpilot.plan.problem import Bounds, rank_bounds

MODULES = [ModuleSpec(f"layers.{layer}.{kind}", layer, 16, 64) for layer in range(2) for kind in ("q_proj", "up_proj")]


def bounds_of(bounds: Bounds) -> list[tuple[int, int]]:
    low, high = rank_bounds(MODULES, bounds)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def test_of_several_entries_for_one_module_the_last_counts() -> None:
    assert bounds_of({"q_proj": (0, 4), "layers.0.q_proj": (8, 16)}) == [(8, 16), (0, 16), (0, 4), (0, 16)]
    assert bounds_of({"layers.0.q_proj": (8, 16), "q_proj": (0, 4)}) == [(0, 4), (0, 16), (0, 4), (0, 16)]


def test_a_module_that_cannot_have_the_least_rank_has_the_most_that_it_can() -> None:
    assert bounds_of({"q_proj": (0, 64), "layers.1.q_proj": (32, 64)})[2] == (16, 64)
