"""What moving ranks costs: time and memory of a training step beside plain LoRA and AdaLoRA."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...common.devices import find_device
from ...common.tables import make_table
from ...common.units import format_bytes
from ...errors import ConfigError
from ..harness import Figures, estimate_figures, machine_facts, usual_step, whole_cycle
from ..models import FAMILIES, Family, Size
from .race import PERIOD, Course, Result, run

BAR = 1.01
"""What a cycle may cost, relative to plain LoRA."""

OWN_BAR = 0.005
"""What rankpilot's own work in a step between two decisions may take, as a share of plain LoRA's step."""

LABELS = {"plain": "plain LoRA", "plain_again": "once more", "adalora": "AdaLoRA", "rankpilot": "rankpilot"}


FULL = Size(), Course(cycles=6)
QUICK = Size(layers=2, rows=4), Course(cycles=4)


@dataclass(frozen=True)
class Options:
    """Measure what rankpilot costs: time and memory of a training step beside plain LoRA and AdaLoRA.

    Trains a random BERT classifier and a random Llama on random tokens. Plain LoRA at rank 8, plain LoRA once more,
    PEFT's AdaLoRA from rank 12 to 8, and rankpilot with signal-mean and a decision after every tenth step run in one
    process: one step of each in turn, in changing order and on the same batches, so that noise hits all alike. A step
    is all of it: forward, backward, clipping, optimiser, and the method's own work. Times are CPU time, on a GPU wall
    time.

    Columns: "a step" is the median over steps of the time over plain LoRA's time in the same round; it leaves out
    decisions, which fall into one step of ten. "Ten steps" is the mean over the ten places in a cycle of the median
    at each: what a run pays, and the figure to quote. Intervals are 95 % (bootstrap over cycles); the second row
    shows what noise alone does. "Own work" is what the method does between the passes, timed by itself, over plain
    LoRA's step, in a usual step (figures hold the mean over ten as well): far less noisy, but blind to what it does to
    the passes.
    "Adapter" is the bytes of weights, gradients, optimiser state and further buffers; "peak" adds the tensors saved
    for the backward pass.

    The full run takes about eight minutes on two cores. Leave the machine alone meanwhile; where others use it too,
    OMP_NUM_THREADS=1 makes figures steadier.

    Attributes:
        quick: under a minute: two layers, four rows, fewer cycles. Steps are short, so that fixed costs weigh more.
        json: also write the figures to this file, as flat JSON with names like "bert.adalora.cycle_ratio".
        device: auto is CUDA where there is one.
        seed: of weights, batches and decisions, at least 0.
    """

    quick: bool = False
    json: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def figures_of(family: Family, results: dict[str, Result]) -> Figures:
    """One model's results by flat name; ratios are relative to plain LoRA, so it has none itself."""
    figures: Figures = {f"{family}.rankpilot.setup_seconds": results["rankpilot"].setup_seconds}
    plain = results["plain"]
    for name, result in results.items():
        prefix = f"{family}.{name}"
        figures[f"{prefix}.step_ms"] = float(1e3 * np.median(result.seconds))
        figures[f"{prefix}.adapter_bytes"] = result.adapter_bytes
        figures[f"{prefix}.peak_bytes"] = result.peak_bytes
        figures[f"{prefix}.rank_changes"] = result.rank_changes
        if result is plain:
            continue
        for kind, statistic in (("step", usual_step), ("cycle", whole_cycle)):
            figures |= estimate_figures(f"{prefix}.{kind}_ratio", result.against(plain, statistic))
        figures[f"{prefix}.total_ratio"] = float(result.seconds.sum() / plain.seconds.sum())
        figures[f"{prefix}.own_share"] = result.own_share(plain)
        figures[f"{prefix}.own_share_of_a_step"] = result.own_share_of_a_step(plain)
    return figures


def table_of(title: str, results: dict[str, Result]) -> Table:
    """One model's results for people."""
    columns = ("method", "a step", "ten steps", "own work", "adapter", "peak", "changes")
    rows, plain = [], results["plain"]
    for name, result in results.items():
        times = [f"{1e3 * np.median(result.seconds):.0f} ms", "", ""]
        if result is not plain:
            ratios = (result.against(plain, statistic) for statistic in (usual_step, whole_cycle))
            times = [f"{ratio.value:.3f}\n{ratio.low:.3f} to {ratio.high:.3f}" for ratio in ratios]
            times.append(f"{result.own_share_of_a_step(plain):.2%}")
        sizes = (format_bytes(size) for size in (result.adapter_bytes, result.peak_bytes))
        rows.append((LABELS[name], *times, *sizes, str(result.rank_changes)))
    return make_table(title, columns, rows)


def verdict(family: Family, results: dict[str, Result], *, quick: bool) -> str:
    """A sentence on whether rankpilot keeps to the bar; the steps of a quick run are too short to show that."""
    result = results["rankpilot"]
    cycle = result.against(results["plain"], whole_cycle)
    if quick:
        word = "not for a quick run"
    else:
        word = "kept" if cycle.high <= BAR else "missed" if cycle.low > BAR else "undecided, the noise is too large"
    own = result.own_share_of_a_step(results["plain"])
    kept = "not for a quick run" if quick else "kept" if own <= OWN_BAR else "missed"
    return (
        f"{family}: rankpilot's own work in a step between decisions takes {own:.2%} of plain LoRA's step. Bar "
        f"{OWN_BAR:.1%}: {kept}.\n"
        f"{family}: rankpilot's ten steps, one decision among them, take {cycle:.3f} of plain LoRA's. Bar {BAR}: "
        f"{word}. Before the first step it took {result.setup_seconds:.1f} s, once."
    )


def benchmark(options: Options, console: Console) -> Figures:
    """Run both models, print a table of each, and return all figures.

    Raises:
        ConfigError: the seed is negative, or the device is absent.
    """
    if options.seed < 0:
        raise ConfigError(f"--seed is at least 0; got {options.seed}.")
    device = find_device(options.device)
    size, course = QUICK if options.quick else FULL
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    figures |= asdict(size) | asdict(course)
    everything = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for family in FAMILIES:
            task = bar.add_task(f"{family}, rounds of four steps", total=course.steps)
            advance = partial(bar.advance, task)
            everything[family] = run(family, size, course, device, options.seed, on_round=advance)
            figures |= figures_of(family, everything[family])
    shape = f"{size.layers} layers x {size.width}, vocabulary {size.vocabulary}, {size.rows} x {size.length} tokens"
    for family, results in everything.items():
        console.print(table_of(f"{family}: {shape}, {course.cycles} cycles of {PERIOD} steps", results))
    for family, results in everything.items():
        console.print(verdict(family, results, quick=options.quick), highlight=False)
    return figures
