"""`python -m benchmarks loss-runs`: fine-tunes from which the rule for the rate and the loss of a plan are fitted.

A *loss run* is one fine-tune of a text by one plan (which modules, rank, scale) at one learning rate. The list of runs
is drawn before the first one and stands in `plan.jsonl`; what came out goes into `rows.jsonl` as runs end, so that an
interrupted collection goes on there. No run reads a text of `JUDGED`, on which methods are compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.common.files import atomic_path, read_json_lines
from rankpilot.decide.plan.rate import LEAST_SHARE, InitialLoss
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.lora.targets import find_target_modules
from rich.console import Console
from torch import nn

from .harness import Figures, collect_rows, machine_facts
from .text_runs import (
    ALPHA,
    AROUND,
    CLIP,
    Part,
    adapted_model,
    attention,
    both,
    ending,
    every_other_layer,
    everything,
    factor_at,
    held_out_loss,
    mlp,
    new_loader,
    ranks_at,
    top,
)
from .texts import TextTask, load_data

LEARNED = (
    *(f"language-{name}" for name in ("de", "fi", "uk", "pt", "sv", "es", "tr")),
    *(f"language-{name}" for name in ("ca", "vi", "it", "da", "nl", "sk", "pl")),
    *(f"package-{name}" for name in ("email", "asyncio", "xml", "tkinter", "importlib", "multiprocessing")),
    *(f"group-{name}" for name in ("sci.med", "comp.graphics", "talk.politics.guns", "misc.forsale")),
    *(f"group-{name}" for name in ("comp.windows.x", "soc.religion.christian", "rec.motorcycles")),
    *("reviews", "tables", "tales", "code"),
)
"""Texts that runs learn."""

JUDGED = (
    *("french", "russian", "templates", "news", "docstrings"),
    *(f"language-{name}" for name in ("gl", "eu", "ta", "sl", "hi", "no", "cs", "ro", "ja", "el", "bg")),
    *(f"package-{name}" for name in ("unittest", "http", "logging", "urllib", "concurrent")),
    *(f"group-{name}" for name in ("sci.space", "rec.autos", "rec.sport.hockey", "talk.politics.mideast")),
)
"""Texts of comparisons, which no run reads."""

PARTS: dict[str, Part] = {
    "all": everything,
    "attention": attention,
    "mlp": mlp,
    "top-3/4": top(0.75),
    "top-1/2": top(0.5),
    "top-1/4": top(0.25),
    "every-other": every_other_layer,
    "attention-top-1/2": both(attention, top(0.5)),
    "mlp-top-3/4": both(mlp, top(0.75)),
    "mlp-top-1/2": both(mlp, top(0.5)),
    "out": ending("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj"),
}
"""Which modules are adapted, by name; "out" is what writes into the residual stream."""

_WEIGHTS = np.array([{"all": 4.0, "mlp": 2.0, "top-3/4": 2.0, "top-1/2": 2.0}.get(part, 1.0) for part in PARTS])
"""How often each part is drawn."""

RANKS = (4, 8, 16, 32, 64, 128)

POWERS = (0.0, 0.5, 1.0)
"""The scale of a module of rank r is 2 (8 / r) to one of these: alpha = 2 r, rsLoRA, alpha = 16."""

SPREAD = 0.7
"""Standard deviation of a drawn plan's log rate around the prior."""

NEAR = 0.3
"""The same of plans of SmolLM2 whole around the rule's rate."""


@dataclass(frozen=True)
class LossRun:
    """One fine-tune.

    Attributes:
        model: SmolLM2, whole or cut, or a byte model.
        text: a name of `LEARNED`.
        steps: optimiser steps.
        rows: of a batch; each has 48 tokens.
        part: a name of `PARTS`.
        rank: of each adapted module, or the most that it can have.
        power: of the scale, see `POWERS`.
        rate: peak of the learning rate.
    """

    model: str
    text: str
    steps: int
    rows: int
    part: str
    rank: int
    power: float
    rate: float

    @property
    def task(self) -> TextTask:
        """What is trained."""
        held_out, train = (48, 600) if self.model.startswith("smollm2") else (192, 4000)
        return TextTask(self.model, self.text, self.steps, self.rows, held_out, train)


@dataclass(frozen=True)
class Options:
    """Fine-tune small models on many texts by drawn plans at drawn rates.

    Attributes:
        output: folder of the plan and of the rows.
        models: only runs of models whose names contain one of these words.
        workers: processes of one thread each; 0 for as many as there are cores.
        minutes: stop after so many, when the runs that have begun are over.
        quick: under a minute: two runs of ten steps.
        json: also write figures (runs, CPU hours) to this file.
    """

    output: Path = Path("runs/loss-runs")
    models: tuple[str, ...] = ()
    workers: int = 0
    minutes: float | None = None
    quick: bool = False
    json: Path | None = None


HARD = {
    **{"language-uk": 3.0, "code": 2.0, "group-sci.med": 3.0, "language-pt": 4.0, "package-email": 2.0, "reviews": 3.5},
    **{"language-sv": 4.5, "tables": 2.0, "group-comp.graphics": 3.0, "language-tr": 4.5, "package-xml": 2.0},
    **{"tales": 3.0, "language-it": 4.5, "group-misc.forsale": 3.5, "package-asyncio": 2.0},
}
"""Texts that SmolLM2 whole learns, with about the loss of each before training, in nats a token."""


def prior_rate(width: int, share: float) -> float:
    """The rate around which rates are drawn: a published formula in width (lora-without-regret), and a share's root."""
    return float(5e-4 * (2000 / width) ** 0.781 * share**-0.5)


WIDTHS = {"smollm2-135m": 576, "smollm2-15": 576, "smollm2-8": 576}


def width_of(model: str) -> int:
    """The hidden width of a model; that of byte models stands in their name, as in "llama-8x64"."""
    return WIDTHS.get(model) or int(model.rpartition("x")[2])


def drawn_runs() -> Iterator[LossRun]:
    """All runs, task after task; the same on each machine."""
    generator = np.random.default_rng(43)
    yield from _whole_models()
    small = ("gpt2-8x64", "llama-8x64", "gpt2-4x64", "llama-4x64")
    yield from _sweeps()
    for number, text in enumerate(LEARNED):
        # Models of one round read different texts, so that a prefix of the list holds many.
        others = [LEARNED[(number + shift) % len(LEARNED)] for shift in (11, 20, 5, 14)]
        if number < 21:
            whole = [*_of_task("smollm2-135m", text, 50 if number % 3 else 100, 4, generator)]
            yield from whole if number < 2 else ()  # those of the others were too far off the rule to be judged
        yield from _of_task("smollm2-8", others[0], (60, 100, 200)[number % 3], 5, generator)
        if number < 14:
            yield from _of_task("smollm2-15", others[1], 100 if number % 2 else 60, 4, generator)
        for turn in range(2):
            steps = (60, 150, 400)[(number + turn) % 3]
            yield from _of_task(small[(number + 2 * turn) % 4], others[2 + turn], steps, 9, generator)


def _whole_models() -> Iterator[LossRun]:
    """SmolLM2 whole: plain LoRA at three rates, and five plans near the rates that the rule says, at one alpha."""
    generator, model, rows = np.random.default_rng(44), "smollm2-135m", 4
    for number, (text, loss) in enumerate(HARD.items()):
        steps = 50 if number else 100
        initial = InitialLoss(loss, 47 * rows)
        rate = AROUND.plain(width_of(model), steps, initial=initial)
        for factor in (1.0, 0.5, 2.0):
            yield LossRun(model, text, steps, rows, "all", REFERENCE_RANK, 1.0, _rounded(factor * rate))
        for _ in range(5):
            part, rank = _drawn_plan(generator, max(RANKS))
            off = math.exp(generator.normal(0, NEAR))
            factor = (rank / REFERENCE_RANK) ** (AROUND.of_rank - AROUND.of_scale)
            factor *= max(_SHARES.get(part, 1), LEAST_SHARE) ** AROUND.of_share
            yield LossRun(model, text, steps, rows, part, rank, 1.0, _rounded(off * factor * rate))


def _drawn_plan(generator: np.random.Generator, highest: int) -> tuple[str, int]:
    """A part and a rank."""
    part = str(generator.choice(list(PARTS), p=_WEIGHTS / _WEIGHTS.sum()))
    return part, int(generator.choice([rank for rank in RANKS if rank <= highest]))


def _sweeps() -> Iterator[LossRun]:
    """Plain LoRA at several rates, in runs of other lengths and batches."""
    for model, texts in (("llama-4x64", LEARNED[:2]), ("gpt2-8x64", LEARNED[17:19])):
        for text in texts:
            for steps, rows in ((50, 2), (50, 8), (50, 32), (200, 2), (200, 8), (200, 32), (800, 2), (800, 8)):
                yield from _plain(model, text, steps, rows, (1.0, 0.5, 2.0, 0.25, 4.0))
    for text in (LEARNED[3], LEARNED[16]):
        for steps, rows in ((50, 2), (200, 2), (50, 8)):
            yield from _plain("smollm2-8", text, steps, rows, (1.0, 0.5, 2.0, 4.0))


def _plain(model: str, text: str, steps: int, rows: int, factors: Sequence[float]) -> Iterator[LossRun]:
    """Plain LoRA at multiples of the prior rate."""
    for factor in factors:
        rate = _rounded(factor * prior_rate(width_of(model), 1))
        yield LossRun(model, text, steps, rows, "all", REFERENCE_RANK, 1.0, rate)


def _of_task(model: str, text: str, steps: int, plans: int, generator: np.random.Generator) -> Iterator[LossRun]:
    """Plain LoRA at three rates, and some drawn plans."""
    width, rows = width_of(model), 4 if model.startswith("smollm2") else 8
    yield from _plain(model, text, steps, rows, (1.0, 0.5, 2.0))
    for _ in range(plans):
        part, rank = _drawn_plan(generator, width)
        power = float(generator.choice(POWERS))
        off = math.exp(float(np.clip(generator.normal(0, SPREAD), -1.4, 1.4)))
        rate = _rounded(off * prior_rate(width, _SHARES.get(part, 1)))
        yield LossRun(model, text, steps, rows, part, rank, power, rate)


_SHARES = {
    "attention": 0.57,
    "mlp": 0.43,
    "top-3/4": 0.75,
    "top-1/2": 0.5,
    "top-1/4": 0.25,
    "every-other": 0.5,
    "attention-top-1/2": 0.29,
    "mlp-top-3/4": 0.32,
    "mlp-top-1/2": 0.21,
    "out": 0.29,
}
"""Share of Llama's modules in each part: rates are drawn around a prior, for which that is near enough."""


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def ranks_of(run: LossRun, model: PeftModel) -> dict[str, int]:
    """The rank of each adapted module, by name."""
    modules = find_target_modules(model)
    return ranks_at(modules, PARTS[run.part](modules), run.rank)


@cache
def _untrained(task: TextTask) -> float:
    """The loss before training, which is that of the base model."""
    return held_out_loss(adapted_model(task, 0), load_data(task), task)


def perform(run: LossRun) -> dict[str, Any]:
    """Train a run to its end; figures as JSON values, `loss` None if it diverged."""
    begun, task = time.process_time(), run.task
    data, seed = load_data(task), int(hashlib.sha256(run.text.encode()).hexdigest()[:6], 16)
    ranks = ranks_of(run, adapted_model(task, 0))
    model = adapted_model(task, seed, ranks, lora_alpha=ALPHA)
    for target in find_target_modules(model):
        rank = ranks[target.name]
        target.layer.scaling[target.adapter] = ALPHA / REFERENCE_RANK * (REFERENCE_RANK / rank) ** run.power
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
    losses, norms = [], []
    for step, batch in enumerate(new_loader(task, data, seed)):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * factor_at(step, task.steps)
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(f"{float(nn.utils.clip_grad_norm_(trained, CLIP)):.4g}"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    loss = held_out_loss(model, data, task)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "untrained": _untrained(replace(task, steps=1)),
        "adapted": len(ranks),
        "train_losses": losses,
        "norms": norms,
        "cpu_s": round(time.process_time() - begun, 1),
    }


def benchmark(options: Options, console: Console) -> Figures:
    """Run what is missing, in the order of the list.

    Raises:
        ConfigError: bad options.
    """
    if options.workers < 0 or (options.minutes is not None and options.minutes <= 0):
        raise ConfigError(
            f"--workers is at least 0 and --minutes above 0; got {options.workers} and {options.minutes}."
        )
    runs = list(drawn_runs())
    if options.quick:
        runs = [LossRun("llama-4x64", "language-de", 10, 8, part, 8, 1.0, 8e-3) for part in ("all", "top-1/2")]
    runs = [run for run in runs if not options.models or any(word in run.model for word in options.models)]
    if not runs:
        raise UnknownNameError(f"No run is of a model whose name has one of {' '.join(options.models)}.")
    options.output.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.output / "plan.jsonl") as temporary:
        temporary.write_text("".join(f"{json.dumps(asdict(run))}\n" for run in runs), encoding="utf-8")
    path, done = options.output / "rows.jsonl", {}
    for line in read_json_lines(path):
        done[LossRun(**line["run"])] = line["row"]
    collect_rows(
        path,
        done,
        lambda: (run for run in runs if run not in done),
        perform,
        lambda run, row: f"{len(done)} of {len(runs)}: {run.model} / {run.text} {run.part} {run.rank} {row['loss']}",
        workers=options.workers,
        minutes=options.minutes,
    )
    spent = sum(row["cpu_s"] for row in done.values()) / 3600
    found = sum(run in done for run in runs)
    state = "All runs are there" if found == len(runs) else "Runs are missing; the same command goes on"
    console.print(f"{state}: {found} of {len(runs)}, {spent:.2f} CPU h.", markup=False)
    return {**machine_facts(torch.device("cpu")), "runs": found, "complete": found == len(runs), "cpu_h": spent}
