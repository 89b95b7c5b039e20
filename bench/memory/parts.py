"""How far the memory benchmark goes, and its two parts: random plans, and the guard of the budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from rich.progress import Progress

from ...memory.batch_shape import BatchShape
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


def accuracy_part(
    extent: Extent, device: torch.device, seed: int, ledger: Ledger, bar: Progress
) -> dict[Setting, dict[str, Any]]:
    """Random plans by setting; see `compare_plans`."""
    results = {}
    for setting in _shown(bar, "settings of random plans", extent.settings):
        work = {"part": "accuracy", "setting": asdict(setting), "device": str(device), "seed": seed}
        work |= {"shapes": [str(shape) for shape in extent.shapes], "plans": extent.plans}
        results[setting] = ledger.fetch(
            work, partial(compare_plans, setting, extent.shapes, extent.plans, device, seed)
        )
    return results


def guard_part(
    extent: Extent, device: torch.device, seed: int, ledger: Ledger, bar: Progress
) -> dict[str, dict[str, Any]]:
    """By family "guard" (see `measured_steps`) and, for the first one, "outside" (see `outside_view`)."""
    results: dict[str, dict[str, Any]] = {}
    for index, family in enumerate(_shown(bar, "guard and resident set", extent.families)):
        work = {"part": "guard", "family": family, "size": asdict(extent.size), "device": str(device), "seed": seed}
        timed = work | {"rounds": extent.rounds}
        results[family] = {
            "guard": ledger.fetch(timed, partial(measured_steps, family, extent.size, extent.rounds, device, seed))
        }
        if index == 0:
            looked = work | {"part": "outside", "plans": extent.outside}
            results[family]["outside"] = ledger.fetch(
                looked, partial(outside_view, family, extent.size, device, seed, extent.outside)
            )
    return results


def _shown(bar: Progress, title: str, items: tuple[T, ...]) -> Iterator[T]:
    task = bar.add_task(title, total=len(items))
    for item in items:
        yield item
        bar.advance(task)
