"""Whether a policy that was trained on proxies helps real fine-tunes: MiniLM-L6 under it and under uniform rank."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..agents.learned.policy import LearnedPolicy
from ..agents.learned.policy_file import load_policy, policy_folder, read_card
from ..common.devices import find_device
from ..common.statistics import Estimate, compare_pairs, estimate
from ..common.tables import make_table
from ..common.workers import worker_pool
from ..data.workload import load_workload
from ..errors import ConfigError, NonFiniteError
from ..finetune.config import PILOT, UNIFORM, FinetuneConfig
from ..finetune.experiment import run_one
from .harness import Figures, estimate_figures, machine_facts
from .ledger import Ledger

MODEL = "all-minilm-l6-v2"

BUDGETS = ("30%", "35%", "40%", "50%", "60%", "65%", "70%", "80%", "90%", "100%")

RATES = {"rotten-tomatoes": 1e-3, "reuters-r8": 2e-3}
"""Peak learning rates by data set: of 1e-3, 2e-3 and 4e-3 the highest at which uniform rank diverges in no budget
(docs/experiments.md)."""

WORSE = 1.01
"""A run counts as worse where its loss is more than so many times the other's."""


@dataclass(frozen=True)
class Course:
    """Which fine-tunes are run.

    Attributes:
        rates: learning rate by data set and share of the bytes that rank 8 on all modules takes.
        seeds: how many, from 0.
        steps: of a run.
        length: tokens of a row at most.
        held_out_rows: of the held-out set.
    """

    rates: Mapping[str, Mapping[str, float]]
    seeds: int
    steps: int
    length: int
    held_out_rows: int

    def runs(self, policies: Sequence[str]) -> list[FinetuneConfig]:
        """All runs, those of uniform rank too; runs that are compared follow one another."""
        return [
            FinetuneConfig(
                MODEL,
                data,
                policy=policy,
                budget=budget,
                steps=self.steps,
                learning_rate=rate,
                max_length=self.length,
                held_out_rows=self.held_out_rows,
                seed=seed,
                eval_every=self.steps,
            )
            for seed in range(self.seeds)
            for data, rates in self.rates.items()
            for budget, rate in rates.items()
            for policy in (UNIFORM, *policies)
        ]


FULL = Course(
    {data: dict.fromkeys(BUDGETS, rate) for data, rate in RATES.items()},
    seeds=2,
    steps=160,
    length=48,
    held_out_rows=800,
)
QUICK = Course({"rotten-tomatoes": {"60%": 1e-3}}, seeds=1, steps=4, length=16, held_out_rows=32)


@dataclass(frozen=True)
class Options:
    """Fine-tune MiniLM-L6 under policies and under uniform rank, in the same bytes.

    all-MiniLM-L6-v2 (6 layers, 37 linear modules) learns Rotten Tomatoes (2 classes) and Reuters R8 (8 classes) for 160
    steps of 16 rows with the transformers Trainer and PEFT, at 30 to 100 % of the bytes of a step with rank 8 on all
    linear layers. Uniform rank is the largest one that fits, on as many top layers as fit. Both have the same seed,
    batches and learning rate, the highest of three at which uniform rank diverges in none of the budgets. Each adapter
    that a policy leaves is loaded by plain PEFT in another process, and its logits compared.

    The tables show held-out losses and accuracy, how often a policy's loss is lower, the mean difference of their logs,
    runs that are more than 1 % worse, measured peaks above the budget (every tenth step is measured), adapters that
    give the same logits after loading, and the time of a step; intervals are 95 %, by a bootstrap over data sets and
    budgets. A run that diverges counts as worse than any other, and in means as a model that guesses. The full run
    takes about an hour on two cores for one policy.

    Attributes:
        policies: "default", folders of trained policies, or rules.
        quick: under a minute: one short run of each, whose losses mean nothing.
        json: also write the figures to this file, as flat JSON with names like "default.better"; runs go into a .jsonl
            file beside it as they end.
        resume: go on with the runs of an interrupted benchmark, from the .jsonl file.
        workers: processes, one thread each.
    """

    policies: tuple[str, ...] = ("default",)
    quick: bool = False
    json: Path | None = None
    resume: bool = False
    workers: int = 2

    def check(self) -> None:
        """Make sure that the values are in range, and that the policies exist.

        Raises:
            ConfigError, UnknownNameError, PolicyFileError: they are not.
        """
        if self.workers < 1:
            raise ConfigError(f"--workers is at least 1; got {self.workers}.")
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ConfigError(f"--policies names at least one policy, and none twice; got {self.policies}.")
        if UNIFORM in self.policies:
            raise ConfigError(f"{UNIFORM} is what all --policies are compared with; leave it out.")
        self.weights()

    def weights(self) -> dict[str, str]:
        """The sha256 of each learned policy's weights."""
        learned = [policy for policy in self.policies if isinstance(load_policy(policy), LearnedPolicy)]
        return {policy: str(read_card(policy_folder(policy))["sha256"]) for policy in learned}


Results = dict[FinetuneConfig, dict[str, Any]]
Pair = tuple[FinetuneConfig, dict[str, Any], dict[str, Any]]


def run_piece(piece: FinetuneConfig) -> dict[str, Any]:
    """Run one fine-tune; returns its figures, for a policy also whether plain PEFT loads the adapter.

    The loss of a run that diverges is None; "guess" is the loss of a model that gives each class the same probability.
    """
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        workload = load_workload(
            MODEL, piece.data, max_length=piece.max_length, held_out_rows=piece.held_out_rows, seed=piece.seed
        )
        guess = {"guess": math.log(len(workload.labels))}
        try:
            return guess | run_one(piece, workload, Path(folder), UNIFORM if piece.policy == UNIFORM else PILOT)
        except NonFiniteError:
            return guess | {"held_out_loss": None}


def run_all(options: Options, course: Course, ledger: Ledger, console: Console) -> Results:
    """Run what the ledger does not hold yet; returns the results of all runs."""
    weights = options.weights()
    works = {piece: [asdict(piece), weights.get(piece.policy)] for piece in course.runs(options.policies)}
    missing = [piece for piece, work in works.items() if ledger.get(work) is None]
    with Progress(console=console, transient=True) as bar, worker_pool(options.workers) as workers:
        shown = bar.add_task("fine-tunes", total=len(works), completed=len(works) - len(missing))
        for piece, result in workers.spread(run_piece, missing):
            ledger.add(works[piece], result)
            bar.advance(shown)
    return {piece: ledger.get(work) for piece, work in works.items()}


def pairs_of(results: Results, policy: str) -> Iterator[Pair]:
    """Runs of a policy with its result and the uniform run's."""
    for piece, result in results.items():
        if piece.policy == policy:
            yield piece, result, results[replace(piece, policy=UNIFORM)]


def figures_of(policy: str, pairs: Sequence[Pair]) -> Figures:
    """A policy against uniform rank."""
    tasks = [f"{piece.data} {piece.budget}" for piece, _, _ in pairs]
    runs, uniform_runs = [run for _, run, _ in pairs], [uniform for _, _, uniform in pairs]
    losses, uniform_losses = ([_loss(run, math.inf) for run in side] for side in (runs, uniform_runs))
    logs, uniform_logs = (np.log([_loss(run, run["guess"]) for run in side]) for side in (runs, uniform_runs))
    ended = [(run, uniform) for _, run, uniform in pairs if _ended(run) and _ended(uniform)]
    versus = compare_pairs([-loss for loss in losses], [-loss for loss in uniform_losses], tasks)
    step_ratios = [run["median_step_s"] / uniform["median_step_s"] for run, uniform in ended]
    accuracy_gains = [run["held_out_accuracy"] - uniform["held_out_accuracy"] for run, uniform in ended]
    figures: Figures = {
        "runs": len(pairs),
        **estimate_figures("better", versus.better),
        **estimate_figures("log_loss_gain", estimate(uniform_logs - logs, tasks)),
        "diverged": sum(not _ended(run) for run in runs),
        "one_percent_worse": sum(loss > WORSE * other for loss, other in zip(losses, uniform_losses, strict=True)),
        "worst_ratio": float(np.exp(np.max(logs - uniform_logs))),
        "accuracy_gain": float(np.mean(accuracy_gains or [0.0])),
        "over_budget": sum(run["peak_bytes"] > run["budget_bytes"] for run, _ in ended),
        "identical_reloads": sum(bool(run["reload"]["identical"]) for run, _ in ended),
        "step_ratio": float(np.median(step_ratios or [0.0])),
    }
    return {f"{policy}.{name}": value for name, value in figures.items()}


def _ended(run: dict[str, Any]) -> bool:
    return run["held_out_loss"] is not None and math.isfinite(run["held_out_loss"])


def _loss(run: dict[str, Any], otherwise: float) -> float:
    return float(run["held_out_loss"]) if _ended(run) else otherwise


def _runs_table(policy: str, pairs: Sequence[Pair]) -> Any:
    rows = [
        [
            f"{escape(piece.data)}, {piece.budget}, seed {piece.seed}",
            *(f"{result['held_out_loss']:.4f}" if _ended(result) else "diverged" for result in (run, uniform)),
            f"{100 * (_loss(run, math.inf) / _loss(uniform, math.inf) - 1):+.1f} %",
            *(f"{100 * result.get('held_out_accuracy', math.nan):.1f} %" for result in (run, uniform)),
            *(f"{result.get('adapter_parameters', 0):,}" for result in (run, uniform)),
        ]
        for piece, run, uniform in pairs
    ]
    columns = ("run", "loss", "uniform", "difference", "accuracy", "uniform", "parameters", "uniform")
    return make_table(f"{escape(policy)} against uniform rank in the same bytes", columns, rows)


def _summary_table(figures: Figures, policies: Sequence[str]) -> Any:
    rows = []
    for policy in policies:
        values = {
            name.removeprefix(f"{policy}."): float(value)
            for name, value in figures.items()
            if name.startswith(f"{policy}.")
        }
        better, gain = (
            Estimate(*(values[f"{name}{end}"] for end in ("", "_low", "_high"))) for name in ("better", "log_loss_gain")
        )
        runs, worse, over, reloads = (
            f"{values[name]:.0f}" for name in ("runs", "one_percent_worse", "over_budget", "identical_reloads")
        )
        worst, points = f"{values['worst_ratio']:.3f}", f"{100 * values['accuracy_gain']:+.2f}"
        step = f"{values['step_ratio']:.2f}"
        rows.append((escape(policy), runs, f"{better:.0%}", f"{gain:+.3f}", worse, worst, points, over, reloads, step))
    columns = ("policy", "runs", "better", "log loss gained", "1 % worse", "worst", "points", "over", "reloads", "step")
    return make_table("over all runs", columns, rows)


def benchmark(options: Options, console: Console) -> Figures:
    """Run all fine-tunes, print the tables, and return the figures.

    Raises:
        ConfigError, UnknownNameError, PolicyFileError: bad options, or results that are in the way.
    """
    options.check()
    ledger = Ledger(options.json, resume=options.resume)
    # The stream by name: runs in this process redirect what they print.
    results = run_all(options, QUICK if options.quick else FULL, ledger, Console(file=sys.stderr))
    figures: Figures = {**machine_facts(find_device("auto")), "threads": 1, "quick": options.quick}
    for policy in options.policies:
        pairs = list(pairs_of(results, policy))
        console.print(_runs_table(policy, pairs))
        figures |= figures_of(policy, pairs)
    console.print(_summary_table(figures, options.policies))
    return figures
