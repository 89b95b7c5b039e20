"""The modules that a page shows: those of a log, or in a long log one for each type of module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...allocation.log import DecisionRecord
from ...common.arrays import FloatArray, IntArray
from ...common.module_names import short_names
from ..run.panels import module_kinds
from .curves import numbers


@dataclass(frozen=True, eq=False)
class Modules:
    """The modules of a log, or their types; S of them are shown.

    Attributes:
        shown: each as the page gets it: its name, the same shortened (label), its layer, block and type, and how many
            modules it stands for.
        slots: which of them each module is, at each decision, int (modules,) each.
    """

    shown: list[dict[str, Any]]
    slots: list[IntArray]

    @classmethod
    def of(cls, records: Sequence[DecisionRecord], by_type: bool) -> Modules:
        """The modules of some decisions.

        Args:
            records: they need not all be about the same modules.
            by_type: show one for all modules of a type.
        """
        layers = {
            name: block
            for each in records
            for name, block in zip(each.modules, each.problem.blocks.tolist(), strict=True)
        }
        names = list(layers)
        places = {name: place for place, name in enumerate(names)}
        rows = [np.array([places[name] for name in each.modules]) for each in records]
        shorts = short_names(names)
        kinds = module_kinds(shorts)
        if by_type:
            types = list(dict.fromkeys(kinds))
            kind_of = np.array([types.index(kind) for kind in kinds])
            counts = np.bincount(kind_of).tolist()
            shown = [
                {"name": kind, "label": kind, "layer": "", "block": 0, "type": kind, "count": count}
                for kind, count in zip(types, counts, strict=True)
            ]
            return cls(shown, [kind_of[row] for row in rows])
        shown = [
            {"name": name, "label": str(short), "layer": short.layer, "block": block, "type": kind, "count": 1}
            for name, short, block, kind in zip(names, shorts, layers.values(), kinds, strict=True)
        ]
        return cls(shown, rows)

    def means(
        self, values: Sequence[float] | FloatArray | IntArray, slots: IntArray, digits: int = 2
    ) -> list[float | int | None]:
        """Means over the rows of one decision, for each module that is shown; null where it has no row.

        Args:
            values: of each row, (rows,); what is not finite is unknown.
            slots: of each row, int (rows,).
            digits: behind the point.
        """
        counts = np.bincount(slots, minlength=len(self.shown))
        totals = np.bincount(slots, weights=np.asarray(values, dtype=np.float64), minlength=len(self.shown))
        with np.errstate(invalid="ignore"):
            return numbers(totals / counts, digits)
