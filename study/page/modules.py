"""The modules that a page shows: those of a log, or in a long log one for each type of module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

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
        slots: which of them each row of the log is about, int (rows,).
    """

    shown: list[dict[str, Any]]
    slots: IntArray

    @classmethod
    def of(cls, log: pa.Table, by_type: bool) -> Modules:
        """The modules of a log, as `DecisionLog.read` returns it.

        Args:
            log: its decisions need not all be about the same modules.
            by_type: show one for all modules of a type.
        """
        coded = log["module"].combine_chunks().dictionary_encode()
        names, rows = coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)
        blocks = np.zeros(len(names), dtype=np.int64)
        blocks[rows] = log["block"].to_numpy()
        shorts = short_names(names)
        kinds = module_kinds(shorts)
        if by_type:
            types = list(dict.fromkeys(kinds))
            places = np.array([types.index(kind) for kind in kinds])
            counts = np.bincount(places).tolist()
            shown = [
                {"name": kind, "label": kind, "layer": "", "block": 0, "type": kind, "count": count}
                for kind, count in zip(types, counts, strict=True)
            ]
            return cls(shown, places[rows])
        shown = [
            {"name": name, "label": str(short), "layer": short.layer, "block": block, "type": kind, "count": 1}
            for name, short, block, kind in zip(names, shorts, blocks.tolist(), kinds, strict=True)
        ]
        return cls(shown, rows)

    def means(self, values: Sequence[float] | FloatArray, slots: IntArray, digits: int = 2) -> list[float | int | None]:
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
