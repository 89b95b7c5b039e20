"""`rankpilot bench published`: predictions from configurations, beside peaks that others measured on GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...common.tables import make_table
from ..harness import Figures, with_progress
from .published_peaks import Compared, compare_peft, compare_t4, quick_rows, summary, t4_rows
from .published_reserve import CARD_MIB, Reserved, reserve_of_peft, reserve_on_t4, right_verdicts

TIMED = ("llama-3.1-8b", "llama-3.1-70b")

_TIMED_CODE = """
import json, resource, sys, time
from rankpilot.memory.from_config import from_config
from rankpilot.memory.step_config import StepConfig
step = StepConfig(batch_size=4, max_length=2048, checkpointing=True)
before = time.process_time()
from_config(sys.argv[1], step).memory.cost()
print(json.dumps([time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


@dataclass(frozen=True)
class Options:
    """Predict published peaks of LoRA fine-tunes from configurations alone, without a GPU.

    The peaks are of 43 steps on a Tesla T4 (fitcheck-llm, MIT licence) and of PEFT's benchmark of Llama-3.2-3B on an
    L40S, where the length of the longest batch is fitted on the first run. Two more models are timed: CPU seconds and
    resident memory of a fresh process.

    Attributes:
        quick: under a minute: a few small models.
        json: also write the figures to this file, as flat JSON with names like "t4.mean_percent".
    """

    quick: bool = False
    json: Path | None = None


def benchmark(options: Options, console: Console) -> Figures:
    """Predict, print the tables, and return all figures."""
    rows = quick_rows(t4_rows()) if options.quick else t4_rows()
    on_t4 = [compare_t4(row) for row in with_progress(rows, "steps on a T4")]
    figures = _report("t4", "Steps on a T4, MiB allocated", on_t4, console)
    _, _, under = summary(run.error_with_left for run in on_t4)
    console.print(f"With what loading left, none is under by more than {max(-under, 0):.2f} %.", highlight=False)
    figures["t4.under_with_left_percent"] = under
    figures |= _report_reserve([reserve_on_t4(row) for row in rows], console)
    if not options.quick:
        figures |= _report("peft", "PEFT's Llama-3.2-3B on an L40S, MiB allocated", compare_peft(), console)
        figures |= _report("peft_reserved", "The same, MiB reserved", reserve_of_peft(), console)
    for model in TIMED[:1] if options.quick else TIMED:
        seconds, gib = timed(model)
        console.print(f"{model}: {seconds:.1f} s of CPU, {gib:.2f} GiB resident", highlight=False)
        figures |= {f"time.{model}.cpu_s": seconds, f"time.{model}.resident_gib": gib}
    return figures


def _report(key: str, title: str, runs: list[Compared], console: Console) -> Figures:
    lines = [(run.name, f"{run.predicted:.0f}", f"{run.measured:.0f}", f"{100 * run.error:+.2f}") for run in runs]
    console.print(make_table(title, ("run", "predicted", "measured", "error, %"), lines))
    mean, worst, under = summary(run.error for run in runs)
    console.print(f"mean {mean:.2f} %, worst {worst:.2f} %, lowest {under:+.2f} %", highlight=False)
    return {f"{key}.mean_percent": mean, f"{key}.worst_percent": worst, f"{key}.under_percent": under}


def _report_reserve(runs: list[Reserved], console: Console) -> Figures:
    """What the allocator reserves, by kind of attention and weights, and verdicts."""
    figures: Figures = {}
    for kind in sorted({run.kind for run in runs}):
        of_kind = [run.compared for run in runs if run.kind == kind]
        figures |= _report(f"t4_reserved.{kind.replace(' ', '_')}", f"MiB reserved: {kind}", of_kind, console)
    right = sum(run.verdict_is_right(CARD_MIB) for run in runs)
    on_smaller, of = right_verdicts(runs)
    console.print(
        f"verdicts for {CARD_MIB:,} MiB: {right} of {len(runs)} right; for smaller cards {on_smaller} of {of}",
        highlight=False,
    )
    return figures | {"t4_verdicts.wrong": len(runs) - right, "t4_verdicts.smaller_right_share": on_smaller / of}


def timed(model: str) -> tuple[float, float]:
    """CPU seconds of a prediction in a fresh process, without the imports, and GiB that it holds at most."""
    command = [sys.executable, "-c", _TIMED_CODE, model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gib = json.loads(done.stdout.splitlines()[-1])
    return seconds, gib
