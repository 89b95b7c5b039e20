"""Many targets side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

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


def comparison_table(results: Sequence[TargetResult]) -> Table:
    """Estimates with their intervals, some rows a target, beside what tells how far weights carry; refusals in words.

    Args:
        results: of `compare_targets`, at least one.
    """
    columns = ["policy", "method", "gain", "tasks that\ntell", "largest\nweight"]
    rows = []
    for result in results:
        weighted = result.estimates["self-normalised"]
        figures = [_or_unknown(weighted.effective_size), _or_unknown(weighted.largest_weight)]
        for number, (method, estimate) in enumerate(result.estimates.items()):
            first = number == 0
            rows.append(
                [
                    escape(result.target) if first else "",
                    method + (" *" if method == "direct" else ""),
                    _cell(estimate),
                    *(figures if first else ["", ""]),
                ]
            )
    table = make_table("Off-policy estimates of the gain, with 95 % intervals", columns, rows, first_wraps=True)
    table.caption, table.caption_justify = "* its interval leaves out the error of the model", "left"
    return table


def _cell(estimate: PolicyEstimate) -> str:
    return estimate.refused.partition(":")[0].lower() if estimate.refused else f"{estimate:+.3f}"


def _or_unknown(figure: float | None) -> str:
    return "unknown" if figure is None else f"{figure:.1f}"
