"""Kinds of modules by their shapes, in layers as models have them."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.agents.observation import ModuleShapes
from rankpilot.lora.spec import ModuleSpec

LAYERS: dict[str, list[tuple[str, int, int, bool]]] = {
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
    return [ModuleSpec(f"layers.{block}.{name}", block, d_in, d_out) for name, d_in, d_out, _ in LAYERS[layer]]


@pytest.mark.parametrize("layer", LAYERS)
def test_which_modules_are_wide(layer: str) -> None:
    """Every layer by itself, whatever the others look like."""
    modules = [*specs("llama", 0), *specs(layer, 1), *specs("one product for query, key and value", 2)]
    shapes = ModuleShapes.of(modules)
    inside = np.array([module.block == 1 for module in modules])
    assert shapes.wide[inside].tolist() == [wide for *_, wide in LAYERS[layer]]
    assert shapes.wide[~inside].tolist() == [wide for name in ("llama", list(LAYERS)[2]) for *_, wide in LAYERS[name]]


def test_ratios_and_positions() -> None:
    shapes = ModuleShapes.of([*specs("llama", 0), *specs("one module", 1)])
    np.testing.assert_allclose(shapes.positions, [*np.arange(7) / 6, 0])
    np.testing.assert_allclose(shapes.ratios, [1, 0.5, 0.5, 1, 2.75, 2.75, 1 / 2.75, 1000 / 64])
