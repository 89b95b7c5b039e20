"""`python -m benchmarks agent`: a trained agent beside hand rules, on families and texts that nobody learned.

All steer the same short fine-tunes of the test split, in four regimes: few ranks; a rate that is off by up to 8; a
budget and a text that change; nothing wrong. Rules act by the same actions as the agent. Constants adapt one kind of
module everywhere, and keep that; the best of them is chosen on these very tasks. The oracle knows what was planted. The
first agent also runs crippled: it sees only the clock, or groups in another order, or makes only moves of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rankpilot.agents.policy_file import LearnedPolicy, load_policy
from rankpilot.common.arrays import IntArray
from rankpilot.common.files import append_json_line, read_json_lines
from rankpilot.common.statistics import Estimate, estimate
from rankpilot.common.text import kinds_in_layers, make_table, plural
from rankpilot.decide.groups import GROUP_RULES, NOTHING, RATE_CHANGES, GroupView, Steering
from rankpilot.decide.observation import RUN_FEATURES, Observation
from rankpilot.decide.policy import Decision, Policy, decision_to_keep, is_first
from rankpilot.decide.rules import find_rule
from rankpilot.env.evaluate import ORACLE, Row, beside, compare, evaluation_tasks
from rankpilot.env.tasks import REGIMES as DRAWN
from rich.console import Console

from .harness import Figures, machine_facts

STORED = Path(__file__).parent / "results" / "agent.jsonl"
"""A line for each run."""

RULE = "union"
"""The best hand rule, with which all are compared."""

REGIMES: tuple[str, ...] = DRAWN
"""What is wrong with runs."""

ALL = "all"
COLUMNS = (*REGIMES, ALL)

KINDS = {
    "down": ("down_proj", "output.dense", "mlp.c_proj"),
    "value": ("v_proj", "value", "c_attn"),
    "output": ("o_proj", "attention.output.dense", "attn.c_proj"),
}
"""The kinds of modules that constants adapt, by families of models."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare a trained agent with rules, constants, uniform ranks and the oracle.

    Attributes:
        policies: folders of trained agents; several are seeds of one.
        tasks: of each regime; each takes all contenders some CPU seconds.
        rows: of runs so far, a line of JSON each; new ones join them, and none is run twice.
        quick: one task of each regime, and no agent.
        json: also write figures to this file.
    """

    policies: tuple[Path, ...] = ()
    tasks: int = 30
    rows: Path = STORED
    quick: bool = False
    json: Path | None = None


SEED = 2026
"""Draws the tasks; no agent was chosen on them."""

CLOCK = [RUN_FEATURES.index(name) for name in ("progress", "decisions_left", "horizon", "steps_time", "steps_steps")]


WAYS = ("rank moves only", "rate moves only", "groups permuted", "clock only")


@dataclass(frozen=True)
class Random:
    """Draws an allowed action, the same from the same observation."""

    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        draw = np.random.default_rng(np.frombuffer(view.run.tobytes(), np.uint32))
        return int(draw.choice(np.flatnonzero(view.allowed)))


@dataclass(frozen=True)
class Crippled:
    """An agent without part of what it sees or does.

    Attributes:
        policy: the agent.
        how: one of `WAYS`.
    """

    policy: LearnedPolicy
    how: str

    @torch.no_grad()
    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        groups, run = view.features.copy(), view.run.copy()
        if self.how == "clock only":
            groups[:], run[:] = 0, 0
            run[CLOCK] = view.run[CLOCK]
        elif self.how == "groups permuted":  # in an order that stays during a run
            there = np.flatnonzero(view.groups.repeated)
            seed = np.frombuffer("".join(view.observation.names).encode()[:64], np.uint8)
            groups[there] = groups[np.random.default_rng(seed).permutation(there)]
        seen = (torch.from_numpy(each)[None] for each in (groups, view.groups.repeated, run))
        scores = self.policy.network(*seen)[0][0]
        action = int(scores.masked_fill(~torch.from_numpy(self.policy.allowed(view)), -torch.inf).argmax())
        moves_ranks = action >= len(RATE_CHANGES)
        kept = {"rank moves only": moves_ranks, "rate moves only": not moves_ranks}
        return action if kept.get(self.how, True) else NOTHING


@dataclass(frozen=True)
class Constant:
    """The highest rank that fits on one kind of module in all layers, kept to the end.

    Attributes:
        name: "constant " and a key of `KINDS`.
    """

    name: str

    def decide(self, observation: Observation) -> Decision:
        """The plan at first, and no change after it."""
        if not is_first(observation):
            return decision_to_keep(observation)
        problem = observation.problem
        labels = kinds_in_layers(observation.names, problem.blocks.tolist())
        chosen = np.isin(labels, KINDS[self.name.removeprefix("constant ")])
        ranks: IntArray = np.zeros(len(labels), dtype=np.int64)
        for module in np.flatnonzero(chosen)[::-1]:  # the top layers first, where rank 1 does not fit on all
            more = ranks.copy()
            more[module] = 1
            ranks = more if problem.fits(more) else ranks
        for rank in problem.ladder.ranks[2:]:
            more = np.where(ranks > 0, np.minimum(rank, problem.max_ranks), 0)
            ranks = more if problem.fits(more) else ranks
        return Decision(
            ranks if ranks.any() else problem.uniform(0) + (np.arange(len(ranks)) == 0), np.zeros(len(ranks))
        )


def contenders(policies: Sequence[Path]) -> dict[str, Policy]:
    """All that are compared, by name."""
    found: dict[str, Policy] = {**GROUP_RULES, "uniform": find_rule("uniform"), "random": Steering("random", Random())}
    found |= {f"constant {name}": Constant(f"constant {name}") for name in KINDS}
    agents = {f"agent {folder.name}": load_policy(folder) for folder in policies}
    for first in list(agents.values())[:1]:
        assert isinstance(first, LearnedPolicy)
        found |= {f"first agent, {how}": Steering(how, Crippled(first, how)) for how in WAYS}
    return found | agents


def collected(options: Options, console: Console) -> list[Row]:
    """The rows of all runs, of which those that are missing are run."""
    rows = stored_rows(options.rows)
    known = {(row.policy, row.task) for row in rows}
    for task, regime in evaluation_tasks(1 if options.quick else options.tasks, seed=SEED).items():
        missing = {name: each for name, each in contenders(options.policies).items() if (name, task.id) not in known}
        oracle = task.kind == "planted" and (ORACLE, task.id) not in known
        for row in compare(missing, {task: regime}, oracle=oracle) if missing or oracle else ():
            if not options.quick:
                append_json_line(options.rows, asdict(row))
            rows.append(row)
        console.print(f"{regime}: {task.id}", markup=False, highlight=False)
    return rows


def stored_rows(path: Path = STORED) -> list[Row]:
    """The rows of a file; none if it is absent."""
    return [Row(**line) for line in read_json_lines(path)] if path.is_file() else []


def table_rows(rows: Sequence[Row]) -> list[tuple[str, Mapping[str, Estimate]]]:
    """Each contender with its losses above those of the rule by regime, %; seeds of agents are one."""
    names = list(dict.fromkeys(row.policy for row in rows))
    agents = [name for name in names if name.startswith("agent ")]
    constants = [name for name in names if name.startswith("constant ")]
    found: list[tuple[str, Mapping[str, Estimate]]] = []
    if agents:
        found.append((f"agent, {plural(len(agents), 'training')}", _cells(rows, agents)))
    found += [(name, _cells(rows, [name])) for name in names if name not in (*agents, *constants, RULE)]
    if constants:
        of_each = {name: _cells(rows, [name]) for name in constants}
        there = next(iter(of_each.values()))
        best = {regime: min((each[regime] for each in of_each.values()), key=lambda e: e.value) for regime in there}
        found.append(("best constant", best))
    return found


def _cells(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Estimate]:
    cells: dict[str, Estimate] = {}
    for regime in COLUMNS:
        own = [row for row in rows if regime in (row.regime, ALL)]
        pairs = [pair for name in names for pair in beside(own, name, RULE).items()]
        if pairs:
            cells[regime] = estimate([value for _, value in pairs], [task for task, _ in pairs])
    return cells


def planted_share(rows: Sequence[Row], name: str, most_rank: float = 1.5) -> float:
    """Which share of what the oracle gains over the run left alone a policy gains, on planted tasks of few ranks."""
    few = [
        row for row in rows if row.kind == "planted" and float(row.task.split("/rank ")[1].split("/")[0]) <= most_rank
    ]
    gains = {each: -np.mean(list(beside(few, each, "left-alone").values())) for each in (name, ORACLE)}
    return float(gains[name] / gains[ORACLE])


def benchmark(options: Options, console: Console) -> Figures:
    """Print who ends how far above the best hand rule, by regime."""
    rows = collected(options, console)
    found = table_rows(rows)
    cells = [(name, *(f"{of[regime]:+.1f}" if regime in of else "" for regime in COLUMNS)) for name, of in found]
    console.print(make_table(f"Held-out loss above that of the rule {RULE}, %", ("", *COLUMNS), cells))
    figures: Figures = dict(machine_facts(torch.device("cpu")))
    if any(row.policy == ORACLE for row in rows):
        for name in dict.fromkeys(row.policy for row in rows if row.kind == "planted" and row.policy != ORACLE):
            figures[f"{name}, planted share"] = share = planted_share(rows, name)
            console.print(f"{name}: {share:.0%} of what the oracle gains on planted tasks of rank 1.5 and less")
    for name, of in found:
        figures |= {f"{name}, {regime}": each.value for regime, each in of.items()}
    return figures
