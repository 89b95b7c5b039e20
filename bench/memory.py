"""What the memory model is worth: predicted against measured bytes, and what plans of few bytes reach.

`python -m rankpilot.bench.memory --help` tells what is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..agents.batch_watch import BatchWatch
from ..errors import ConfigError
from ..lora.budget import format_bytes
from ..lora.cost import total_cost
from ..lora.recording import Batch
from ..lora.shape import Shape
from ..study.drawing import save_figure
from .accuracy import SHAPES, Errors, compare_plans
from .finetunes import Code, Finetune, Reviews
from .harness import (
    Estimate,
    Figures,
    bootstrap,
    find_device,
    interleave,
    machine_facts,
    make_table,
    paired_ratios,
    run_command,
    usual_step,
)
from .learner import START_RANK
from .ledger import Ledger
from .models import Size
from .pareto import Point, compare
from .pareto_picture import pareto_figure
from .plans import REFERENCE, REQUIRED
from .resident import is_supported, large_learner, observe
from .settings import CHECKPOINTING, MODELS, PRECISIONS, Setting

BARS = "median 0.5 %, 95th percentile 2 % (peak: 3 %), worst 4 %"
"""What the errors of predictions may be."""


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        plans: random plans of each setting and batch shape.
        shapes: how many of `SHAPES`.
        families: of random models.
        precisions: of random models.
        rounds: timed steps of each plan of the fine-tunes.
        reviews: steps and seeds of MiniLM.
        code: steps and seeds of the small Llama.
        trained: plans of MiniLM that are trained to the end.
        all_plans: measure and time the others too, and train the Llama under all.
    """

    plans: int = 4
    shapes: int = 3
    families: tuple[str, ...] = tuple(MODELS)
    precisions: tuple[Any, ...] = PRECISIONS
    rounds: int = 7
    reviews: tuple[int, int] = (100, 3)
    code: tuple[int, int] = (200, 5)
    trained: tuple[str, ...] = (
        "all-linear, rank 1",
        "all-linear, rank 16",
        "top half, rank 16",
        "rule16 at 65 %",
        "fracrule at 50 %",
        REQUIRED,
        "fracrule at 80 %",
    )
    all_plans: bool = True


QUICK = Extent(
    plans=1,
    shapes=2,
    families=("llama", "bert"),
    precisions=("fp32",),
    rounds=1,
    reviews=(2, 1),
    code=(8, 1),
    trained=(REQUIRED,),
    all_plans=False,
)


@dataclass(frozen=True)
class Memory:
    """Measure the memory model, and what plans of few bytes reach.

    First, predicted against measured bytes of random plans (ranks 0 to 16 on all modules, on some, on top layers, on a
    single one) of four families of small random models, without gradient checkpointing and with it in both forms, in
    fp32, bf16 and under autocast. Each model is calibrated on one batch shape; further shapes are predicted from that.
    "Saved" is what autograd holds for the backward pass, "peak" the highest live bytes of the whole step, the frozen
    model excluded. Then the same for a larger model beside what the operating system (on CUDA: the allocator) says,
    and what the guard of the budget costs.

    Last, two real fine-tunes, MiniLM-L6 on Rotten Tomatoes and the packaged Llama on Python code, under plans of
    different bytes: one rank everywhere, top layers, rule16 and fracrule at several budgets. Time of a step is
    interleaved over the plans; losses are paired over seeds, with 95 % bootstrap intervals.

    The full run takes half an hour on two cores. Leave the machine alone meanwhile.

    Attributes:
        quick: a thin slice of everything, under a minute; its losses mean nothing.
        json: also write the figures to this file, as flat JSON.
        picture: also draw loss and step time over bytes into this PNG.
        ledger: file in which finished training runs are kept (JSON lines).
        resume: go on with the runs of that file.
        device: of the random models; auto is CUDA where there is one.
        seed: of weights, batches and plans, at least 0.
    """

    quick: bool = False
    json: Path | None = None
    picture: Path | None = None
    ledger: Path | None = None
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def accuracy(extent: Extent, device: torch.device, seed: int, advance: Callable[[], None]) -> tuple[Any, Figures]:
    """Predicted against measured bytes in every setting: a table and figures."""
    rows: list[Sequence[str]] = []
    figures: Figures = {}
    pooled: dict[str, list[tuple[float, float]]] = {"saved": [], "peak": []}
    for checkpointing in CHECKPOINTING:
        for family in extent.families:
            found: dict[str, list[tuple[float, float]]] = {"saved": [], "peak": []}
            costs = []
            for precision in extent.precisions:
                setting = Setting(family, checkpointing, precision)
                result = compare_plans(setting, SHAPES[: extent.shapes], extent.plans, device, seed)
                costs.append(result["calibration_steps"])
                for kind, pairs in found.items():
                    pairs += [plan[kind] for plan in result["plans"] if plan[kind]]
                advance()
            for kind, pairs in found.items():
                pooled[kind] += pairs
            errors = {kind: Errors.of(pairs) for kind, pairs in found.items()}
            figures |= _error_figures(f"{family}.{checkpointing.replace(' ', '_')}", errors)
            rows.append(
                (family, checkpointing, str(len(found["peak"])), *_cells(errors), f"{np.median(costs):.1f} steps")
            )
    errors = {kind: Errors.of(pairs) for kind, pairs in pooled.items()}
    rows.append(("all", "", str(len(pooled["peak"])), *_cells(errors), ""))
    figures |= _error_figures("all", errors) | {"all.plans": len(pooled["peak"])}
    columns = ("model", "checkpointing", "plans", "saved: median", "95 %", "over", "under")
    columns += ("peak: median", "95 %", "over", "under", "calibration")
    return make_table(f"Predicted against measured bytes (bars: {BARS})", columns, rows), figures


def _cells(errors: Mapping[str, Errors | None]) -> list[str]:
    cells = []
    for found in errors.values():
        cells += [f"{x:.2%}" for x in (found.median, found.high, found.over, found.under)] if found else ["-"] * 4
    return cells


def _error_figures(prefix: str, errors: Mapping[str, Errors | None]) -> Figures:
    return {
        f"{prefix}.{kind}_{name}": value
        for kind, found in errors.items()
        if found
        for name, value in vars(found).items()
    }


def outside(size: Size, device: torch.device, seed: int, rounds: int) -> tuple[Any, list[str], Figures]:
    """A larger model seen from outside, and the cost of the guard: a table, lines, figures."""
    learner, batch = large_learner("llama", size, device, seed)
    cost = learner.calibrate(batch).cost()
    count, rows = len(learner.targets), []
    figures: Figures = {}
    plans = {
        REFERENCE: np.full(count, START_RANK),
        "top half, rank 16": np.where(np.arange(count) >= count // 2, 16, 0),
        "last module, rank 8": np.where(np.arange(count) == count - 1, 8, 0),
    }
    for name, ranks in plans.items():
        predicted = total_cost(cost, ranks)
        seen = observe("llama", size, ranks.tolist(), device, seed) if is_supported(device) else {}
        rows.append(
            (name, format_bytes(predicted), *(f"{format_bytes(n)} ({n / predicted:.3f})" for n in seen.values()))
        )
        figures |= {f"outside.{name}.{kind}_ratio": n / predicted for kind, n in seen.items()}
    title = f"Llama of {size.layers} layers x {size.width}, {size.rows} x {size.length} tokens: one step from outside"
    table = make_table(title, ("plan", "predicted", *seen), rows)
    measured, watched = _guard_costs(learner, batch, rounds)
    figures |= {"guard.measured_step_ratio": measured.value, "guard.normal_step_share": watched}
    lines = [
        f"A step that the guard measures takes {measured} of a plain one; in the others its look at the batch takes "
        f"{watched:.3%} of a step (bar 0.2 %)."
    ]
    return table, lines, figures


def _guard_costs(learner: Any, batch: Batch, rounds: int) -> tuple[Estimate, float]:
    """Time of a measured step over a plain one, and of the guard's look at a batch over a plain step."""
    work: dict[str, Callable[[int], None]] = {
        "plain": lambda turn: learner.step(batch),
        "measured": lambda turn: learner.measured_step(batch) and None,
    }
    seconds = interleave(work, max(3, rounds), learner.device)
    watch, model = BatchWatch(), torch.nn.Module().train()
    watch.shape = Shape.of(batch)
    start = time.perf_counter()
    for _ in range(1000):
        watch._look(model, (), dict(batch))
    look_s = (time.perf_counter() - start) / 1000
    ratio = bootstrap(paired_ratios(seconds["measured"], seconds["plain"], 1), usual_step)
    return ratio, float(look_s / np.median(seconds["plain"]))


def pareto_table(task: Finetune, points: Sequence[Point]) -> Any:
    """One fine-tune's plans for people."""
    columns = ("plan", "bytes, measured", "of rank 8's", "predicted", "time of a step", "held-out loss", "difference")
    rows = [
        (
            point.plan.name,
            format_bytes(point.measured_bytes),
            f"{point.share:.1%}",
            f"{point.plan.predicted_bytes / point.measured_bytes - 1:+.2%}",
            str(point.step_ratio),
            f"{point.loss:.4f}" if point.losses else "-",
            _signed(point.difference) if point.difference else "-",
        )
        for point in points
    ]
    return make_table(f"{task.title}: {task.steps} steps", columns, rows)


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def required(task: Finetune, points: Sequence[Point]) -> str:
    """What fracrule does at 65 % of the bytes of all-linear rank 8, in one line."""
    point = next(point for point in points if point.plan.name == REQUIRED)
    fits = "fits" if point.share <= 0.65 else "does not fit"
    loss = f", held-out loss {_signed(point.difference)} nats" if point.difference else ""
    return (
        f"{task.title}: fracrule at 65 % of the bytes of all-linear rank 8 {fits} ({point.share:.2%} measured); its "
        f"step takes {point.step_ratio} (bar 0.8){loss}."
    )


def _point_figures(prefix: str, points: Sequence[Point]) -> Figures:
    figures: Figures = {}
    for point in points:
        name = f"{prefix}.{point.plan.name}"
        figures |= {
            f"{name}.measured_bytes": point.measured_bytes,
            f"{name}.predicted_bytes": point.plan.predicted_bytes,
            f"{name}.step_ratio": point.step_ratio.value,
            f"{name}.step_ratio_low": point.step_ratio.low,
            f"{name}.step_ratio_high": point.step_ratio.high,
        }
        if point.difference:
            figures |= {f"{name}.loss": point.loss, f"{name}.loss_difference": point.difference.value}
            figures |= {f"{name}.loss_difference_low": point.difference.low}
            figures |= {f"{name}.loss_difference_high": point.difference.high}
    return figures


def benchmark(options: Memory, extent: Extent, size: Size, console: Console) -> Figures:
    """Run everything, print tables as they come, and return all figures.

    Raises:
        ConfigError: the seed is negative, the device is absent, or the ledger holds another run.
    """
    if options.seed < 0:
        raise ConfigError(f"--seed is at least 0; got {options.seed}.")
    device = find_device(options.device)
    ledger = Ledger(options.ledger, resume=options.resume)
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: tuple[tuple[str, Finetune, tuple[str, ...] | None, int], ...] = (
        ("code", Code(extent.code[0]), None if extent.all_plans else extent.trained, extent.code[1]),
        (
            "reviews",
            Reviews(extent.reviews[0], eval_rows=64 if options.quick else 512),
            extent.trained,
            extent.reviews[1],
        ),
    )
    measured: dict[str, list[Point]] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        settings = len(list(product(CHECKPOINTING, extent.families, extent.precisions)))
        work = bar.add_task("random plans, by setting", total=settings)
        table, found = accuracy(extent, device, options.seed, partial(bar.advance, work))
        figures |= found
        console.print(table)
        table, lines, found = outside(size, device, options.seed, extent.rounds)
        figures |= found
        console.print(table)
        console.print(*lines, sep="\n", highlight=False)
        for key, task, trained, seeds in tasks:
            work = bar.add_task(f"{task.title}, runs", total=None)
            points = compare(
                task,
                trained,
                seeds,
                extent.rounds,
                ledger,
                partial(bar.advance, work),
                only_trained=not extent.all_plans,
            )
            measured[task.title] = points
            figures |= _point_figures(key, points)
            console.print(pareto_table(task, points))
    for _, task, _, _ in tasks:
        console.print(required(task, measured[task.title]), highlight=False)
    if options.picture:
        title = "Fewer layers buy bytes and time; thin ranks everywhere buy neither"
        save_figure(pareto_figure(measured, title), options.picture)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Memory, args=arguments, prog="python -m rankpilot.bench.memory")
    extent, size = (QUICK, Size(layers=2, rows=4)) if options.quick else (Extent(), Size())
    return run_command(partial(benchmark, options, extent, size), options.json)


if __name__ == "__main__":
    sys.exit(main())
