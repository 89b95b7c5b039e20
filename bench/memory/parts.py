"""How far the memory benchmark goes, and its two parts: random plans, and the guard of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...memory.batch_shape import BatchShape
from ..harness import with_progress
from ..ledger import Ledger
from ..models import ARCHITECTURES, FAMILIES, Family, Size
from .accuracy import SHAPES, compare_plans
from .guard import PLANS, REFERENCE, measured_steps, outside_view
from .settings import CHECKPOINTING, PRECISIONS, Setting

T = TypeVar("T")


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        settings: of random plans.
        shapes: batch shapes of each setting.
        plans: random plans at each shape.
        size: of the larger models.
        families: of the larger models whose guard is timed.
        outside: plans that are looked at from outside, on the first of the families.
        rounds: timed pairs of a plain and a measured step.
    """

    settings: tuple[Setting, ...]
    shapes: tuple[BatchShape, ...]
    plans: int
    size: Size
    families: tuple[Family, ...]
    outside: tuple[str, ...]
    rounds: int


FULL = Extent(
    settings=tuple(Setting(f, c, p) for f in ARCHITECTURES for c in CHECKPOINTING for p in PRECISIONS),
    shapes=SHAPES,
    plans=3,
    size=Size(),
    families=FAMILIES,
    outside=PLANS,
    rounds=10,
)
QUICK = Extent(
    settings=tuple(
        Setting(family, checkpointing, "fp32")
        for index, family in enumerate(ARCHITECTURES)
        for checkpointing in ("none", CHECKPOINTING[1 + index % 2])
    ),
    shapes=SHAPES[:2],
    plans=1,
    size=Size(layers=2, rows=4),
    families=FAMILIES[:1],
    outside=(REFERENCE,),
    rounds=3,
)


def accuracy_part(extent: Extent, device: torch.device, seed: int, ledger: Ledger) -> dict[Setting, dict[str, Any]]:
    """Random plans by setting; see `compare_plans`."""
    return {
        setting: ledger.fetch(compare_plans, setting, extent.shapes, extent.plans, device, seed)
        for setting in with_progress(extent.settings, "settings of random plans")
    }


def guard_part(extent: Extent, device: torch.device, seed: int, ledger: Ledger) -> dict[str, dict[str, Any]]:
    """By family "guard" (see `measured_steps`) and, for the first one, "outside" (see `outside_view`)."""
    results: dict[str, dict[str, Any]] = {}
    for family in with_progress(extent.families, "guard and resident set"):
        given = (family, extent.size, device, seed)
        results[family] = {"guard": ledger.fetch(measured_steps, *given, extent.rounds)}
        if family == extent.families[0]:
            results[family]["outside"] = ledger.fetch(outside_view, *given, extent.outside)
    return results
