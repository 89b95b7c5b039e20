"""Make the suites: `python -m tools.make_suites`, with bases to measure only tasks on these.

For each task, uniform rank is trained at a few learning rates and the best is kept; then the oracle's plan (planted) or
rank 32 everywhere (shift) is trained at that rate. Results go to a ledger after each batch, so that an interrupted run
goes on and bases can be measured in several processes; once the ledger is complete, `env/suite_cards` is
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rankpilot.common.files import append_json_line, read_json_lines, write_json
from rankpilot.cost.budget import reference_cost
from rankpilot.cost.cost import plan_cost
from rankpilot.data.task import SPLITS, SUITES
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.bases import adapted_base
from rankpilot.env.proxy_finetune import ProxyFineTune, oracle_plan
from rankpilot.env.proxy_task import FOLDER, PLACEMENTS, VERSION, ProxyTask, Reference, find_base
from rankpilot.env.stacked import StackedEpisodes
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.plan.plan import uniform_ranks
from rankpilot.plan.problem import AllocationProblem
from rich.progress import track

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
"""Learning rates that are tried for uniform rank."""

FULL_RANK = 32
"""Rank on all modules that stands for no limit."""

_SMALL = ("llama-4x32", "llama-4x64", "bert-4x32", "bert-4x64")
BASES = {
    "train": _SMALL,
    "validation": (*_SMALL, "llama-8x32", "bert-8x32"),
    "test": (*_SMALL, "llama-8x64", "bert-8x64", "gpt2-4x32", "gpt2-4x64", "gpt2-8x32", "gpt2-8x64"),
}
CORPORA = {
    "train": ("code", "reviews", "german", "tables"),
    "validation": ("newsgroups", "spanish"),
    "test": ("news", "tales", "french", "russian", "templates"),
}
LABELLED = {"train": "sentiment", "validation": "newsgroups", "test": "topics"}
Counts = dict[str, int]
BUDGETS: dict[tuple[str, str], Counts] = {
    ("planted", "train"): {"parameters": 8, "low": 10, "middle": 16, "high": 4, "checkpointed": 10},
    ("planted", "validation"): {"parameters": 3, "low": 3, "middle": 5, "high": 1, "checkpointed": 4},
    ("planted", "test"): {"parameters": 24, "low": 8, "middle": 12, "high": 2, "checkpointed": 14},
    ("shift", "train"): {"parameters": 8, "low": 10, "middle": 16, "high": 4, "checkpointed": 10},
    ("shift", "validation"): {"parameters": 3, "low": 3, "middle": 5, "high": 1, "checkpointed": 4},
    ("shift", "test"): {"parameters": 8, "low": 12, "middle": 24, "high": 2, "checkpointed": 14},
}
"""How many tasks of each split have each kind of budget: a number of parameters; bytes from one module at rank 1 to
30 % of what rank 8 on all modules takes, from there to all of it, from there to rank 32 everywhere; the whole range of
bytes under gradient checkpointing."""

MORE: dict[str, Counts] = {
    "planted": {"low": 5, "middle": 7},
    "shift": {"parameters": 14, "low": 3, "30 to 50 %": 8, "50 to 75 %": 15, "75 to 100 %": 19},
}
"""Further tasks of the test split, so that each question asked of a policy meets 20 of them: planted ones in low layers
alone."""

BANDS = {"30 to 50 %": (0.3, 0.5), "50 to 75 %": (0.5, 0.75), "75 to 100 %": (0.75, 1.0)}
"""Kinds of budget that are bytes, as shares of what rank 8 on all modules takes."""

LARGE_BATCH = {"train": 24, "validation": 8, "test": 32}
"""Tasks of each suite whose budget is bytes of a step with many rows, up to what rank 8 on all modules takes: there a
rank on a whole layer takes 0.3 to 1.9 % of what one more layer takes, nearly as in large fine-tunes, in place of 2 to
4 %."""

MANY_ROWS = (16, 32, 64)
"""Rows of these steps."""

_DRAWS = 1
"""Seeds the draws of all definitions; another number would give other tasks."""


@dataclass(frozen=True)
class MakeConfig:
    """What is measured."""

    bases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Only tasks on these bases; all by default."""
    ledger: Path = Path("runs/suites")
    """Folder of the results so far."""
    runs: int = 16
    """Runs at a time."""


def definitions(suite: str, split: str) -> list[ProxyTask]:
    """The tasks of one split, without results; always the same ones."""
    generator = np.random.default_rng([SUITES.index(suite), SPLITS.index(split), _DRAWS])
    first = 1_000_000 * (1 + SUITES.index(suite)) + 100_000 * SPLITS.index(split)
    shifts = [("shift", corpus) for corpus in CORPORA[split]]
    places: Sequence[Any] = PLACEMENTS if suite == "planted" else [*shifts, ("classify", LABELLED[split])]
    tasks = _draw(suite, split, BUDGETS[suite, split], places, first, generator)
    if split == "test":
        more = ["low"] if suite == "planted" else places
        tasks += _draw(suite, split, MORE[suite], more, first + len(tasks), generator)
    counts = {"large batch": LARGE_BATCH[split]}
    return tasks + _draw(suite, split, counts, places, first + len(tasks), generator)


def _draw(
    suite: str, split: str, counts: Counts, places: Sequence[Any], first: int, generator: np.random.Generator
) -> list[ProxyTask]:
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    # Kinds of budget and places meet evenly; bases are dealt out on their own.
    bases = generator.permutation(np.resize(np.array(BASES[split]), len(kinds))).tolist()
    tasks = []
    for index, (kind, base) in enumerate(zip(kinds, bases, strict=True)):
        place = places[index % len(places)]
        budget = _budget(base, suite, kind, index // len(places), generator)
        if suite == "planted":
            budget |= {"kind": "planted", "placement": place, "corpus": "documentation"}
        else:
            budget |= {"kind": place[0], "corpus": place[1]}
        tasks.append(ProxyTask(seed=first + index, base=base, **budget))
    return tasks


def _budget(base: str, suite: str, kind: str, turn: int, generator: np.random.Generator) -> dict[str, Any]:
    if kind == "parameters":
        # Mean rank 1 and 2, where planted changes leave most to win; up to 8 for real shifts.
        ranks = (1, 2) if suite == "planted" else (1, 2, 4, 8)
        return {"unit": "parameters", "budget": ranks[turn % len(ranks)] / REFERENCE_RANK}
    priced: dict[str, Any] = {"checkpointing": kind == "checkpointed"}
    if kind == "large batch":
        priced["priced_rows"] = int(generator.choice(MANY_ROWS))
    least, most = budget_range(ProxyTask("shift", 0, base=base, **priced))
    least *= 1.02  # a little room for rounding
    # What is held whatever the plan, logits for one, takes more than 30 % on the narrowest bases.
    edge = max(0.3, 1.2 * least)
    ranges = {"low": (least, edge), "middle": (edge, 1.0), "high": (1.0, most), "large batch": (least, 1.0), **BANDS}
    low, high = ranges.get(kind, (least, most))
    low = max(low, least)
    level = float(generator.uniform())
    return priced | {"budget": float(f"{low * (high / low) ** level:.3g}")}


def budget_range(task: ProxyTask) -> tuple[float, float]:
    """From one module at rank 1 to rank 32 everywhere, as shares of what rank 8 on all modules takes."""
    cost, (_, targets) = ProxyFineTune(task).cost(), adapted_base(task.base)
    most = np.array([target.max_rank for target in targets], dtype=np.int64)
    single = [plan_cost(cost, np.eye(len(targets), dtype=np.int64)[index]) for index in range(len(targets))]
    whole = reference_cost(cost, most)
    return min(single) / whole, plan_cost(cost, np.minimum(FULL_RANK, most)) / whole


def measure(tasks: Sequence[ProxyTask], runs: int) -> Iterator[list[ProxyTask]]:
    """Tune and measure tasks on one base, some at a time; yields them with rate and reference."""
    episodes = StackedEpisodes(tasks[0].base, DecisionSchedule(), runs)
    size = runs // len(RATES)
    for start in range(0, len(tasks), size):
        yield _measure(episodes, tasks[start : start + size])


def _measure(episodes: StackedEpisodes, tasks: Sequence[ProxyTask]) -> list[ProxyTask]:
    problems = [episodes.problem(task) for task in tasks]
    runs = [
        (replace(task, learning_rate=rate), uniform_ranks(problem))
        for task, problem in zip(tasks, problems, strict=True)
        for rate in RATES
    ]
    losses = np.array(episodes.run_fixed(dict(enumerate(runs)))).reshape(len(tasks), len(RATES))
    best = np.nanargmin(losses, axis=1).tolist()
    tuned = [replace(task, learning_rate=RATES[index]) for task, index in zip(tasks, best, strict=True)]
    plans = [(task, _best_plan(task, problem)) for task, problem in zip(tuned, problems, strict=True)]
    reached = episodes.run_fixed(dict(enumerate(plans)))
    with adapted_base(tasks[0].base)[0].disable_adapter():
        initial = [ProxyFineTune(task).held_out_loss(adapted_base(task.base)[0]) for task in tuned]
    return [
        replace(task, reference=Reference(*(round(float(x), 5) for x in (before, losses[row, index], after))))
        for row, (task, index, before, after) in enumerate(zip(tuned, best, initial, reached, strict=True))
    ]


def _best_plan(task: ProxyTask, problem: AllocationProblem) -> Any:
    return oracle_plan(task, problem) if task.kind == "planted" else np.minimum(FULL_RANK, problem.max_ranks)


def main(config: MakeConfig) -> None:
    """Measure what is missing, and write the cards if nothing is."""
    for base in config.bases:
        find_base(base)
    wanted = [(suite, split, task) for suite in SUITES for split in SPLITS for task in definitions(suite, split)]
    for base in sorted({task.base for _, _, task in wanted} & set(config.bases or {t.base for _, _, t in wanted})):
        path = config.ledger / f"{base}.jsonl"
        done = {row["seed"] for row in read_json_lines(path)} if path.exists() else set()
        missing = [task for _, _, task in wanted if task.base == base and task.seed not in done]
        batches = measure(missing, config.runs) if missing else iter(())
        for batch in track(batches, base, total=-(-len(missing) * len(RATES) // config.runs)):
            for task in batch:
                append_json_line(path, asdict(task))
    rows = {row["seed"]: row for path in config.ledger.glob("*.jsonl") for row in read_json_lines(path)}
    if all(task.seed in rows for _, _, task in wanted):
        for suite in SUITES:
            for split in SPLITS:
                cards = [rows[task.seed] for name, part, task in wanted if (name, part) == (suite, split)]
                write_json(FOLDER / f"{suite}-{split}.json", {"suite": suite, "version": VERSION, "tasks": cards})


if __name__ == "__main__":
    main(tyro.cli(MakeConfig, description=__doc__))
