"""The features that a policy sees: names, meanings and ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Feature(NamedTuple):
    """One feature.

    Attributes:
        name: as in `MODULE_FEATURES` or `RUN_FEATURES`.
        meaning: what is measured, in which unit.
        values: the range of its values.
    """

    name: str
    meaning: str
    values: str


MOST_FEATURE = 3.0
"""No feature lies further from 0."""

_BOUNDED, _SHARE, _UP_TO_THREE = "-3 to 3", "0 to 1", "0 to 3"

MODULE_FEATURE_TABLE = (
    Feature("sensitivity", "log component sensitivity per rank, minus its mean over the modules", _BOUNDED),
    Feature("snr", "log gradient signal-to-noise, minus its mean", _BOUNDED),
    Feature("relative_change", "log norm(delta W) / norm(W), minus its mean", _BOUNDED),
    Feature("gradient_norm", "log root mean square norm of the gradient of B, minus its mean", _BOUNDED),
    Feature("importance", "log of AdaLoRA's sum of abs(weight * gradient) over B per rank, minus its mean", _BOUNDED),
    Feature("rank", "rung over highest rung", _SHARE),
    Feature("adapted", "1 if the rank is above 0", "0 or 1"),
    Feature("relative_depth", "layer, from the bottom (0) to the top (1)", _SHARE),
    Feature("shape", "log(d_out / d_in)", _BOUNDED),
    Feature("rank_cost", "log cost of one rank at the moment where it is highest, minus its mean", _BOUNDED),
    Feature("next_rung_cost", "log10(cost of the next rung up x modules / budget); -3 at the highest rung", _BOUNDED),
    Feature("drop_saving", "the same of what dropping the module would save; -3 if it is not adapted", _BOUNDED),
    Feature("adapt_cost", "the same of what adapting it at rank 1 would add; -3 if it is adapted", _BOUNDED),
    Feature("signal_age", "decisions since its signals were fresh, over 4", _UP_TO_THREE),
    Feature("wide", "1 if it has the wide inner side of its layer, as the modules of an MLP do", "0 or 1"),
    Feature("position", "place among the modules of its layer, from the first (0) to the last (1)", _SHARE),
)
"""Columns of `Observation.modules`, the signals first. New ones come last: a policy reads as many as it was trained
with, see `Inputs`."""

RUN_FEATURE_TABLE = (
    Feature("progress", "share of the run's steps that are done", _SHARE),
    Feature("decisions_left", "decisions after this one, over 4", _UP_TO_THREE),
    Feature("budget", "the budget over what rank 8 on all modules takes", _UP_TO_THREE),
    Feature("spent", "cost of the current ranks over the budget", _UP_TO_THREE),
    Feature("modules", "log2 of the number of modules, over 10", _UP_TO_THREE),
    Feature("depth", "share of the layers that are adapted", _SHARE),
    Feature("loss", "log of training loss since the last decision over the loss of the probe's start", _BOUNDED),
    Feature("trend", "change of `loss` since the last decision", _BOUNDED),
    Feature("horizon", "log10 of the run's optimizer steps, less 2: 0 for 100 steps", _BOUNDED),
    Feature("rows", "log10 of the rows of an optimizer step", _UP_TO_THREE),
    Feature("probe_fall", "share of the training loss that the probe took off", "-3 to 1"),
    Feature("predicted", "log2 of the share of the tokens whose prediction the loss counts, over 4", "-3 to 0"),
)
"""Columns of `Observation.run`; new ones come last."""

_IN_WORDS: dict[str, tuple[str, Callable[[float], float]]] = {
    "modules": ("{} modules", lambda value: 2 ** (10 * value)),
    "horizon": ("{} steps", lambda value: 10 ** (2 + value)),
    "rows": ("{} rows a step", lambda value: 10**value),
}
"""How people count what some features of the run say."""


def run_feature_number(name: str, value: float) -> str:
    """A feature of the run as people count it."""
    number = _IN_WORDS[name][1](value) if name in _IN_WORDS else value
    return f"{number:,.0f}" if name in _IN_WORDS else f"{number:.2g}"


def run_feature_text(name: str, value: float) -> str:
    """The same with what is counted, such as "200 steps"."""
    words = _IN_WORDS[name][0] if name in _IN_WORDS else f"{name} {{}}"
    return words.format(run_feature_number(name, value))


MODULE_FEATURES = tuple(feature.name for feature in MODULE_FEATURE_TABLE)
RUN_FEATURES = tuple(feature.name for feature in RUN_FEATURE_TABLE)

FEATURE_PREFIX, RUN_PREFIX = "feature.", "run."
"""How the columns of tables begin that hold features of modules and of the run."""


class Inputs(NamedTuple):
    """How many features a network reads, counted from the first.

    Attributes:
        modules: of `MODULE_FEATURES`.
        run: of `RUN_FEATURES`.
    """

    modules: int = len(MODULE_FEATURES)
    run: int = len(RUN_FEATURES)


EARLIER_FEATURE_NAMES = {
    "height": "relative_depth",
    "price": "rank_cost",
    "rise": "next_rung_cost",
    "release": "drop_saving",
    "entry": "adapt_cost",
    "stale": "signal_age",
}
"""Names of features in files of earlier versions, and what they are called now."""


def feature_table(features: Sequence[Feature]) -> str:
    """Features as a Markdown table, for a docstring: four spaces before every line but the first.

    Args:
        features: such as `MODULE_FEATURE_TABLE`.
    """
    rows = [("feature", "meaning", "range"), ("---", "---", "---"), *features]
    return "\n    ".join(f"| {' | '.join(row)} |" for row in rows)
