"""`python -m benchmarks no-sweep`: one run of rankpilot at its own rate beside plain LoRA at its best rate.

Each text of `JUDGED` is learned by one model; no rule, expectation or caution was fitted on them. A side without a
sweep trains once, at the rate that its own rule says. Sides with a sweep train at three rates or more, and their best
run counts: that is more than a user gets. All runs of a text share its batches.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from rankpilot.common.errors import ConfigError
from rankpilot.common.statistics import estimate
from rankpilot.common.text import make_table
from rankpilot.cost.training_step import switch_checkpointing
from rankpilot.decide.observation import Observation
from rankpilot.decide.policy import Decision
from rankpilot.finetune.before_training import run_memory
from rankpilot.finetune.options import PilotOptions
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.plan_rate import hidden_width, initial_loss
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.lora.targets import find_target_modules
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from .harness import Figures, collect_rows, known_rows, machine_facts, pack_rows, packed_rows
from .loss_runs import JUDGED
from .no_sweep_rates import CORRECTIONS
from .no_sweep_rivals import RIVALS, each_step
from .text_runs import ALPHA, AROUND, CLIP, adapted_model, factor_at, held_out_loss, new_loader, training_run
from .texts import TextTask, load_data

PACKED = Path(__file__).parent / "results" / "no_sweep.json"

SMALL = ("gpt2-8x64", "llama-8x64", "gpt2-4x64", "llama-4x64")
WHOLE = {"news": "smollm2-135m", "docstrings": "smollm2-135m", "language-cs": "smollm2-135m"}
"""Texts that SmolLM2-135M learns; models of `SMALL` take turns with the others."""

WIDER = tuple(
    f"{model}/{text}" for model in ("llama-8x256", "gpt2-4x384") for text in ("french", "package-unittest", "templates")
)
"""Texts that models of 256 and 384 wide learn, which `tools/pretrain.py` makes and nothing was fitted on."""

MODELS = ("byte models", "256 and 384 wide", "SmolLM2-135M")
"""Groups of models, by what is known of them."""

QUICK = "package-urllib"
"""A text whose model ships with the package."""

USUAL = 3e-4
"""A rate that people take without a sweep."""

GOALS = ("quality", "time", "bytes")
SWEPT = (0.5, 1.0, 2.0)
"""The rates of a sweep, over that rule's; where the highest or lowest is best, twice or half of it follows."""

MOST_SWEPT = 8.0

WRONG = (0.25, 1.0, 4.0)
"""Rates at which plain LoRA is left alone, and controlled, over the best one of its sweep."""

SEEDS = (0, 1)

MOST_SPREAD = 0.02
"""A text is admitted if plain LoRA at its best rate differs from itself by at most so much between seeds, and its loss
is below that of a table of how often each token occurs: a model that does worse has learned nothing to compare."""


@dataclass(frozen=True)
class Run:
    """One fine-tune.

    Attributes:
        text: of `JUDGED`, or of `WIDER`.
        side: "plain" LoRA of rank 8, "controlled" for that under control of its rate or another of `CORRECTIONS`,
            "auto" for plain LoRA under `learning_rate="auto"`, "rslora-64" on all modules, "usual" for plain LoRA at
            `USUAL`, a goal, or a rival.
        factor: of the rate over that of `AROUND`, for sides with a sweep.
        seed: of adapters and batches; one of `SEEDS`.
    """

    text: str
    side: str
    factor: float = 1.0
    seed: int = 0

    @property
    def task(self) -> TextTask:
        """What is trained."""
        model, _, text = self.text.rpartition("/")
        if model:
            return TextTask(model, text, 100, 8, 192, 4000)
        if text in WHOLE:
            return TextTask(WHOLE[text], text, 100, 4, 48, 600)
        return TextTask(SMALL[JUDGED.index(text) % len(SMALL)], text, 200, 8, 192, 4000)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold one run of rankpilot at its own rate against plain LoRA at its best rate, on texts that nothing knows.

    Attributes:
        output: folder of the rows; an interrupted comparison goes on there.
        workers: processes of one thread each; 0 for as many as there are cores.
        minutes: stop after so many, when the runs that have begun are over; 0 for the rows that there are, or else
            those of the repository.
        texts: which; SmolLM2-135M takes minutes a run, and models of `WIDER` are made first by `tools/pretrain.py`.
        pack: put the rows into the repository's file, beside those that it has.
        quick: under a minute: one text, a run a side.
        json: also write figures to this file.
    """

    output: Path = Path("runs/no-sweep")
    workers: int = 0
    minutes: float | None = None
    texts: tuple[str, ...] = JUDGED
    pack: bool = False
    quick: bool = False
    json: Path | None = None


def models_of(text: str) -> str:
    """Which of `MODELS` learn a text."""
    return MODELS[1] if text in WIDER else MODELS[2] if text in WHOLE else MODELS[0]


def next_runs(text: str, seed: int, rows: Mapping[Run, Mapping[str, Any]]) -> Iterator[Run]:
    """The runs of a text that are missing, as far as the rows so far tell."""
    small = models_of(text) == MODELS[0]
    sides = ("quality", "bytes", "auto") if text in WIDER else (*GOALS, "auto", "usual", *RIVALS)
    once = [Run(text, side, seed=seed) for side in sides]
    yield from (run for run in once if run not in rows)
    for side in ("plain", "rslora-64") if text not in WIDER else ("plain",):
        wanted = [Run(text, side, factor, seed) for factor in SWEPT]
        missing = [run for run in wanted if run not in rows]
        yield from missing
        if missing:
            continue
        swept = _swept(text, side, seed, rows)
        best = min(swept, key=lambda factor: swept[factor])
        beyond = [best * by for edge, by in ((max(swept), 2.0), (min(swept), 0.5)) if best == edge]
        edges = [Run(text, side, factor, seed) for factor in beyond if 1 / MOST_SWEPT < factor < MOST_SWEPT]
        yield from edges
        if side == "plain" and not edges:
            corrected = ("controlled", *(CORRECTIONS if small and not seed else ()))
            wrong = [Run(text, name, best * factor, seed) for name in ("plain", *corrected) for factor in WRONG]
            yield from (run for run in wrong if run not in rows)


def _swept(text: str, side: str, seed: int, rows: Mapping[Run, Mapping[str, Any]]) -> dict[float, float]:
    """The losses of a sweep by factor of the rate."""
    return {run.factor: _loss(row) for run, row in rows.items() if run == Run(text, side, run.factor, seed)}


def _loss(row: Mapping[str, Any]) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


def perform(run: Run) -> dict[str, Any]:
    """Train a run to its end in a loop of a user's; figures as JSON values, `loss` None if it diverged."""
    task, data = run.task, load_data(run.task)
    drawn = f"{run.text}#{run.seed}" if run.seed else run.text
    seed = int(hashlib.sha256(drawn.encode()).hexdigest()[:6], 16)
    model = adapted_model(task, seed)
    if run.side == "rslora-64":
        ranks = {target.name: min(64, target.max_rank) for target in find_target_modules(model)}
        model = adapted_model(task, seed, ranks, lora_alpha=ALPHA, use_rslora=True)
    training = training_run(task, model, USUAL, seed)
    facts: dict[str, Any] = {}
    pilot, optimizer = None, training.optimizer
    telling: AbstractContextManager[None] = nullcontext()
    begun = time.process_time()
    if run.side in GOALS:
        pilot = RankPilot(options=pilot_options(run.side, seed), tell=lambda line: None)
        pilot.begin(training)
        facts = _facts(pilot)
    elif run.side in RIVALS:
        rival = RIVALS[run.side]
        model, optimizer = rival.ready(task, seed, rule_of(training, seed))
        telling = each_step(optimizer, lambda step: rival.stepped(model, task, step))
    elif run.side != "usual":
        _set_rate(optimizer, run.factor * rule_of(training, seed))
    if run.side in PLAIN_OPTIONS:
        pilot = RankPilot(Plain(), PLAIN_OPTIONS[run.side], seed=seed, tell=lambda line: None)
        pilot.begin(training)
    rate = optimizer.param_groups[0]["lr"] * (pilot.rate_factor if pilot else 1.0)
    setup_s = time.process_time() - begun
    with telling:
        if run.side in CORRECTIONS:
            CORRECTIONS[run.side](task, model, optimizer, new_loader(task, data, seed))
        else:
            train(task.steps, model, optimizer, new_loader(task, data, seed), pilot)
    spent = time.process_time() - begun
    loss = held_out_loss(model, data, task)
    if run.side == "plain":
        facts |= plain_bytes(task) if run.factor == 1 else {}
        facts["frequencies"] = round(loss_of_frequencies(data.train, data.held_out), 5)
    if pilot:
        pilot.finish()
    times = {"setup_s": round(setup_s, 2), "all_s": round(spent, 2)}
    return {"loss": round(loss, 5) if math.isfinite(loss) else None, "rate": rate} | facts | times


def plain_bytes(task: TextTask) -> dict[str, float]:
    """What steps take beside one of plain LoRA without checkpointing: with all layers checkpointed, and of rank 64."""
    model = adapted_model(task, 0)
    training, targets = training_run(task, model, USUAL, 0), find_target_modules(model)
    switch_checkpointing(model.get_base_model(), True)
    memory = run_memory(training, targets, signals=False)
    plain, wide = (np.minimum(rank, [target.max_rank for target in targets]) for rank in (REFERENCE_RANK, 64))
    whole = memory.with_checkpointed(()).peak(plain)
    peaks = {
        "checkpointed": memory.peak(plain),
        "rslora-64": memory.with_checkpointed(()).peak(wide),
        "rslora-64 checkpointed": memory.peak(wide),
    }
    return {name: round(peak / whole, 4) for name, peak in peaks.items()}


@dataclass(frozen=True)
class Plain:
    """The policy that leaves plain LoRA as it is."""

    name: str = "plain"

    def decide(self, observation: Observation) -> Decision:
        """Rank 8 on all modules."""
        modules = len(observation.names)
        return Decision(np.full(modules, REFERENCE_RANK, dtype=np.int64), np.zeros(modules), exact=True)


CONTROLLED = PilotOptions(budget="400%", control=True, keep_rate=True, exact_savers=False, gradient_checkpointing=False)
"""Plain LoRA whose rate is controlled, and nothing else."""

PLAIN_OPTIONS = {
    "controlled": CONTROLLED,
    "auto": replace(CONTROLLED, learning_rate="auto", keep_rate=False),
    "race": replace(CONTROLLED, learning_rate="race", control=None, keep_rate=False),
}
"""How plain LoRA is piloted, by side."""


def pilot_options(goal: str, seed: int) -> PilotOptions:
    """What a user of rankpilot sets: a goal, and nothing of rates; the budget is what plain LoRA takes."""
    return PilotOptions(
        budget="100%",
        goal=goal,  # type: ignore[arg-type]
        learning_rate="auto",
        seed=seed,
        gradient_checkpointing="auto" if goal == "bytes" else False,
    )


def _facts(pilot: RankPilot) -> dict[str, Any]:
    assert pilot.decision is not None
    assert pilot.decision.choice is not None
    assert pilot.rates is not None
    found = pilot.decision.choice
    share = pilot.predictions[0][1] / pilot.limit
    return {"plan": found.names[found.taken], "bytes": round(share, 4), "rate": pilot.rates[1]}


def rule_of(training: TrainingRun, seed: int) -> float:
    """The rule's rate for the adapters of a run, whatever their rank."""
    targets = find_target_modules(training.model)
    ranks = np.array([target.rank for target in targets], dtype=np.int64)
    scales, plain = np.array([target.scaling for target in targets]), np.full(len(targets), ALPHA / REFERENCE_RANK)
    initial, width = initial_loss(training, training.read_first_rows(seed)), hidden_width(training.model)
    assert width is not None
    return AROUND.plain(width, training.total_steps, float(plain[0]), initial) * AROUND.factor(ranks, scales, plain)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def train(
    steps: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    pilot: RankPilot | None,
    share: Callable[[int], float] | None = None,
) -> list[float]:
    """Train to the end; the rates of the optimizer are peaks. Returns the losses of the run itself.

    Args:
        steps: of the optimizer.
        model: is trained.
        optimizer: of the model.
        loader: makes the batches.
        pilot: has begun; None for none.
        share: the rate of a step as a share of its peak; by default that of `factor_at`.
    """
    losses = []
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(loader):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (share(step) if share else factor_at(step, steps))
        if pilot:
            pilot.before_step(batch)
        for inputs in pilot.lanes(batch) if pilot else [batch]:
            loss = model(**inputs).loss
            loss.backward()
            nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], CLIP)
            if pilot:
                pilot.before_optimizer_step(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if pilot:
            pilot.after_step()
    return losses


Cell = tuple[str, int]
"""A text and a seed."""


def best_rows(rows: Mapping[Run, Mapping[str, Any]]) -> dict[Cell, dict[str, Mapping[str, Any]]]:
    """By cell and side the row that counts: of a sweep the best one, and as "plain, rule" plain LoRA at the rule's.

    A cell counts once plain LoRA has trained at all rates of `SWEPT`.
    """
    found: dict[Cell, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for run, row in rows.items():
        of_cell = found[run.text, run.seed]
        if run.side not in of_cell or _loss(row) < _loss(of_cell[run.side]):
            of_cell[run.side] = row
        if (run.side, run.factor) == ("plain", 1.0):
            of_cell["plain, rule"] = row
    swept = {cell: {Run(cell[0], "plain", factor, cell[1]) for factor in SWEPT} for cell in found}
    return {cell: sides for cell, sides in found.items() if swept[cell] <= rows.keys()}


def reason_to_leave_out(text: str, best: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> str | None:
    """Why a text is not admitted, see `MOST_SPREAD`; None if it is. No side but plain LoRA is asked."""
    rows = [sides["plain"] for (own, _), sides in best.items() if own == text]
    losses = [_loss(row) for row in rows]
    if min(losses) >= rows[0]["frequencies"]:
        return f"loss {min(losses):.2f}, frequencies {rows[0]['frequencies']:.2f}"
    spread = math.log(max(losses) / min(losses))
    return f"{100 * spread:.1f} % between seeds" if spread > MOST_SPREAD else None


def loss_of_frequencies(train: Dataset, judged: Dataset) -> float:
    """The loss on some rows of predicting each token as often as it occurs in others, in nats; each counts one more."""
    counts = np.bincount(np.concatenate(train["input_ids"]).astype(np.int64))
    tokens = np.concatenate(judged["input_ids"]).astype(np.int64)
    counts = np.pad(counts, (0, max(0, int(tokens.max()) + 1 - len(counts)))) + 1
    return float(-np.log(counts[tokens] / counts.sum()).mean())


def benchmark(options: Options, console: Console) -> Figures:
    """Run what is missing, and print each side beside plain LoRA at its best rate.

    Raises:
        ConfigError: bad options.
    """
    if options.workers < 0 or (options.minutes is not None and options.minutes < 0):
        raise ConfigError(f"--workers and --minutes are at least 0; got {options.workers} and {options.minutes}.")
    path = options.output / "rows.jsonl"
    rows = known_rows(Run, path, PACKED, options.minutes)
    if unknown := {*options.texts} - {*JUDGED, *WIDER}:
        raise ConfigError(f"--texts are of {', '.join((*JUDGED, *WIDER))}; got {', '.join(sorted(unknown))}.")
    texts = (QUICK,) if options.quick else options.texts
    collect_rows(
        path,
        rows,
        lambda: (run for seed in SEEDS for text in texts for run in next_runs(text, seed, rows)),
        perform,
        lambda run, row: (
            f"{run.task.model} / {run.text} {run.side} x {run.factor:g}, seed {run.seed}: {row['loss']} "
            f"{row.get('plan', '')}"
        ),
        workers=options.workers,
        minutes=options.minutes,
    )
    if options.pack:
        pack_rows(PACKED, stored_rows() | rows)
    return {**machine_facts(torch.device("cpu")), **report(rows, console)}


def stored_rows() -> dict[Run, Any]:
    """The rows of the repository."""
    return packed_rows(Run, PACKED)


def report(rows: Mapping[Run, Mapping[str, Any]], console: Console) -> Figures:
    """Print tables of all sides and of control, and return their figures."""
    best = best_rows(rows)
    return _report_sides(best, console) | _report_control(rows, best, console) | _report_look(rows, console)


def _report_look(rows: Mapping[Run, Mapping[str, Any]], console: Console) -> Figures:
    """The share of the CPU time of 100 steps of plain LoRA that the look before the first one takes, medians."""
    figures: Figures = {}
    for name in MODELS:
        looks = {run: row for run, row in rows.items() if run.side == "plain" and models_of(run.text) == name}
        if looks:
            shares = [row["setup_s"] / row["all_s"] * run.task.steps / 100 for run, row in looks.items()]
            figures[f"{name}: look"] = float(np.median(shares))
            console.print(f"The look takes {100 * np.median(shares):.1f} % of 100 steps ({name}, {len(looks)} runs).")
    return figures


def _report_sides(best: Mapping[Cell, Mapping[str, Mapping[str, Any]]], console: Console) -> Figures:
    """Log losses beside plain LoRA's at its best rate, bytes and CPU time beside plain LoRA's, over texts."""
    reasons = {text: reason_to_leave_out(text, best) for text, _ in best}
    admitted = {text for text, reason in reasons.items() if reason is None}
    figures: Figures = {"texts": len(reasons), "admitted": len(admitted)}
    table = []
    for part, texts in (
        ("all texts", set(reasons)),
        ("admitted", admitted),
        *((f"{name}, admitted", {text for text in admitted if models_of(text) == name}) for name in MODELS),
    ):
        for side in (*GOALS, "auto", "plain, rule", "usual", "rslora-64", *RIVALS):
            found = [cell for cell in best if cell[0] in texts and side in best[cell]]
            if not found:
                continue
            losses = [_beside(best[cell][side], best[cell]["plain"]) for cell in found]
            change = estimate([100 * loss for loss in losses], [text for text, _ in found])
            sizes = [_bytes(side, best[cell]) for cell in found]
            size, again = (float(np.mean(part)) for part in zip(*sizes, strict=True))
            spent = float(np.median([best[cell][side]["all_s"] / best[cell]["plain"]["all_s"] for cell in found]))
            figures |= {f"{part}, {side}: {name}": value for name, value in vars(change).items()}
            figures |= {f"{part}, {side}: worst": 100 * max(losses), f"{part}, {side}: bytes": size}
            figures |= {f"{part}, {side}: bytes beside checkpointed": again}
            figures |= {f"{part}, {side}: time": spent, f"{part}, {side}: texts": len({text for text, _ in found})}
            shares = [f"{value:.2f}" if math.isfinite(value) else "-" for value in (size, again, spent)]
            table.append((part, side, str(len(found)), f"{change:+.2f}", f"{100 * max(losses):+.1f}", *shares))
    columns = ("", "side", "cells", "log loss, %", "worst", "bytes", "of all checkpointed", "CPU time")
    console.print(make_table("Beside plain LoRA at its best rate", columns, table))
    shown = "; ".join(f"{text} ({reason})" for text, reason in reasons.items() if reason) or "none"
    console.print(f"Texts left out: {shown}.", markup=False)
    return figures


def _bytes(side: str, sides: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Bytes of a step beside plain LoRA's, and beside those with all its layers checkpointed; NaN if unknown."""
    plain = sides["plain, rule"] if "plain, rule" in sides else sides["plain"]
    own = 1.0 if side in ("auto", "plain, rule", "usual") else plain.get(side, math.nan)
    size = float(sides[side].get("bytes", own))
    return size, size / plain.get("checkpointed", math.nan)


def _report_control(
    rows: Mapping[Run, Mapping[str, Any]], best: Mapping[Cell, Mapping[str, Mapping[str, Any]]], console: Console
) -> Figures:
    """Log losses of plain LoRA at wrong rates, left alone and controlled, beside that at its best rate.

    Figures of byte models have no prefix, and are of pairs; those of others have the name of their group.
    """
    figures: Figures = {}
    table = []
    for factor in WRONG:
        for side in ("plain", "controlled", *CORRECTIONS):
            losses: dict[str, dict[Cell, float]] = {name: {} for name in MODELS}
            for text, seed in best:
                swept = _swept(text, "plain", seed, rows)
                at = factor * min(swept, key=lambda each: swept[each])
                runs = {name: Run(text, name, at, seed) for name in ("plain", "controlled", side)}
                of_models = models_of(text)
                paired = runs["controlled"] in rows and (of_models != MODELS[0] or runs["plain"] in rows)
                if runs[side] in rows and paired and not reason_to_leave_out(text, best):
                    losses[of_models][text, seed] = 100 * _beside(rows[runs[side]], best[text, seed]["plain"])
            for of_models, found in losses.items():
                if not found:
                    continue
                prefix = f"{of_models}, " if of_models != MODELS[0] else ""
                change = estimate(list(found.values()), [text for text, _ in found])
                figures |= {f"{prefix}{side} at {factor:g}: {name}": value for name, value in vars(change).items()}
                figures |= {f"{prefix}{side} at {factor:g}: worst": max(found.values())}
                figures |= {f"{prefix}{side} at {factor:g}: texts": len({text for text, _ in found})}
                named = prefix + ("left alone" if side == "plain" else side)
                table.append((f"{factor:g}", named, str(len(found)), f"{change:+.2f}", f"{max(found.values()):+.1f}"))
    if table:
        columns = ("rate over the best", "", "cells", "log loss, %", "worst")
        console.print(make_table("Plain LoRA beside itself at its best rate; admitted texts", columns, table))
    return figures


def _beside(row: Mapping[str, Any], plain: Mapping[str, Any]) -> float:
    """The log loss of a row beside plain LoRA's; a run that diverged counts as 100 %."""
    return 1.0 if row["loss"] is None else math.log(row["loss"] / plain["loss"])
