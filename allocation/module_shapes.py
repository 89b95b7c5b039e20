"""What modules are by their shapes and their place in a layer; names are not read.

In a transformer's layer the MLP leads through a wide inner side: one module writes it, and another reads it. Attention
stays at the width of the layer, or writes sides that it does not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.arrays import BoolArray, FloatArray
from ..lora.module_spec import ModuleSpec


@dataclass(frozen=True, eq=False)
class ModuleShapes:
    """Shapes and positions of target modules.

    Attributes:
        ratios: d_out / d_in, (modules,).
        wide: whether a module has the inner side of its layer, as those of an MLP do, bool (modules,).
        positions: place among the modules of its layer, from the first (0) to the last (1), (modules,).
    """

    ratios: FloatArray
    wide: BoolArray
    positions: FloatArray

    @classmethod
    def of(cls, modules: Sequence[ModuleSpec]) -> ModuleShapes:
        """The shapes of some modules, in the order in which the model lists them."""
        blocks = np.array([module.block for module in modules], dtype=np.int64)
        wide, positions = np.zeros(len(modules), dtype=np.bool_), np.zeros(len(modules))
        for block in np.unique(blocks).tolist():
            members = np.flatnonzero(blocks == block)
            positions[members] = np.arange(len(members)) / max(1, len(members) - 1)
            wide[members] = _wide([modules[index] for index in members.tolist()])
        return cls(np.array([module.d_out / module.d_in for module in modules]), wide, positions)


def _wide(layer: Sequence[ModuleSpec]) -> list[bool]:
    """Of each module of one layer, whether it has the inner side.

    The inner side is the largest one above the layer's width that one module writes and another reads. The width is
    the side that most modules have, of several the smallest.
    """
    counts = Counter(side for module in layer for side in {module.d_in, module.d_out})
    width = min(counts, key=lambda side: (-counts[side], side))
    both = {module.d_in for module in layer} & {module.d_out for module in layer}
    inner = max((side for side in both if side > width), default=0)
    return [inner in (module.d_in, module.d_out) for module in layer]
