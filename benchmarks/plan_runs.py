"""`python -m benchmarks plan-runs`: many plans for real fine-tunes, from which value networks learn.

The runs of a task share seed and batches and differ by their plans alone, as those of proxies do
(`training/plan_runs.py`). None of the data is that of the test cells of the methods benchmark.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import SCHEMA, load_policy
from rankpilot.agents.observation import Observation, with_limit
from rankpilot.agents.policy import Decision, decision_to_keep
from rankpilot.agents.settings import ONCE
from rankpilot.common.arrays import IntArray
from rankpilot.common.files import atomic_path
from rankpilot.common.workers import count_workers, worker_pool
from rankpilot.errors import ConfigError, NonFiniteError
from rankpilot.finetune.options import PilotOptions
from rankpilot.finetune.pilot import RankPilot
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.training.plan_runs import (
    CHOICES,
    REAL_ARRAYS,
    RUNS,
    RealPlanRun,
    draw_decision,
    read_real_plan_runs,
)
from rich.console import Console
from safetensors.numpy import save_file

from .harness import Figures, machine_facts
from .methods.plans import plain_lora
from .methods.registry import perform
from .methods.rows import RowStore, Work, plan_ranks, plan_text
from .methods.study import MissingRowsError, Study, gather
from .methods.tasks import MethodTask, Suite
from .methods.training import Driver, adapted_model, train, training_run

ROOM = 2.0
"""The probe's budget, in what all-linear rank 8 takes; plans are drawn for less."""

BUDGETS = (0.5, 1.2)
"""The budget of each task and seed is drawn between these, evenly in its logarithm."""

MOST_FACTOR = 2.0
"""Plans that adapt few modules train at a higher rate, up to so many times that of all-linear rank 8."""

OWN = {
    "llama-8x64": {"german": 120, "code": 120, "reviews": 80, "spanish": 150, "tables": 60},
    "llama-4x64": {"spanish": 200, "tales": 60, "german": 80, "tables": 150},
    "llama-8x32": {"tables": 120, "german": 80, "spanish": 200, "tales": 120},
    "llama-4x32": {"german": 200, "spanish": 100, "tales": 300},
    "gpt2-8x32": {"german": 120, "code": 100, "reviews": 80, "spanish": 150, "tales": 60, "tables": 120},
    "gpt2-4x64": {"spanish": 100, "tables": 80, "german": 200, "code": 150},
    "gpt2-4x32": {"tales": 150, "tables": 200},
}
"""Steps that models of our own pretraining take on texts. No task is on GPT-NeoX, see `env/proxy_task.py`."""


@dataclass(frozen=True)
class Options:
    """Train many plans for each of many real fine-tunes, and pack what came out into one file.

    MiniLM-L6, its lower three layers, SmolLM2-135M, whole and cut, and small models that read bytes (Llama, GPT-2)
    learn film reviews, posts on computers, Python's source, tales and other texts, some in languages that they do not
    know; no data of the test cells of `python -m benchmarks methods`. Each fine-tune is probed as a run is, its
    learning rate is the best one of all-linear rank 8, and plans that adapt few modules have up to twice that. Its 15
    plans share seed and batches: plain LoRA, rules, kinds of modules, parts of the depth, and drawn ones.

    `rankpilot train --more-plan-runs FILE` lets value networks learn from the packed file beside the plan runs of
    proxies. Runs go into `rows.jsonl` in the output folder as they end, so that an interrupted run goes on there;
    fine-tunes that the packed file holds already are not run again.

    Attributes:
        output: folder of the rows.
        cells: only fine-tunes whose names contain one of these words, such as smollm2 or imdb.
        seeds: of each fine-tune, at least 1.
        workers: processes of one thread each; 0 for as many as there are cores.
        minutes: stop after so many, when the runs that have begun are over.
        pack: also write the fine-tunes that are complete into this file, beside those that it holds.
        quick: under a minute: one small fine-tune of 10 steps.
        json: also write figures (fine-tunes, runs, CPU hours) to this file.
    """

    output: Path = Path("runs/plan-runs")
    cells: tuple[str, ...] = ()
    seeds: int = 3
    workers: int = 0
    minutes: float | None = None
    pack: Path | None = None
    quick: bool = False
    json: Path | None = None


def tasks(quick: bool) -> list[MethodTask]:
    """The fine-tunes; with `quick` one that takes seconds."""
    if quick:
        return [MethodTask("llama-4x32", "german", "causal-lm", 10, 4, 32, 8e-3, held_out=32, curve=1)]
    encoders = [
        MethodTask(model, data, "classification", steps, 16, 24, 2e-3, held_out=256, curve=1)
        for model, data, steps in (
            ("minilm-l6", "imdb", 60),
            ("minilm-l6", "computers", 120),
            ("minilm-l6", "libraries", 200),
            ("minilm-l6", "origins", 60),
            ("minilm-l3", "origins", 200),
        )
    ]
    decoders = [
        MethodTask("smollm2-135m", data, "causal-lm", 20, 4, 32, 3e-3, held_out=48, curve=1)
        for data in ("tales", "code", "german", "reviews")
    ]
    small = [
        MethodTask("smollm2-8", data, "causal-lm", steps, 4, 32, 3e-3, held_out=48, curve=1)
        for data, steps in (("tales", 40), ("code", 40), ("tables", 40), ("spanish", 80))
    ]
    own = [
        MethodTask(model, data, "causal-lm", steps, 8, 48, 4e-3, held_out=192, curve=1)
        for model, found in OWN.items()
        for data, steps in found.items()
    ]
    return [*own, *encoders, *small, *decoders]


class _Seeing:
    """A policy that leaves the ranks as they are, and remembers what it saw."""

    name = "seeing"

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        """See `Policy`."""
        self.seen.append(observation)
        return decision_to_keep(observation)


def observe(work: Work) -> dict[str, Any]:
    """What is seen before a fine-tune, at the argument `seed` and `rate`, and the plans that are drawn for it."""
    task, seed, policy = work.task, work.get("seed"), _Seeing()
    run = training_run(task, adapted_model(task, seed), work.get("rate"), seed)
    options = PilotOptions(
        budget=f"{ROOM:.0%}", schedule=ONCE, seed=seed, exact_savers=False, gradient_checkpointing=False
    )
    pilot = RankPilot(policy, options, tell=lambda line: None)
    start = time.process_time()
    pilot.begin(run)
    pilot.finish()
    (seen,) = policy.seen
    generator = np.random.default_rng([seed, *hashlib.sha256(task.key.encode()).digest()])
    budget = float(np.exp(generator.uniform(*np.log(BUDGETS))))
    observation = with_limit(seen, budget / ROOM * seen.problem.limit)
    actor = load_policy("default")
    assert isinstance(actor, LearnedPolicy), "the shipped policy is learned"
    action = actor.act(observation)
    drawn = [draw_decision(observation, action, number, generator) for number in range(RUNS)]
    return {
        "names": list(seen.names),
        "modules": observation.modules.tolist(),
        "run": observation.run.tolist(),
        "plans": [plan_text(decision.ranks) for decision, _ in drawn],
        "choices": [choice for _, choice in drawn],
        "cpu_s": round(time.process_time() - start, 3),
    }


class _Watched(Driver):
    """Keeps the training loss of each step.

    Args:
        driver: plain LoRA.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.model, driver.ranks())
        self.losses: list[float] = []

    def gradients(self, loss: torch.Tensor) -> None:
        """See `Driver`."""
        self.losses.append(round(float(loss), 5))

    def finish(self) -> dict[str, Any]:
        """See `Driver`."""
        return {"train_losses": self.losses}


def _train(work: Work) -> dict[str, Any]:
    start = time.process_time()
    try:
        driver = _Watched(plain_lora(work))
        row = train(work.task, driver, work.get("rate"), work.get("seed"), tuning=bool(work.get("tuning")))
    except NonFiniteError:
        return perform(work)
    return {**row, "cpu_s": round(time.process_time() - start, 3)}


def perform_any(work: Work) -> dict[str, Any]:
    """Do a piece of work of this benchmark or of the one of methods."""
    own = {"observe": observe, "train": _train}
    return own.get(work.kind, perform)(work)


def rate_of(rate: float, ranks: IntArray) -> float:
    """The learning rate of a plan: that of all-linear, higher where few modules are adapted (docs/scaling.md)."""
    adapted = max(1, int((ranks > 0).sum()))
    return float(f"{rate * min(MOST_FACTOR, (len(ranks) / adapted) ** 0.5):.3g}")


def plan_runs_of(study: Study, task: MethodTask, seed: int) -> RealPlanRun:
    """The plan runs of a fine-tune; MissingRowsError with what has yet to be run for them."""
    modules = study.modules(task)
    all_linear = np.array([min(REFERENCE_RANK, spec.max_rank) for spec in modules.specs])
    rate, _, _ = study.tuned(task, lambda rate, seed: study.plan_run(task, all_linear, rate, seed))
    seen = study.result(Work.of("observe", task, seed=seed, rate=rate))
    ranks = [plan_ranks(text) for text in seen["plans"]]
    works = [study.plan_run(task, plan, rate_of(rate, plan), seed) for plan in ranks]
    rows = gather(study.result, works)
    return RealPlanRun(
        task=_name(task, seed),
        family=task.name,
        names=tuple(seen["names"]),
        modules=np.array(seen["modules"], dtype=np.float32),
        run=np.array(seen["run"], dtype=np.float32),
        ranks=np.stack(ranks),
        losses=np.array([np.nan if row["loss"] is None else row["loss"] for row in rows]),
        train_losses=np.array([_curve(row, task.steps) for row in rows], dtype=np.float32),
        initial=float(rows[0]["untrained_loss"]),
        choices=np.array([CHOICES.index(choice) for choice in seen["choices"]], dtype=np.int8),
    )


def _curve(row: dict[str, Any], steps: int) -> list[float]:
    """The training loss of each step; NaN where the run failed."""
    return list(row.get("train_losses", [math.nan] * steps))


def write_real_plan_runs(runs: Sequence[RealPlanRun], path: Path) -> None:
    """Write plan runs into one file, for `read_real_plan_runs`."""
    arrays = {f"{number}.{name}": getattr(each, name) for number, each in enumerate(runs) for name in REAL_ARRAYS}
    arrays |= {name: values.astype(np.int16) for name, values in arrays.items() if name.endswith("ranks")}
    texts = [field.name for field in fields(RealPlanRun) if field.name not in REAL_ARRAYS]
    origin = json.dumps([{name: getattr(each, name) for name in texts} for each in runs])
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"schema": str(SCHEMA), "origin": origin})


def benchmark(options: Options, console: Console) -> Figures:
    """Run what is missing, pack what is complete, and tell what there is.

    Raises:
        ConfigError: bad options.
    """
    if options.seeds < 1 or options.workers < 0 or (options.minutes is not None and options.minutes <= 0):
        raise ConfigError(
            f"--seeds is at least 1, --workers at least 0 and --minutes above 0; got {options.seeds}, "
            f"{options.workers}, {options.minutes}."
        )
    wanted = [
        (task, seed)
        for seed in range(1, options.seeds + 1)
        for task in tasks(options.quick)
        if not options.cells or any(word in task.name for word in options.cells)
    ]
    if not wanted:
        raise ConfigError(f"No fine-tune has one of these words in its name: {' '.join(options.cells)}.")
    suite = Suite((), tuple(range(1, options.seeds + 1)), (101,), 1)
    study = Study(RowStore(options.output), suite)
    end = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    known = read_real_plan_runs(options.pack) if options.pack and options.pack.exists() else []
    found = {run.task: run for run in known}
    spent, packed, progress = 0.0, len(known), Console(file=sys.stderr)
    with worker_pool(count_workers(options.workers)) as workers:
        for number, (task, seed) in enumerate(wanted):
            name = _name(task, seed)
            while name not in found and time.monotonic() < end:
                missing = _missing(study, task, seed, found)
                for work, row in workers.spread(perform_any, missing[:8]):
                    study.rows.add(work, row)
                    spent += row["cpu_s"]
            if options.pack and len(found) > packed:
                write_real_plan_runs(list(found.values()), options.pack)
                packed = len(found)
            told = f"{number + 1} of {len(wanted)}: {task.name}, seed {seed}; {spent / 3600:.2f} CPU h"
            progress.print(told, markup=False, soft_wrap=True)
    count = sum(_name(task, seed) in found for task, seed in wanted)
    state = "All plan runs are there" if count == len(wanted) else "Plan runs are missing; the same command goes on"
    console.print(f"{state}: {count} of {len(wanted)} fine-tunes.", markup=False)
    if options.pack:
        console.print(
            f"Packed into {options.pack}: {options.pack.stat().st_size:,} bytes.", markup=False, soft_wrap=True
        )
    facts = {"fine_tunes": count, "complete": count == len(wanted), "cpu_h": spent / 3600}
    return {**machine_facts(torch.device("cpu")), **facts}


def _name(task: MethodTask, seed: int) -> str:
    return f"{task.key}/{seed}"


def _missing(study: Study, task: MethodTask, seed: int, found: dict[str, RealPlanRun]) -> Sequence[Work]:
    """What has yet to be run for a fine-tune; once it is complete, it joins those that were found."""
    try:
        run = plan_runs_of(study, task, seed)
    except MissingRowsError as error:
        return error.works
    found[run.task] = run
    return ()
