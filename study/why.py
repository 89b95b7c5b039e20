"""Explain a decision: the winning plan, its expected loss, and the outcome."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.arrays import IntArray
from ..common.text import cost_text, plural
from ..cost.savers.prices import plain_text
from ..decide.choice import PLAIN, Choice, percent
from ..decide.chooser import PlanChooser
from ..decide.groups import DOUBLE, GO_BACK, GROUP_RULES, HALVE, NOTHING, GroupView
from ..decide.log import DecisionLog, DecisionRecord
from ..decide.observation import STEPS_PREFIX
from ..decide.plan.worth import FEATURES
from ..decide.policy import Policy
from ..decide.rate_control import DOUBLED, HALVED, UNDO
from ..decide.rules import RULES
from .replay import WhatIf, redecide, usual_questions, what_if
from .run_data import rates_sentence

_RESTORED = ", and restored the last copy at a quarter of the learning rate"
RATE_TOLD = {HALVED: ", and halved the learning rate", DOUBLED: ", and doubled the learning rate", UNDO: _RESTORED}
"""Changes to the learning rate by a decision, in addition to ranks."""

SHOWN = 3
"""Maximum number of plans and parts named in a sentence."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """An explanation of a logged decision.

    Attributes:
        logged: the decision.
        steered: sentences on the action of a policy that steers ranks and learning rate.
        what_ifs: changes that would have altered the decision.
        notes: sentences on unknowns and their reasons.
    """

    logged: DecisionRecord
    steered: tuple[str, ...] = ()
    what_ifs: tuple[WhatIf, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The decision in one sentence."""
        logged, found = self.logged, self.logged.choice
        where = f"At step {logged.step}"
        if logged.correction:
            return f"{where} the guard or a user changed the ranks; no policy decided."
        if found is None:
            did = "kept the ranks" if logged.kept else "decided; it predicts no losses"
            return f"{where} {logged.policy} {did}{RATE_TOLD.get(logged.decision.change, '')}."
        taken = f'{where} the plan "{found.names[found.taken]}" was chosen'
        promise = found.promise()
        if found.taken == 0 or found.misses_goal:
            return f"{taken}{promise and f': {promise[0].lower()}{promise[1:]}'}"
        return f"{taken}{_against_plain(logged, found)}."

    def sentences(self) -> list[str]:
        """Return the explanation in plain English, the most important first, without the verdict."""
        logged, found = self.logged, self.logged.choice
        told = [*self.steered] if found is None else [*self.steered, *_of_choice(logged, found)]
        told += [rates_sentence(logged), plain_text(logged.saved) if logged.saved else ""]
        told += _of_budget(logged)
        return [*filter(None, told), *(answer.text for answer in self.what_ifs), *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, for pages."""
        logged, found = self.logged, self.logged.choice
        return {
            "decision": logged.number,
            "step": logged.step,
            "first": logged.problem.max_step is None,
            "policy": logged.policy,
            "verdict": self.verdict,
            "sentences": self.sentences(),
            **({} if found is None else _choice_json(found)),
            "what_ifs": [{"text": answer.text, "side_effects": answer.side_effects} for answer in self.what_ifs],
        }


def explanations(
    log: DecisionLog,
    policy: Policy | None = None,
    what_ifs: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any] | None]:
    """Explain every decision of a log.

    Args:
        log: log of a run.
        policy: the deciding policy; see `explain`.
        what_ifs: also repeat decisions with changes.
        on_progress: called with (decisions done, total decisions).

    Returns:
        The result of `Explanation.to_json` by decision; less, with a reason, if less is known. None for a number
            without a decision in the log.

    Raises:
        RunFolderError: there is no log, or it cannot be read.
    """
    records = log.read()
    found: list[dict[str, Any] | None] = [None] * (records[-1].number + 1)
    for done, logged in enumerate(records, 1):
        found[logged.number] = explain(logged, policy, what_ifs).to_json()
        if on_progress:
            on_progress(done, len(records))
    return found


def explain(logged: DecisionRecord, policy: Policy | None = None, what_ifs: bool = True) -> Explanation:
    """Explain one decision.

    Args:
        logged: the decision, from `DecisionLog.logged`.
        policy: the deciding policy; by default the policy shipped with rankpilot, or the rule of that name.
        what_ifs: also search for changes that would have altered the decision.
    """
    found = Explanation(logged)
    if logged.correction:
        return replace(found, notes=("The log does not record how the guard or a user chose these ranks.",))
    named: Policy | None = GROUP_RULES.get(logged.policy) or RULES.get(logged.policy)
    given = policy or named or (PlanChooser() if logged.choice else None)
    same_weights = (sha256 := getattr(given, "sha256", None)) == logged.policy_sha256
    known = given is not None and same_weights and (sha256 is not None or given.name == logged.policy)
    if known and getattr(given, "steers_rate", False):
        found = replace(found, steered=tuple(_steered(logged, given)))
    if not what_ifs or (logged.kept and not logged.decision.change):
        return found
    if given is None or not known:
        return replace(found, notes=(f"The policy {logged.policy} is not available, so there are no what-ifs.",))
    case = redecide(logged, given)
    if differences := ", ".join(name for name in case.differences if name != "rank_after"):
        note = f"Repeated here, the decision differs in {differences}, so there are no what-ifs."
        return replace(found, notes=(note,))
    answers = (what_if(case, question) for question in usual_questions(case))
    return replace(found, what_ifs=tuple(answer for answer in answers if answer))


def best_first(found: Choice) -> IntArray:
    """Sort plans by the goal, int64 (P,): the cheapest within the tolerance, then those of least loss."""
    wanted = found.goal.saves & found.within_tolerance
    cautious = np.where(found.fits, found.cautious, np.inf)
    return np.lexsort((cautious, np.where(wanted, found.goal_costs, np.inf)))


# Steering -------------------------------------------------------------------------------------------------------------

_OF_RATE = {NOTHING: "change nothing", HALVE: "halve the rate", DOUBLE: "double the rate", GO_BACK: "restore the copy"}


def _steered(logged: DecisionRecord, policy: Any) -> Iterator[str]:
    """Yield a steering policy's action beside the next best ones, what it saw, and the action of the rule `union`."""
    view = GroupView.of(logged.observation)
    chosen, union = (int(actor.act(view)) for actor in (getattr(policy, "actor", policy), GROUP_RULES["union"].actor))
    words = [*_OF_RATE.values(), *(f"grow {name}" for name in view.groups.names)]
    decided = view.decision(chosen)
    if decided.change != logged.decision.change or not np.array_equal(decided.ranks, logged.rank_wanted):
        return  # another version of the rules decided
    yield f"The action was to {words[chosen]}."
    if hasattr(policy, "probabilities"):
        likely = policy.probabilities(view)
        best = (each for each in np.argsort(-likely)[:SHOWN] if likely[each] >= 0.005)
        told = "; ".join(f"{words[each]} ({likely[each]:.0%})" for each in best)
        yield f"Its scores as probabilities: {told}."
    done, spent = (view.run_feature(name) for name in ("progress", "spent"))
    aligned, loss = view.run_feature(f"{STEPS_PREFIX}alignment") / 4, view.run_feature(f"{STEPS_PREFIX}loss") / 2
    steps = f", alignment of recent steps {aligned:+.2f}, their loss {math.exp(loss):.2f} of its initial value"
    yield f"It saw: {done:.0%} of the run done, {spent:.0%} of the budget in use{steps if aligned or loss else ''}."
    if policy.name != "union":
        yield f"The rule union would {'do the same' if union == chosen else words[union]}."


# Words ----------------------------------------------------------------------------------------------------------------


def _against_plain(logged: DecisionRecord, found: Choice) -> str:
    """Compare the chosen plan with plain LoRA."""
    unfit = "" if found.fits[0] else ", which does not fit"
    if not found.goal.saves:
        expected, surely = (percent(float(values[found.taken])) for values in (found.expected, found.surely))
        return f": its loss is expected to be {expected} versus {PLAIN}{unfit}, very likely at most {surely}"
    most = "the least time per step" if found.goal.kind == "time" else "the least memory"
    mine, plain = (_cost(logged, found, plan) for plan in (found.taken, 0))
    near = f"{plural(int(found.within_tolerance.sum()), 'plan')} very likely within {percent(found.goal.tolerance)}"
    return f": of {near} of the loss of {PLAIN}, it takes {most}, {mine} versus {plain}{unfit}"


def _cost(logged: DecisionRecord, found: Choice, plan: int) -> str:
    """Return a plan's cost under the goal, with its unit."""
    costs = found.goal_costs
    if found.goal.kind == "time":  # estimated from counted work, in which shares are near and seconds are not
        return f"{costs[plan] / costs[0]:.0%}"
    return cost_text(float(costs[plan]), logged.problem.cost.unit)


def _of_choice(logged: DecisionRecord, found: Choice) -> Iterator[str]:
    parts = [f"{name} {percent(value)}" for name, value in _parts(found)]
    if parts:
        more = " and smaller ones" if len(parts) > SHOWN else ""
        yield f"The expectation is the sum of these effects: {', '.join(parts[:SHOWN])}{more}."
        expected, reach, spread = (float(each[found.taken]) for each in (found.expected, found.reach, found.spread))
        low, high = percent(expected - reach), percent(expected + reach)
        varies = f"Fine-tunes vary with a standard deviation of {100 * spread:.1f} %"
        yield f"{varies}: the loss may be anywhere from {low} to {high}."
    yield f"The goal is {found.goal}."
    yield _runners_up(logged, found)
    if found.caveats:
        yield f"This is less reliable than usual: {', '.join(found.caveats)}."


def _parts(found: Choice) -> list[tuple[str, float]]:
    """Return each feature's share of the chosen plan's expected log loss, largest first; zeros are left out."""
    named = zip(FEATURES, found.parts[found.taken].tolist(), strict=True)
    return sorted(((name, value) for name, value in named if value), key=lambda part: -abs(part[1]))


def _runners_up(logged: DecisionRecord, found: Choice) -> str:
    saves = found.goal.saves and not found.misses_goal
    others = [plan for plan in best_first(found).tolist() if plan != found.taken]
    others = [plan for plan in others if (found.within_tolerance if saves else found.fits)[plan]]
    if not others:
        return f"No other plan {'is within the tolerance' if saves else 'fits'}."
    worth = [_cost(logged, found, plan) if saves else percent(float(found.cautious[plan])) for plan in others[:SHOWN]]
    plans = ", ".join(f'"{found.names[plan]}" ({each})' for plan, each in zip(others, worth, strict=False))
    return f"The next best {'within the tolerance' if saves else 'by cautious loss estimate'}: {plans}."


def _of_budget(logged: DecisionRecord) -> list[str]:
    """Describe changes to the policy's requested ranks: clipping to the ladder and bounds, then to the budget."""
    asked, clipped, got = logged.rank_wanted, logged.rank_clipped, logged.rank_after
    if np.array_equal(asked, got):
        return ["Every module got the rank requested by the policy."]
    problem = logged.problem
    ladder, (lower, upper) = problem.ladder, problem.bounds()
    rungs = ladder.rung(asked)
    allowed = ladder.array[np.clip(rungs, lower, upper)]
    reasons = np.full(len(asked), "", dtype=object)
    reach = "modules may move no further in one decision"
    reasons[rungs > upper] = np.where(upper < problem.tops, reach, "their upper bound is lower")[rungs > upper]
    reasons[rungs < lower] = np.where(lower > problem.bottoms, reach, "their lower bound is higher")[rungs < lower]
    reasons[problem.is_pinned & (allowed != asked)] = "they are pinned"
    off_ladder = (allowed == clipped) & (ladder.array[rungs] == clipped) & (asked != clipped)
    reasons[off_ladder] = "the ladder does not have that rank, so the next lower one is used"
    reasons[clipped != allowed] = "it was set by hand"
    counts = Counter(filter(None, reasons.tolist()))
    found = [f"{plural(count, 'module')} did not get the requested rank: {why}." for why, count in counts.items()]
    lowered, raised = int((got < clipped).sum()), int((got > clipped).sum())
    if lowered:
        found.append(f"{plural(lowered, 'module')} got a lower rank because the requested ranks exceed the budget.")
    if raised:
        found.append(f"The remaining budget raised the rank of {plural(raised, 'module')}.")
    return found


def _choice_json(found: Choice) -> dict[str, Any]:
    """Return the plans, the best for the goal first, and the parts of the chosen one."""
    order = best_first(found)
    seconds, saves = found.seconds, found.goal.saves
    plans = [
        {
            "name": found.names[plan],
            "ranks": found.plans[plan].tolist(),
            **{name: float(getattr(found, name)[plan]) for name in ("expected", "spread", "surely")},
            "fits": bool(found.fits[plan]),
            "within": bool(found.within_tolerance[plan]) if saves else None,
            "cost": float(found.costs[plan]),
            "time": None if seconds is None else float(seconds[plan] / seconds[0]),
        }
        for plan in order.tolist()
    ]
    parts = [{"name": name, "value": value} for name, value in _parts(found)]
    return {"goal": str(found.goal), "plans": plans, "taken": order.tolist().index(found.taken), "parts": parts}
