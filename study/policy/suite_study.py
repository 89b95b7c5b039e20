"""A policy over a whole suite: what drives it, where it is wrong, and what its later decisions are worth.

It reads the folder of `rankpilot evaluate --logs`: rows of results, and a decision log for each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...agents.evaluation.evaluate import LOGS, ROWS
from ...agents.evaluation.replayed import SHUFFLED, STATIC
from ...agents.evaluation.results import Row, read_rows
from ...agents.evaluation.runs import log_folder
from ...agents.learned.policy import LearnedPolicy
from ...allocation.decision_log import DecisionLog, LoggedDecision
from ...allocation.policy import Policy, is_first
from ...common.statistics import Estimate, estimate, rank_correlation
from ...errors import RunFolderError
from ..decision.shapley import GROUPS, attribute

WORST = 0.1
"""Share of the runs, those with the most regret, that are held against the rest."""


@dataclass(frozen=True, eq=False)
class StudiedRun:
    """One run of the policy.

    Attributes:
        row: its result.
        decisions: of its log, in order.
        attributions: of the decisions that value networks took, what each of `GROUPS` adds to the lower bound of the
            plan over the reference, (decisions, groups); empty without the policy's networks.
    """

    row: Row
    decisions: tuple[LoggedDecision, ...]
    attributions: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def regret(self) -> float:
        """How much worse than uniform rank the run ended, in shares of the headroom; negative where it was better."""
        return -self.row.improvement

    def traits(self) -> dict[str, float]:
        """What may tell runs that went wrong from others, as numbers; yes is 1."""
        first, row = self.decisions[0], self.row
        ranks = first.ranks("rank_after")
        adapted = ranks > 0
        found = {
            "planted task": float(row.kind == "planted"),
            "budget counts bytes": float(first.problem.cost.unit == "bytes"),
            "budget, share of uniform rank 8": row.budget,
            "layers of the base": float(row.depth),
            "share of modules adapted": float(adapted.mean()),
            "share of layers adapted": len(np.unique(first.problem.blocks[adapted])) / row.depth,
            "highest rank": float(ranks.max()),
            "share of rank on the top tenth of modules": _concentration(ranks),
            "later decisions that moved": float(sum(bool(_moved(each)) for each in self.decisions[1:])),
            **{f"{row.family} base": 1.0},
        }
        deliberation = first.deliberation
        if deliberation is not None:
            found |= {
                "expected gain": float(deliberation.mean[deliberation.plan]),
                "spread of the votes": float(deliberation.std[deliberation.plan]),
                "margin": deliberation.margin,
                "plans in the tie": float(deliberation.tied.sum()),
                "distance from uniform": float(deliberation.distances[deliberation.plan]),
            }
        return found


@dataclass(frozen=True)
class Trait:
    """What the worst runs have more or less of than the rest.

    Attributes:
        name: of the trait.
        worst: mean over the worst runs.
        rest: mean over the others.
        distance: their difference in standard deviations over all runs.
    """

    name: str
    worst: float
    rest: float
    distance: float


@dataclass(frozen=True, eq=False)
class SuiteStudy:
    """What a suite says of a policy.

    Attributes:
        policy: its name.
        runs: all runs with a log.
        worth: against the same task and seed: what later changes are worth ("static"), and the choice of layers
            ("shuffled"), in shares of the headroom; those that were run.
    """

    policy: str
    runs: tuple[StudiedRun, ...]
    worth: Mapping[str, Estimate]

    @property
    def tasks(self) -> list[str]:
        """Of each run."""
        return [run.row.task for run in self.runs]

    def improvement(self) -> Estimate:
        """Mean improvement over uniform rank, in shares of the headroom."""
        return estimate([run.row.improvement for run in self.runs], self.tasks)

    def leaves_uniform(self) -> Estimate:
        """Share of runs whose first plan is not the reference's."""
        return estimate([float(_leaves(run.decisions[0])) for run in self.runs], self.tasks)

    def moves_later(self) -> float:
        """Share of later decisions that change a rank."""
        later = [each for run in self.runs for each in run.decisions[1:]]
        return float(np.mean([bool(_moved(each)) for each in later])) if later else 0.0

    def drivers(self) -> dict[str, float]:
        """Mean size of what each group of features adds at first decisions, in the unit of votes; largest first."""
        first = [np.abs(run.attributions[0]) for run in self.runs if len(run.attributions)]
        if not first:
            return {}
        means = dict(zip(GROUPS, np.mean(first, axis=0).tolist(), strict=True))
        return dict(sorted(means.items(), key=lambda pair: -pair[1]))

    def worst(self) -> tuple[StudiedRun, ...]:
        """The runs with the most regret, the worst first."""
        order = sorted(self.runs, key=lambda run: -run.regret)
        return tuple(order[: max(1, round(WORST * len(order)))])

    def traits(self) -> list[Trait]:
        """What the worst runs have in common, the largest distance first."""
        worst = set(map(id, self.worst()))
        rows = [(id(run) in worst, run.traits()) for run in self.runs]
        found = []
        for name in dict.fromkeys(name for _, traits in rows for name in traits):
            values = np.array([traits.get(name, 0.0) for _, traits in rows])
            bad = np.array([is_worst for is_worst, _ in rows])
            if values.std() > 0 and not bad.all():
                gap = values[bad].mean() - values[~bad].mean()
                trait = Trait(name, float(values[bad].mean()), float(values[~bad].mean()), float(gap / values.std()))
                found.append(trait)
        return sorted(found, key=lambda trait: -abs(trait.distance))

    def promise(self) -> tuple[float, list[tuple[float, float, int]]]:
        """Whether runs gain where the votes say so.

        Returns:
            The rank correlation of expected and real improvement over first decisions that left uniform rank; and for
            each third of the expected gain over its spread its mean, the share of runs that gained, and their number.
        """
        seen = [run for run in self.runs if run.decisions[0].deliberation and _leaves(run.decisions[0])]
        if len(seen) < 3:
            return float("nan"), []
        first = [run.decisions[0] for run in seen]
        expected = np.array([each.value("expected") for each in first])
        surety = expected / np.maximum([each.value("uncertainty") for each in first], 1e-9)
        real = np.array([run.row.improvement for run in seen])
        thirds = [
            (float(surety[part].mean()), float((real[part] > 0).mean()), len(part))
            for part in np.array_split(np.argsort(surety), 3)
        ]
        return rank_correlation(expected, real), thirds

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        correlation, thirds = self.promise()
        return {
            "policy": self.policy,
            "runs": len(self.runs),
            "tasks": len(set(self.tasks)),
            "improvement": vars(self.improvement()),
            "leaves_uniform": vars(self.leaves_uniform()),
            "moves_later": self.moves_later(),
            "drivers": self.drivers(),
            "worth": {name: vars(value) for name, value in self.worth.items()},
            "promise": {
                "rank_correlation": None if np.isnan(correlation) else correlation,
                "thirds": [dict(zip(("surety", "gained", "runs"), third, strict=True)) for third in thirds],
            },
            "worst": [
                {"task": run.row.task, "seed": run.row.seed, "improvement": run.row.improvement} for run in self.worst()
            ],
            "traits": [vars(trait) for trait in self.traits()],
        }


def study_suite(folder: Path, name: str, policy: Policy | None = None) -> SuiteStudy:
    """Study a policy by the folder of an evaluation.

    Args:
        folder: of `rankpilot evaluate --logs`.
        name: what rows call the policy.
        policy: the policy, to tell which features drive it; without it, or for a rule, that is left out.

    Raises:
        RunFolderError: there are no rows of this policy, or no logs of its runs.
    """
    rows = read_rows(folder / ROWS)
    mine = [row for row in rows if row.policy == name]
    if not mine:
        names = ", ".join(dict.fromkeys(row.policy for row in rows)) or "none"
        raise RunFolderError(f"{folder / ROWS} holds no runs of {name!r}; it holds those of: {names}.")
    learned = policy if isinstance(policy, LearnedPolicy) and policy.value_ensemble is not None else None
    logs = [(row, DecisionLog(log_folder(folder / LOGS, row.key))) for row in mine]
    runs = tuple(_studied(row, log, learned) for row, log in logs if len(log))
    if not runs:
        raise RunFolderError(
            f"{folder / LOGS} holds no decision log of {name!r}. Run `rankpilot evaluate {name}` with --logs."
        )
    worth = {how: _worth(mine, [row for row in rows if row.policy == f"{name} {how}"]) for how in (STATIC, SHUFFLED)}
    return SuiteStudy(name, runs, {how: value for how, value in worth.items() if value})


def _studied(row: Row, log: DecisionLog, policy: LearnedPolicy | None) -> StudiedRun:
    decisions = tuple(log.logged(number) for number in range(len(log)))
    found = [attribute(each, policy) for each in decisions if policy and each.deliberation]
    parts = [each.bound for each in found if each]
    return StudiedRun(row, decisions, np.array(parts) if parts else np.zeros((0, len(GROUPS))))


def _worth(mine: Sequence[Row], others: Sequence[Row]) -> Estimate | None:
    """How much better the policy's runs are than others on the same tasks and seeds."""
    improvements = {row.key[1:]: row.improvement for row in others}
    pairs = [(row.task, row.improvement - improvements[row.key[1:]]) for row in mine if row.key[1:] in improvements]
    return estimate([gap for _, gap in pairs], [task for task, _ in pairs]) if pairs else None


def _leaves(logged: LoggedDecision) -> bool:
    """Whether a decision took another plan than the reference's."""
    deliberation = logged.deliberation
    if deliberation is not None:
        return deliberation.plan != deliberation.reference
    return not is_first(logged.observation) and bool(_moved(logged))


def _moved(logged: LoggedDecision) -> int:
    return int(np.count_nonzero(logged.ranks("rank_after") != logged.ranks("rank_before")))


def _concentration(ranks: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Share of all rank that the tenth of the modules with the most of it has."""
    most = np.sort(ranks)[::-1][: max(1, len(ranks) // 10)]
    return float(most.sum() / max(1, ranks.sum()))
