"""What rankpilot promises about memory: predictions beside measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...common.devices import find_device
from ...errors import ConfigError
from ...memory.batch_shape import BatchShape
from ..harness import Figures, machine_facts, with_progress
from ..ledger import Ledger
from ..models import ARCHITECTURES, FAMILIES, Family, Size
from . import report
from .accuracy import SHAPES, compare_plans
from .guard import PLANS, REFERENCE, measured_steps, outside_view
from .settings import CHECKPOINTING, PRECISIONS, Setting


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


@dataclass(frozen=True)
class Options:
    """Show that the memory of a training step is predicted.

    Random plans (random ranks, rank 0 included; all layers, top layers, single modules) are trained for two steps on
    small random Llama, BERT, GPT-2 and T5 models, with gradient checkpointing in each of torch's forms and in three
    precisions, at the batch shape of calibration and at others. "Saved" is what autograd holds at the end of the
    forward pass, "peak" all of a step, both beside the frozen model. An error is predicted over measured, minus 1:
    above 0 is safe, below 0 is not. Under checkpointing the prediction holds a margin.

    Then one larger step is looked at from outside: what the operating system (on CUDA the allocator) says; and a step
    is timed with and without the guard of the budget that measures it. Intervals are 95 % (bootstrap).

    The full run takes about five minutes on two cores. Leave the machine alone meanwhile; OMP_NUM_THREADS=1 makes
    figures steadier.

    Attributes:
        quick: under a minute: a thin slice of everything, whose times mean nothing.
        json: also write the figures to this file, as flat JSON with names like
            "accuracy.no_checkpointing.peak_error_median"; results go into a .jsonl file beside it as they come.
        resume: go on with the results of an interrupted run, from the .jsonl file.
        device: auto is CUDA where there is one.
        seed: of models, batches and plans, at least 0.
    """

    quick: bool = False
    json: Path | None = None
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def benchmark(options: Options, console: Console) -> Figures:
    """Run both parts, print their tables, and return all figures.

    Raises:
        ConfigError: a value out of range, an absent device, or results that are in the way.
    """
    if options.seed < 0:
        raise ConfigError(f"--seed is at least 0; got {options.seed}.")
    extent, device = QUICK if options.quick else FULL, find_device(options.device)
    ledger = Ledger(options.json, resume=options.resume)
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    plans = {
        setting: ledger.fetch(compare_plans, setting, extent.shapes, extent.plans, device, options.seed)
        for setting in with_progress(extent.settings, "settings of random plans")
    }
    figures |= report.accuracy(plans, console)
    guards: dict[str, dict[str, Any]] = {}
    for family in with_progress(extent.families, "guard and resident set"):
        given = (family, extent.size, device, options.seed)
        guards[family] = {"guard": ledger.fetch(measured_steps, *given, extent.rounds)}
        if family == extent.families[0]:
            guards[family]["outside"] = ledger.fetch(outside_view, *given, extent.outside)
    return figures | report.guard(guards, console)
