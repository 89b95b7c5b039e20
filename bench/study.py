"""Whether explanations of decisions are true: runs of proxies, their decisions explained and checked one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console

from ..agents.evaluation.runs import run_attempts
from ..agents.learned.policy import LearnedPolicy
from ..agents.learned.policy_file import load_policy, policy_schedule
from ..allocation.log import DecisionLog, DecisionRecord
from ..allocation.policy import Policy
from ..allocation.schedule import DecisionSchedule
from ..common.tables import make_table
from ..env.episodes.episode_log import EpisodeLog
from ..env.episodes.stacked import StackedEpisodes
from ..env.tasks.proxy_task import ProxyTask
from ..env.tasks.suite_names import SUITES
from ..env.tasks.suites import evenly, find_tasks
from ..errors import ConfigError
from ..study.decision.case import Case
from ..study.decision.redecide import redecide
from ..study.decision.shapley import attribute
from ..study.decision.stability import PROBE_NOISE, stability
from ..study.decision.what_if import drawn_question, what_if
from .harness import Figures, with_progress

NOISES = (0.05, 0.1, PROBE_NOISE)
"""Standard deviations of noise on the signals, in log."""


@dataclass(frozen=True)
class Options:
    """Run proxy fine-tunes under a policy, and check what is said of every decision.

    Each run of a validation task is logged as a fine-tune is, and read again from its log. Decisions are taken again
    and compared bit for bit. Shapley values are added up. What-if statements are drawn at random (signals of a module
    or of a type of modules, budget, caution, a bound) and each is checked by deciding again from the log, at the change
    that it states and at one step less. Noise on the signals tells how many decisions it moves. On one thread, the full
    run takes about ten minutes.

    Attributes:
        policy: "default" or the folder of a trained policy with a value ensemble.
        tasks: how many validation tasks are run; each has up to four decisions.
        statements: how many what-if statements are checked.
        quick: under a minute: two tasks and 20 statements.
        json: also write the figures to this file, as flat JSON with names like "shapley_error".
    """

    policy: str = "default"
    tasks: int = 12
    statements: int = 1000
    quick: bool = False
    json: Path | None = None

    def check(self) -> None:
        """Make sure that the counts are in range.

        Raises:
            ConfigError: they are not.
        """
        if self.tasks < 1 or self.statements < 1:
            raise ConfigError(f"tasks and statements are at least 1; got {self.tasks} and {self.statements}.")


def log_runs(folder: Path, tasks: Sequence[ProxyTask], policy: Policy, schedule: DecisionSchedule) -> list[DecisionLog]:
    """Run tasks under a policy and log every decision.

    Args:
        folder: gets a folder for each run.
        tasks: of one base and batch shape.
        policy: decides.
        schedule: when.
    """
    logs = [DecisionLog(folder / str(number)) for number in range(len(tasks))]
    episodes = StackedEpisodes(tasks[0].base, schedule, len(tasks))
    written = [EpisodeLog(log, policy, task.id) for log, task in zip(logs, tasks, strict=True)]
    run_attempts(episodes, [(task, policy) for task in tasks], len(tasks), written)
    return logs


def benchmark(options: Options, console: Console) -> Figures:
    """Check explanations; prints a table and returns its figures.

    Raises:
        ConfigError: options out of range, or the policy has no value ensemble.
    """
    options.check()
    policy = load_policy(options.policy)
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        raise ConfigError(f"{policy.name} has no value ensemble: its decisions have no votes to explain.")
    torch.set_num_threads(1)  # so that products are the same bit for bit
    count, statements = (2, 20) if options.quick else (options.tasks, options.statements)
    with TemporaryDirectory() as folder:
        logs = list(_logs(Path(folder), count, options.policy, policy))
        decisions = [log.logged(number) for log in logs for number in range(len(log))]
    figures: Figures = {"runs": len(logs), "decisions": len(decisions)}
    figures |= _redecided(decisions, policy) | _shapley(decisions, policy)
    figures |= _statements(decisions, policy, statements) | _stable(decisions, policy, 5 if options.quick else 20)
    console.print(make_table("Explanations of decisions", ("", ""), [(k, _shown(v)) for k, v in figures.items()]))
    return figures


def _logs(folder: Path, count: int, given: str, policy: Policy) -> Iterator[DecisionLog]:
    stack = attrgetter("stack")
    tasks = sorted(evenly(find_tasks(SUITES, "validation"), count), key=stack)
    for number, (_, group) in enumerate(groupby(tasks, key=stack)):
        yield from log_runs(folder / str(number), list(group), policy, policy_schedule(given))


def _redecided(decisions: Sequence[DecisionRecord], policy: Policy) -> Figures:
    equal = sum(not redecide(logged, policy).differences for logged in decisions)
    return {"redecided_bit_equal": equal}


def _shapley(decisions: Sequence[DecisionRecord], policy: LearnedPolicy) -> Figures:
    """How exactly Shapley values add up: among themselves, and to the bound in the log."""
    errors, from_log = [], []
    for logged in with_progress(decisions, "Shapley values"):
        found = attribute(logged, policy)
        if found and logged.deliberation:
            errors.append(found.error)
            from_log.append(abs(found.bound_total - float(logged.deliberation.bound[found.plan])))
    return {"shapley_decisions": len(errors), "shapley_error": max(errors), "shapley_from_log": max(from_log)}


def _statements(decisions: Sequence[DecisionRecord], policy: Policy, count: int) -> Figures:
    """How many of some drawn statements are true, and how often a question had an answer."""
    generator, cases = np.random.default_rng(0), [Case(logged, policy) for logged in decisions]
    asked, true, effects = 0, 0, []
    for _ in with_progress(range(count), "what-ifs"):
        answer = None
        while answer is None:
            case = cases[generator.integers(len(cases))]
            asked, answer = asked + 1, what_if(case, drawn_question(case, generator))
        true += answer.holds(Case(case.logged, policy))
        effects.append(answer.side_effects)
    return {
        "statements": count,
        "statements_true": true,
        "questions_with_answer": count / asked,
        "other_modules_moved": float(np.median(effects)),
    }


def _stable(decisions: Sequence[DecisionRecord], policy: Policy, draws: int) -> Figures:
    """What noise leaves of first decisions and of later ones, if there are any, on the mean."""
    figures: Figures = {}
    firsts = np.array([logged.problem.max_step is None for logged in decisions])
    for noise in NOISES:
        found = [stability(logged, policy, noise, draws) for logged in with_progress(decisions, f"noise {noise}")]
        same, sure = np.array([[each.same, each.sure.mean()] for each in found]).T
        for name, chosen in (("first", firsts), ("later", ~firsts)):
            if chosen.any():
                figures[f"same_{name}_plan_at_{noise:g}"] = float(same[chosen].mean())
                figures[f"sure_{name}_modules_at_{noise:g}"] = float(sure[chosen].mean())
    return figures


def _shown(value: float | int | str | bool) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
