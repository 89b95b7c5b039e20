"""Many targets side by side, and how well estimates rank them where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.markup import escape
from rich.table import Table

from ...common.statistics import rank_correlation
from ...common.tables import make_table
from .estimates import Method, PolicyEstimate
from .logged import LoggedChoices
from .restricted import restricted_choice
from .targets import TargetPolicy
from .weighted import direct, doubly_robust, importance, self_normalised


@dataclass(frozen=True, eq=False)
class TargetResult:
    """What is known of one target.

    Attributes:
        target: its name.
        estimates: by method; `direct` and `doubly robust` are missing where there are no predictions.
    """

    target: str
    estimates: Mapping[Method, PolicyEstimate]


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


def compare_targets(
    choices: LoggedChoices, targets: Sequence[TargetPolicy], *, one_observation: bool = True
) -> list[TargetResult]:
    """Estimate what each target would have gained, by every method that applies.

    Args:
        choices: the log.
        targets: policies, over the plans of the log.
        one_observation: whether all decisions of a task were made from what was seen once, as plan runs are. Where each
            run saw its own data, a target takes other plans in each, and restricted choice says nothing of it.

    Raises:
        DataError: a target does not fit the decisions.
    """
    methods: dict[Method, Callable[[LoggedChoices, TargetPolicy], PolicyEstimate]] = {
        "restricted choice": restricted_choice,
        "direct": direct,
        "importance": importance,
        "self-normalised": self_normalised,
        "doubly robust": doubly_robust,
    }
    if choices.predictions is None:
        del methods["direct"], methods["doubly robust"]
    if not one_observation:
        del methods["restricted choice"]
    return [
        TargetResult(target.name, {name: estimate(choices, target) for name, estimate in methods.items()})
        for target in targets
    ]


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


def comparison_table(results: Sequence[TargetResult], truth: Mapping[str, float] | None = None) -> Table:
    """Estimates with their intervals, some rows a target, beside what tells how far weights carry; refusals in words.

    Args:
        results: of `compare_targets`, at least one.
        truth: the expected outcome of each target, by name, where it is known: gets a column, and the table's last rows
            tell each method's rank correlation with it.
    """
    columns = ["policy", "method", "gain", "tasks that\ntell", "largest\nweight", *(["truth"] if truth else [])]
    rows = []
    for result in results:
        weighted = result.estimates["self-normalised"]
        for number, (method, estimate) in enumerate(result.estimates.items()):
            figures = [_or_unknown(weighted.effective_size), _or_unknown(weighted.largest_weight)]
            known = [f"{truth[result.target]:+.3f}"] if truth else []
            first = number == 0
            rows.append(
                [
                    escape(result.target) if first else "",
                    method + (" *" if method == "direct" else ""),
                    _cell(estimate),
                    *(figures + known if first else [""] * len(figures + known)),
                ]
            )
    if truth:
        for number, method in enumerate(results[0].estimates):
            agreement = accuracy_of(results, truth, method).rank_correlation
            shown = "" if np.isnan(agreement) else f"{agreement:.2f}"
            rows.append(["" if number else "rank correlation", method, shown, "", "", ""])
    table = make_table("Off-policy estimates of the gain, with 95 % intervals", columns, rows, first_wraps=True)
    table.caption, table.caption_justify = "* its interval leaves out the error of the model", "left"
    return table


def _cell(estimate: PolicyEstimate) -> str:
    return estimate.refused.partition(":")[0].lower() if estimate.refused else f"{estimate:+.3f}"


def _or_unknown(figure: float | None) -> str:
    return "unknown" if figure is None else f"{figure:.1f}"
