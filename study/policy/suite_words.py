"""What a suite says of a policy, in words."""

from __future__ import annotations

from ...agents.evaluation.replayed import SHUFFLED, STATIC
from ...common.statistics import Estimate
from ...common.units import plural
from ..decision.shapley import ACTOR
from .suite_figures import Promise, decides_nothing
from .suite_study import SuiteStudy

NOTHING = "this decides nothing"

_WORTH = {
    STATIC: ("What it changes on the way", "its final ranks from the first step on"),
    SHUFFLED: ("Its choice of layers", "its final ranks dealt anew among the modules of each kind"),
}
"""By kind of replay: what is measured, and by which runs."""

ACTOR_SCORES = "the actor's scores"


def verdict(study: SuiteStudy) -> list[str]:
    """What came out and why, in sentences; the first is the result."""
    return [_result(study), _counts(study), _leaves(study), _drivers(study), *worth(study).values()]


def worth(study: SuiteStudy) -> dict[str, str]:
    """What later changes and the choice of layers are worth, by `STATIC` and `SHUFFLED`, or how to find out."""
    known, sentences = study.worth(), {}
    for how, (what, runs) in _WORTH.items():
        if how in known:
            ending = f": {NOTHING}" if decides_nothing(known[how]) else ""
            sentences[how] = (
                f"{what} is worth {signed(known[how].value)} of the headroom, against runs with {runs} "
                f"({_interval(known[how])}){ending}."
            )
        else:
            sentences[how] = (
                f"{what} was not held against runs with {runs}, so its worth is not known. `rankpilot evaluate "
                f"{how}:{study.runs[0].log.parent} --output {study.folder} --resume`, with the settings of this "
                "folder, makes them."
            )
    return sentences


def promise(found: Promise | None) -> list[str]:
    """Whether runs gain where the votes say so."""
    if found is None:
        return ["Too few runs left uniform rank by votes of value networks to hold promise against result."]
    gap = found.claimed - found.gained.value
    inside = found.gained.low <= found.claimed <= found.gained.high
    fits = "that fits" if inside else f"the votes claim too {'much' if gap > 0 else 'little'}"
    ties = decides_nothing(found.correlation)
    follows = (
        NOTHING if ties else f"runs gain {'more' if found.correlation.value > 0 else 'less'} where more is expected"
    )
    return [
        f"The votes claim a chance of {percent(found.claimed)} to end better than uniform rank, on the mean of the "
        f"runs that left it; {percent(found.gained.value)} of them did ({_percents(found.gained)}): {fits}.",
        f"The rank correlation of expected and real improvement is {signed(found.correlation.value)} "
        f"({_interval(found.correlation)}): {follows}.",
    ]


def traits(study: SuiteStudy) -> list[str]:
    """Which traits tell the worst runs from the rest, in sentences; the first is how bad these runs are."""
    worst, found = study.worst(), study.traits()
    mean = sum(run.row.improvement for run in worst) / len(worst)
    lead = f"The worst tenth, {plural(len(worst), 'run')}, gains {signed(mean)} of the headroom on the mean."
    if not found:
        return [lead, "Nothing was measured that differs between the runs."]
    sure = [trait for trait in found if not decides_nothing(trait.distance)]
    parts = [
        f"{'more' if trait.distance.value > 0 else 'less'} of \u201c{trait.name}\u201d ({number(trait.worst)} against "
        f"{number(trait.rest)})"
        for trait in sure
    ]
    told = (
        f"Compared with the rest these runs have {'; '.join(parts)}." if sure else "No trait tells them from the rest."
    )
    return [lead, told, f"{plural(len(found), 'trait')} were tried, and one in twenty would stand out by chance."]


def obstacle(study: SuiteStudy) -> str:
    """Why nothing is said of what drives the policy; empty where it is known."""
    return study.obstacle and f"What drives it is not known: {study.obstacle}."


def _result(study: SuiteStudy) -> str:
    gain = study.improvement()
    ending = f": {NOTHING}" if decides_nothing(gain) else ""
    return (
        f"The gain of {study.policy} over uniform rank is {signed(gain.value)} of the headroom on the mean "
        f"({_interval(gain)}){ending}."
    )


def _counts(study: SuiteStudy) -> str:
    rows, gained = study.rows, study.gained()
    runs, tasks = plural(len(rows), "run"), plural(len({row.task for row in rows}), "task")
    failed, unlogged = sum(row.failed for row in rows), len(rows) - len(study.runs)
    notes = [f"{percent(gained.value)} of {runs} on {tasks} end better than uniform rank ({_percents(gained)})."]
    if failed:
        notes.append(f"{plural(failed, 'run')} failed.")
    if unlogged:
        notes.append(f"{plural(unlogged, 'run')} without a decision log counted in these two figures alone.")
    return " ".join(notes)


def _leaves(study: SuiteStudy) -> str:
    first, later = study.leaves_uniform(), study.moves_later()
    moved = f", and changes ranks at {percent(later.value)} of later decisions ({_percents(later)})" if later else ""
    return f"It leaves uniform rank at the start of {percent(first.value)} of the runs ({_percents(first)}){moved}."


def _drivers(study: SuiteStudy) -> str:
    found = study.drivers()
    if not found:
        return obstacle(study) or "What drives it is not known: its first decisions had one plan each."
    parts = ", ".join(f"{driver_name(driver.name)} ({number(driver.size.value)})" for driver in found[:3])
    return f"What weighs most in its first decisions, in the unit of votes: {parts}."


def driver_name(group: str) -> str:
    """What sentences call a group of features."""
    return ACTOR_SCORES if group == ACTOR else group


# Numbers --------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, without a tail of zeros."""
    return f"{value:.3g}".replace("-", "\u2212")


def signed(value: float) -> str:
    """Two decimals with a sign."""
    return f"{value:+.2f}".replace("-", "\u2212")


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.0f} %"


def _interval(found: Estimate) -> str:
    return f"95 % interval {signed(found.low)} to {signed(found.high)}"


def _percents(found: Estimate) -> str:
    return f"95 % interval {100 * found.low:.0f} to {percent(found.high)}"
