"""A policy over a whole suite: what drives it, where it is wrong, and what its later decisions are worth.

It reads the folder of `rankpilot evaluate --logs`: rows of results, and a decision log for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ...agents.evaluation.evaluate import LOGS, ROWS
from ...agents.evaluation.replayed import SHUFFLED, STATIC
from ...agents.evaluation.results import Row, read_rows
from ...agents.evaluation.runs import log_folder
from ...agents.learned.policy import LearnedPolicy
from ...allocation.log import DecisionLog, DecisionRecord
from ...allocation.plan import uniform_ranks
from ...allocation.policy import Policy, decided_plan, decision_from_plan
from ...common.arrays import FloatArray
from ...common.statistics import Estimate, estimate
from ...errors import RunFolderError
from ..decision.shapley import GROUPS, attribute
from .suite_figures import Driver, Part, Promise, Trait, decides_nothing, promise_of, worst_against_rest, worst_count
from .traits import changed, traits_of

_PARTS = {
    "planted": "planted tasks",
    "shift": "shifted texts",
    "classify": "classification",
    "parameters": "budget in parameters",
    "bytes": "budget in bytes",
    "checkpointed": "bytes, layers recomputed",
    "large batch": "bytes of a large batch",
}
"""What the kinds of tasks and budgets are called."""


@dataclass(frozen=True, eq=False)
class StudiedRun:
    """One run of the policy.

    Attributes:
        row: its result.
        log: the folder of its decision log.
        decisions: of the log, in order.
        parts: what each of `GROUPS` adds to the lower bound of the first plan over uniform rank (of the best other
            plan, where uniform rank was taken), (groups,); None without the policy's networks.
    """

    row: Row
    log: Path
    decisions: tuple[DecisionRecord, ...]
    parts: FloatArray | None

    @property
    def leaves_uniform(self) -> bool:
        """Whether its first plan is not uniform rank."""
        first = self.decisions[0]
        if first.deliberation is not None:
            return first.deliberation.plan != first.deliberation.reference
        problem = first.observation.problem
        uniform = decided_plan(problem, decision_from_plan(uniform_ranks(problem))).ranks
        return not np.array_equal(first.rank_after, uniform)


@dataclass(frozen=True, eq=False)
class SuiteStudy:
    """What a suite says of a policy.

    Attributes:
        policy: its name.
        folder: of the evaluation.
        rows: all its results.
        runs: those of them that have a log.
        others: results of other policies, by name.
        networks: the policy's own; None where they are not at hand.
        obstacle: why they are not, in words; empty where they are.
    """

    policy: str
    folder: Path
    rows: tuple[Row, ...]
    runs: tuple[StudiedRun, ...]
    others: Mapping[str, Sequence[Row]]
    networks: LearnedPolicy | None
    obstacle: str

    @property
    def replays(self) -> dict[str, str]:
        """By `STATIC` and `SHUFFLED`, what rows call the runs at this policy's final ranks."""
        logged_as = log_folder(self.folder, self.rows[0].key).parent.name
        return {how: f"{logged_as} {how}" for how in (STATIC, SHUFFLED)}

    def improvement(self) -> Estimate:
        """Mean improvement over uniform rank, in shares of the headroom."""
        return estimate([row.improvement for row in self.rows], [row.task for row in self.rows])

    def gained(self) -> Estimate:
        """Share of runs that ended better than uniform rank."""
        return estimate([float(row.improvement > 0) for row in self.rows], [row.task for row in self.rows])

    def parts(self) -> list[Part]:
        """The improvement on each kind of task, by what was counted, and by family of the base."""
        found = []
        for column in ("kind", "cost_kind", "family"):
            values = sorted({str(getattr(row, column)) for row in self.rows})
            for value in values if len(values) > 1 else []:
                rows = [row for row in self.rows if getattr(row, column) == value]
                found.append(_part(_PARTS.get(value, f"{value} bases"), rows))
        return found

    def leaves_uniform(self) -> Estimate:
        """Share of runs whose first plan is not uniform rank."""
        return estimate([float(run.leaves_uniform) for run in self.runs], self._tasks)

    def moves_later(self) -> Estimate | None:
        """Share of later decisions that change a rank; None where there are none."""
        later = [(run.row.task, float(changed(each) > 0)) for run in self.runs for each in run.decisions[1:]]
        return estimate([moved for _, moved in later], [task for task, _ in later]) if later else None

    def drivers(self) -> list[Driver]:
        """What each group of features adds at first decisions, the largest first; empty without networks."""
        known = [(run.row.task, run.parts) for run in self.runs if run.parts is not None]
        if not known:
            return []
        parts, tasks = np.stack([parts for _, parts in known]), [task for task, _ in known]
        found = [
            Driver(name, estimate(np.abs(column), tasks), float(column.mean()))
            for name, column in zip(GROUPS, parts.T, strict=True)
        ]
        return sorted(found, key=lambda driver: -driver.size.value)

    def against(self, name: str) -> Estimate | None:
        """How much better this policy's runs are than others on the same tasks and seeds; None if there are none."""
        improvements = {row.key[1:]: row.improvement for row in self.others.get(name, ())}
        pairs = [
            (row.task, row.improvement - improvements[row.key[1:]]) for row in self.rows if row.key[1:] in improvements
        ]
        return estimate([gap for _, gap in pairs], [task for task, _ in pairs]) if pairs else None

    def worth(self) -> dict[str, Estimate]:
        """What later changes are worth (`STATIC`), and the choice of layers (`SHUFFLED`), in shares of the headroom.

        Those that were run; each is the mean of this policy's runs less runs at their final ranks.
        """
        found = {how: self.against(name) for how, name in self.replays.items()}
        return {how: value for how, value in found.items() if value}

    def beside(self) -> dict[str, Estimate]:
        """How much better it is than each other policy of the folder, in shares of the headroom."""
        found = {name: self.against(name) for name in self.others if name not in self.replays.values()}
        return {name: value for name, value in found.items() if value}

    def worst(self) -> tuple[StudiedRun, ...]:
        """The tenth of the runs that ended worst against uniform rank, the worst first."""
        return tuple(sorted(self.runs, key=lambda run: run.row.improvement)[: worst_count(len(self.runs))])

    @cached_property
    def _tasks(self) -> list[str]:
        return [run.row.task for run in self.runs]

    def traits(self) -> list[Trait]:
        """What the worst runs have more or less of than the rest; first what decides something, then by distance."""
        by_run = [traits_of(run.row, run.decisions) for run in self.runs]
        families = sorted({run.row.family for run in self.runs})
        for family in families if len(families) > 2 else families[:1]:
            for traits, run in zip(by_run, self.runs, strict=True):
                traits[f"{family} base"] = float(run.row.family == family)
        names = dict.fromkeys(name for traits in by_run for name in traits)
        found = [self._trait(name, [traits.get(name) for traits in by_run]) for name in names]
        known = [trait for trait in found if trait]
        return sorted(known, key=lambda trait: (decides_nothing(trait.distance), -abs(trait.distance.value)))

    def _trait(self, name: str, given: Sequence[float | None]) -> Trait | None:
        """One trait over the runs that have it; None where it is the same in all of them."""
        known = [(run, value) for run, value in zip(self.runs, given, strict=True) if value is not None]
        values = np.array([value for _, value in known])
        spread = float(values.std()) if len(values) > 1 else 0.0
        tasks = [run.row.task for run, _ in known]
        if spread < 1e-9 or len(set(tasks)) < 2:
            return None
        improvements = np.array([run.row.improvement for run, _ in known])
        order = np.argsort(improvements, kind="stable")
        cut = worst_count(len(order))
        worst, rest = (float(values[part].mean()) for part in (order[:cut], order[cut:]))
        both = np.stack([improvements, values / spread], axis=1)
        return Trait(name, worst, rest, estimate(both, tasks, worst_against_rest))

    def promise(self) -> Promise | None:
        """Whether runs gain where the votes say so; None where too few runs left uniform rank by votes."""
        found = [
            (run.row, votes)
            for run in self.runs
            if (votes := run.decisions[0].deliberation) is not None and run.leaves_uniform
        ]
        return promise_of(
            np.array([votes.mean[votes.plan] for _, votes in found], dtype=np.float64),
            np.array([votes.std[votes.plan] for _, votes in found], dtype=np.float64),
            np.array([row.improvement for row, _ in found]),
            [row.task for row, _ in found],
        )


def study_suite(
    folder: Path,
    name: str,
    policy: Policy | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SuiteStudy:
    """Study a policy by the folder of an evaluation.

    Args:
        folder: of `rankpilot evaluate --logs`.
        name: what rows call the policy.
        policy: the policy, to tell which features drive it. Without it, for a rule, or if its weights are others than
            those of the log, that is left out, and `SuiteStudy.obstacle` says why.
        on_progress: called with (runs read, runs in all).

    Raises:
        RunFolderError: there are no rows of this policy, or logs of its runs on fewer than two tasks.
    """
    rows = read_rows(folder / ROWS)
    mine = tuple(row for row in rows if row.policy == name)
    if not mine:
        names = ", ".join(dict.fromkeys(row.policy for row in rows))
        elsewhere = f"it holds those of: {names}" if rows else "pass the output folder of `rankpilot evaluate --logs`"
        raise RunFolderError(f"{folder / ROWS} holds no runs of {name!r}; {elsewhere}.")
    logs = [(row, log) for row in mine if len(log := DecisionLog(log_folder(folder / LOGS, row.key)))]
    tasks = len({row.task for row, _ in logs})
    if tasks < 2:
        raise RunFolderError(
            f"{folder / LOGS} holds decision logs of {name!r} on {tasks} tasks; intervals need at least 2. "
            "Run `rankpilot evaluate` with --logs from the start: runs that the folder holds already are not repeated."
        )
    networks, obstacle = _networks(name, policy, logs[0][1].logged(0))
    runs = []
    for row, log in logs:
        runs.append(_studied(row, log, networks))
        if on_progress:
            on_progress(len(runs), len(logs))
    others: dict[str, list[Row]] = {}
    for row in rows:
        if row.policy != name:
            others.setdefault(row.policy, []).append(row)
    return SuiteStudy(name, folder, mine, tuple(runs), others, networks, obstacle)


def _networks(name: str, policy: Policy | None, first: DecisionRecord) -> tuple[LearnedPolicy | None, str]:
    """The networks that decided, or why they are not at hand."""
    if first.deliberation is None:
        return None, f"{name} is a rule, or a policy without a value ensemble: it weighs no plans"
    if policy is None:
        return None, f"the networks of {name} are not at hand"
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        return None, f"{policy.name}, which was given, has no value networks"
    if policy.sha256 != first.policy_sha256:
        return None, f"the networks that were given as {name} are others than those that decided (another sha256)"
    return policy, ""


def _studied(row: Row, log: DecisionLog, networks: LearnedPolicy | None) -> StudiedRun:
    decisions = tuple(log.logged(number) for number in range(len(log)))
    known = attribute(decisions[0], networks) if networks and decisions[0].deliberation else None
    return StudiedRun(row, log.folder, decisions, known.bound if known else None)


def _part(name: str, rows: Sequence[Row]) -> Part:
    tasks = [row.task for row in rows]
    count = len(set(tasks))
    improvement = estimate([row.improvement for row in rows], tasks) if count > 1 else None
    return Part(name, len(rows), count, improvement)
