"""Off-policy estimates beside the truth, on tasks of which the expected outcome of every plan is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..common.statistics import rank_correlation
from ..common.tables import make_table
from ..errors import ConfigError
from ..study.off_policy.compare import TargetResult, compare_targets
from ..study.off_policy.estimates import Method
from ..study.off_policy.restricted import restricted_choice
from .harness import Figures, machine_facts, with_progress
from .known_outcomes import KnownLog, KnownOutcomes, closed_form, planted

RANKED = 10
"""The fewest targets with an estimate of which a rank correlation is told."""


@dataclass(frozen=True)
class Setting:
    """How a log comes about.

    Attributes:
        tasks: in a log.
        runs: of each task.
        temperature: of the policy that decided, a softmax, in standard deviations of its values of a task's plans.
    """

    tasks: int
    runs: int
    temperature: float

    @property
    def name(self) -> str:
        """For figures, such as "200x1.t2"."""
        return f"{self.tasks}x{self.runs}.t{self.temperature:g}"


FULL = (Setting(200, 1, 2.0), Setting(60, 3, 2.0), Setting(60, 1, 1.0), Setting(200, 1, 0.05))
QUICK = (Setting(60, 3, 2.0),)


@dataclass(frozen=True)
class Options:
    """Estimate what many policies would have gained, from the runs of another one, and hold it against the truth.

    Two pools of tasks of which the expected outcome of every plan is known: a closed form, and planted tasks, whose
    loss under a plan is computed without training. Logs are drawn: tasks from the pool, plans by a softmax whose
    probabilities are logged. For each method: the share of estimates that are refused for want of overlap; the share of
    the 95 % intervals that hold the truth (for restricted choice that of the restricted policy, the mean of all logs);
    the intervals' median width in log loss; and the rank correlation with the truth over targets (the median of logs
    with 10 estimates or more). Takes about five minutes.

    Attributes:
        logs: drawn for each setting, at least 1.
        targets: policies that are estimated from each log, at least 2.
        quick: under a minute: 5 logs of smaller pools.
        json: also write the figures to this file, as flat JSON with names like "planted.200x1.t2.direct.covered".
    """

    logs: int = 100
    targets: int = 100
    quick: bool = False
    json: Path | None = None


@dataclass(frozen=True)
class Accuracy:
    """How estimates of one method agree with the truth.

    Attributes:
        estimated: targets with an estimate.
        refused: targets without.
        covered: share of the intervals that hold the truth, 0 to 1; NaN without an estimate.
        width: median width of the intervals, in the unit of the outcomes; NaN without an estimate.
        rank_correlation: Spearman's, between estimates and truth; NaN for fewer than two targets.
    """

    estimated: int
    refused: int
    covered: float
    width: float
    rank_correlation: float


def measure(pool: KnownOutcomes, setting: Setting, logs: int, targets: int) -> dict[Method, Accuracy]:
    """How estimates of each method agree with the truth, over many logs and targets.

    Args:
        pool: of tasks.
        setting: of the logs.
        logs: how many.
        targets: how many policies are estimated from each.

    Returns:
        By method: totals of estimates and refusals, the share covered of all, medians of width and rank correlation.
    """
    policies = pool.targets(targets, seed=0)
    truth = {policy.name: pool.truth(policy) for policy in policies}
    results, restricted = [], []
    for number in range(logs):
        log = pool.log(
            policies,
            tasks=setting.tasks,
            runs=setting.runs,
            temperature=setting.temperature,
            generator=np.random.default_rng([1, number]),
        )
        results.append(compare_targets(log.choices, log.targets))
        restricted.append(_restricted_truth(log))
    own = {name: float(np.mean([each[name] for each in restricted])) for name in truth}
    return {method: _overall(results, truth, own, method) for method in results[0][0].estimates}


def accuracy_of(results: Sequence[TargetResult], truth: Mapping[str, float], method: Method) -> Accuracy:
    """Hold the estimates of one method against the truth.

    Args:
        results: of several targets.
        truth: the expected outcome of each target, by name.
        method: which estimates.
    """
    gains = {result.target: result.estimates[method].gain for result in results}
    known = [(gain, truth[name]) for name, gain in gains.items() if gain is not None]
    refused = len(gains) - len(known)
    if not known:
        return Accuracy(0, refused, float("nan"), float("nan"), float("nan"))
    values, truths = np.array([gain.value for gain, _ in known]), np.array([true for _, true in known])
    covered = np.mean([gain.low <= true <= gain.high for gain, true in known])
    width = np.median([gain.high - gain.low for gain, _ in known])
    return Accuracy(len(known), refused, float(covered), float(width), rank_correlation(values, truths))


def _restricted_truth(log: KnownLog) -> dict[str, float]:
    """What each target restricted to the logged plans is expected to gain on these tasks; 0 where it has no choice."""
    expected = replace(log.choices, outcomes=log.expected)
    gains = {target.name: restricted_choice(expected, target).gain for target in log.targets}
    return {name: gain.value if gain else 0.0 for name, gain in gains.items()}


def _overall(
    results: Sequence[Sequence[TargetResult]], truth: dict[str, float], restricted: dict[str, float], method: Method
) -> Accuracy:
    ranked = [accuracy_of(each, truth, method) for each in results]
    held = [accuracy_of(each, restricted, method) for each in results] if method == "restricted choice" else ranked
    estimated = sum(each.estimated for each in held)
    if not estimated:
        return Accuracy(0, sum(each.refused for each in held), float("nan"), float("nan"), float("nan"))
    covered = sum(each.covered * each.estimated for each in held if each.estimated) / estimated
    widths = [each.width for each in held if each.estimated]
    correlations = [each.rank_correlation for each in ranked if each.estimated >= RANKED]
    return Accuracy(
        estimated,
        sum(each.refused for each in held),
        covered,
        float(np.median(widths)),
        float(np.median(correlations)) if correlations else float("nan"),
    )


def _cells(accuracy: Accuracy) -> list[str]:
    share = accuracy.refused / (accuracy.refused + accuracy.estimated)
    figures = (f"{accuracy.covered:.1%}", f"{accuracy.width:.3f}", f"{accuracy.rank_correlation:.2f}")
    return [f"{share:.0%}", *("" if "nan" in each else each for each in figures)]


def _figures(accuracy: Accuracy) -> Figures:
    values = {
        "refused": accuracy.refused / (accuracy.refused + accuracy.estimated),
        "covered": accuracy.covered,
        "width": accuracy.width,
        "rank_correlation": accuracy.rank_correlation,
    }
    return {name: value for name, value in values.items() if not np.isnan(value)}


def benchmark(options: Options, console: Console) -> Figures:
    """Measure, print a table for each pool and setting, and return all figures.

    Raises:
        ConfigError: an option is out of range.
    """
    if options.logs < 1 or options.targets < 2:
        raise ConfigError(f"--logs is at least 1 and --targets at least 2; got {options.logs} and {options.targets}.")
    pools: dict[str, Callable[[], KnownOutcomes]] = {
        "closed form": lambda: closed_form(30 if options.quick else 150),
        "planted": lambda: planted(9 if options.quick else 48),
    }
    settings, logs = (QUICK, min(5, options.logs)) if options.quick else (FULL, options.logs)
    figures: Figures = {**machine_facts(torch.device("cpu")), "quick": options.quick, "logs": logs}
    columns = ("method", "refused", "covered", "width", "rank correlation")
    for name, make in pools.items():
        pool = make()
        for setting in with_progress(list(settings), name):
            found = measure(pool, setting, logs, options.targets)
            for method, accuracy in found.items():
                key = f"{name}.{setting.name}.{method}".replace(" ", "_")
                figures |= {f"{key}.{figure}": value for figure, value in _figures(accuracy).items()}
            title = f"{name}: {setting.tasks} tasks, runs of each: {setting.runs}, temperature {setting.temperature:g}"
            console.print(make_table(title, columns, [[method, *_cells(each)] for method, each in found.items()]))
    return figures
